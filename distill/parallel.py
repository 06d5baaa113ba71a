"""One process, DDP, or FSDP2: what differs between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def shard(objective: nn.Module, student: PreTrainedModel, accelerator: Accelerator) -> None:
    """FSDP2, in place: each decoder layer is gathered when it runs, the rest of the student at its root."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in student.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


@contextmanager
def gradients_stay_local(objective: nn.Module, accelerator: Accelerator, local: bool) -> Iterator[None]:
    """While open and `local`, a backward pass adds up this process's gradients and talks to no other."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(not local)
        yield
    elif local:
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


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a part of the module's parameters, until the layer around it runs."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


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
