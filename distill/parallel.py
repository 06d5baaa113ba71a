"""One process, DDP, or FSDP2, and rows that several processes share: what differs between them."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from linmu_models.adapters.generic import LinmuGeneric
from linmu_models.config import auto_class
from linmu_models.modeling import FAMILIES

T = TypeVar("T")

ANOTHER_ENDED = "another process of this run has ended, or does not answer"
# What gloo, NCCL and the store that processes meet at say when one of them is gone. Few of these have a type.
_OF_ANOTHER = re.compile(r"gloo|NCCL|TCPStore|Connection (closed|reset) by peer|Broken pipe|Timed out waiting")


class Sharing(NamedTuple):
    """Which processes share rows, and so work on the same batches.

    Attributes:
        group: those that share rows with this one; None: none does.
        size: so many of them.
        rank: of this process among them.
        number, groups: this group of processes, and how many there are.
    """

    group: Any
    size: int
    rank: int
    number: int
    groups: int


def check_sharing(processes: int, size: int) -> None:
    """Raise ValueError where so many processes are no groups of `size`."""
    if processes % size:
        raise ValueError(
            f"parallel must share rows among a number that divides that of processes, {processes}, got {size}"
        )


def sharing(accelerator: Accelerator, size: int) -> Sharing:
    """Groups of `size` processes that follow one another, a dimension of a mesh beside that of the data.

    Raises:
        ValueError: `size` does not divide the number of processes.
    """
    processes = accelerator.num_processes
    check_sharing(processes, size)
    number, rank = divmod(accelerator.process_index, size)
    if size == 1:
        return Sharing(None, 1, 0, number, processes)
    mesh = init_device_mesh(accelerator.device.type, (processes // size, size), mesh_dim_names=("data", "context"))
    return Sharing(mesh["context"], size, rank, number, processes // size)


def from_first(work: Callable[[], T], group: Any = None) -> T:
    """What `work` gives on the first process, told to the others. All raise its error.

    All processes of the group must call this; without one, all that there are.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return work()
    told: list[Any] = [None, None]
    first = 0 if group is None else dist.get_global_rank(group, 0)
    if dist.get_rank() == first:
        try:
            told[0] = work()
        except Exception as error:  # Whatever it is, the others wait to be told.
            dist.broadcast_object_list([None, _sent(error)], src=first, group=group)
            raise
    dist.broadcast_object_list(told, src=first, group=group)
    value, failed = told
    if failed is not None:
        raise failed
    return value


def is_of_another(error: BaseException) -> bool:
    """Whether an error is that another process has ended, or has not answered in time."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    known = isinstance(error, dist.DistError)
    return known or (type(error) is RuntimeError and _OF_ANOTHER.search(str(error)) is not None)


def _sent(error: Exception) -> Exception:
    """An error that other processes can be told: itself, or one with its words."""
    try:
        copy.deepcopy(error)  # It takes what pickle takes.
    except Exception:  # Errors of other libraries raise anything here.
        return (OSError if isinstance(error, OSError) else RuntimeError)(str(error))
    return error


def loaded_by_first(load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A frozen model that the first process loads. The others have it on the meta device until `receive` or `shard`.

    All processes must call this; all raise the first one's error. A model without an adapter is loaded by each, as it
    cannot be converted without values.
    """
    loaded: list[PreTrainedModel] = []

    def described() -> Any:
        loaded.append(model := load())
        if issubclass(FAMILIES.get(model.config.model_type, LinmuGeneric), LinmuGeneric):
            return None
        return model.config, getattr(model, "generation_config", None), _kinds(model)

    description = from_first(described)
    if loaded:
        return loaded[0]
    if description is None:
        return load()
    config, generation_config, kinds = description
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config)
    for name, tensor in _named_tensors(model):
        tensor.data = tensor.data.to(kinds[name][0])
    if _kinds(model) != kinds:  # A file may hold apart what its configuration calls one.
        return load()
    model.generation_config = generation_config
    return model.eval().requires_grad_(False)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _kinds(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, str]]:
    """For each tensor of a model its dtype, its shape, and the name of the first that shares its memory."""
    first: dict[int, str] = {}
    return {
        name: (tensor.dtype, tensor.shape, first.setdefault(tensor.untyped_storage()._cdata, name))
        for name, tensor in _named_tensors(model)
    }


