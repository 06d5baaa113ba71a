"""One process, DDP, or FSDP2, and rows that several processes share: what differs between them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


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


def sharing(accelerator: Accelerator, size: int) -> Sharing:
    """Groups of `size` processes that follow one another, a dimension of a mesh beside that of the data.

    Raises:
        ValueError: `size` does not divide the number of processes.
    """
    processes = accelerator.num_processes
    if processes % size:
        raise ValueError(
            f"parallel must share rows among a number that divides that of processes, {processes}, got {size}"
        )
    number, rank = divmod(accelerator.process_index, size)
    if size == 1:
        return Sharing(None, 1, 0, number, processes)
    mesh = init_device_mesh(accelerator.device.type, (processes // size, size), mesh_dim_names=("data", "context"))
    return Sharing(mesh["context"], size, rank, number, processes // size)


def shard(objective: nn.Module, student: PreTrainedModel, teacher: PreTrainedModel, accelerator: Accelerator) -> None:
    """FSDP2, in place: each decoder layer is gathered when it runs; its block alone, where only that runs. What is
    outside the layers stays whole: it is frozen, and one memory serves both models."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in teacher.get_decoder().layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    layers = student.get_decoder().layers
    for layer in layers:
        if hasattr(layer, "self_attn"):  # Some layers of hybrids have another mixer.
            fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(layer, mesh=mesh)
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
