"""One process, DDP, or FSDP2: what differs between them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


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


@torch.no_grad()
def assign(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(whole)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of a gathered state, whose moments are sharded as their parameters are."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            for name, value in moments.items():
                if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


def total_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of the gradients, over all processes where they are sharded."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=False)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