def receive(models: Sequence[PreTrainedModel], accelerator: Accelerator) -> None:
    """Give each process all of what the first one holds of these models, where one has them on the meta device: a
    tensor at a time. All processes must call this."""
    if _any_lacks(models, accelerator):
        _receive(models, accelerator.device)


def _any_lacks(models: Iterable[nn.Module], accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return False
    lacking = any(parameter.is_meta for model in models for parameter in model.parameters())
    return bool(accelerator.reduce(torch.tensor(int(lacking), device=accelerator.device), "sum"))


@torch.no_grad()
def _receive(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Give what is on the meta device the first process's values. What shares memory goes on to do so.

    Non-persistent buffers come too. All processes must call this, with the same modules.
    """
    memory: dict[Any, tuple[Tensor, Tensor]] = {}
    made: dict[int, tuple[Tensor, Tensor]] = {}  # With the old ones, whose ids must not be given to others.
    for module in [m for root in modules for m in root.modules()]:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                value = tensor.detach()
                if tensor.is_meta:
                    key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
                    empty = memory[key][1] if key in memory else torch.empty_like(value, device=device)
                    memory[key] = value, empty
                    value = empty
                sent = value.contiguous().flatten().view(torch.uint8)
                if sent.numel():
                    dist.broadcast(sent, 0)
                if tensor.is_meta:
                    if id(tensor) not in made:
                        new = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                        made[id(tensor)] = tensor, new
                    held[name] = made[id(tensor)][1]  # type: ignore[assignment]


def shard(objective: nn.Module, student: PreTrainedModel, teacher: PreTrainedModel, accelerator: Accelerator) -> None:
    """FSDP2, in place: each decoder layer is gathered when it runs; its block alone, where only that runs. What is
    outside the layers stays whole: it is frozen, and one memory serves both models.

    Where models are on the meta device, the first process sends their values: a layer at a time is whole."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    receives = _any_lacks((teacher,), accelerator)
    layers = student.get_decoder().layers
    for theirs, layer in zip(teacher.get_decoder().layers, layers, strict=True):
        if receives:
            _receive((theirs, layer), accelerator.device)
        fully_shard(theirs, mesh=mesh, reshard_after_forward=True)
        if hasattr(layer, "self_attn"):  # Some layers of hybrids have another mixer.
            fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    if receives:
        _receive((teacher, student), accelerator.device)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    fully_shard(objective, mesh=mesh, ignored_params={p for p in student.parameters() if id(p) not in inside})


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the model's layers."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def whole(layers: Iterable[nn.Module]) -> Iterator[None]:
    """While open, each process holds these sharded layers whole, and runs them on its own, as often as it likes."""
    parted = [layer for layer in layers if isinstance(layer, FSDPModule)]
    for layer in parted:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in parted:
            layer.set_reshard_after_forward(True)
            layer.reshard()


@contextmanager
def gradients_stay_local(objective: nn.Module, accelerator: Accelerator, local: bool) -> Iterator[None]:
    """While open and `local`, a backward pass adds up this process's gradients and talks to no other.

    Where they are sharded, it talks: whole gradients would take more memory than that takes time.
    """
    if local and isinstance(objective, DistributedDataParallel):
        with accelerator.no_sync(objective):
            yield
    else:
        yield


def gathered(value: Any) -> Any:
    """A copy of a tree of dicts, lists and tensors in which every tensor is whole. All processes must call this."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(item) for item in value)
    return value


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checkpoint_tensors(trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a training by name: weights, and AdamW's moments and steps, which are 0 before its first step.

    They share the memory of what they name. Where a weight is sharded, so are its moments.
    """
    tensors = {}
    for name, parameter in trainable.items():
        state = optimizer.state[parameter]
        if not state:
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] = torch.zeros(())
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": value for moment, value in state.items()}
    return tensors


def total_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of the gradients, over all processes where they are sharded."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=False)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
