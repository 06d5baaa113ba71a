"""What an op's bench file is made of, and help for the implementations that others wrote."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

Inputs = dict[str, Any]
Sizes = dict[str, Any]  # numbers, tuples, and names of choices


class Missing(Exception):
    """This peer cannot run here; the reason becomes the row."""


def _same(x: Any) -> Any:
    return x


def _same_gradient(name: str, grad: torch.Tensor) -> torch.Tensor:
    return grad


@dataclass(frozen=True)
class Peer:
    """Another implementation, of which only `run(**prepare(inputs))` is timed.

    `finish` brings an output to our layout, `finish_gradient` the gradient of the input of that name.
    """

    run: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] = _same
    finish: Callable[[torch.Tensor], torch.Tensor] = _same
    finish_gradient: Callable[[str, torch.Tensor], torch.Tensor] = _same_gradient


@dataclass(frozen=True)
class Case:
    """One measurement: sizes by name, the dtypes it is measured in, and whether `--quick` includes it.

    One with a `target` is for a GPU: what is aimed at on an H200, in words.
    """

    sizes: Sizes
    dtypes: tuple[str, ...] = ("float32",)
    backward: bool = False
    quick: bool = False
    target: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.sizes[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.sizes.get(name, default)


@dataclass(frozen=True)
class Bench:
    """One op: `flops` and `bytes` are the least that a case needs, forward only or forward + backward."""

    op: str
    cases: dict[str, Case]
    make: Callable[[Case, torch.dtype, str], Inputs]
    flops: Callable[[Case, bool], float]
    bytes: Callable[[Case, int, bool], float]
    peers: dict[str, Callable[[Case], Peer]]
    differentiable: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    call: Callable[..., Any] | None = None  # linmu_ops.<op> if None
    products: bool = True  # False: elementwise, so that only the copy is its roof


def case(*, dtypes: tuple[str, ...] = ("float32",), backward: bool = False, quick: bool = False, **sizes: Any) -> Case:
    return Case(sizes, dtypes, backward, quick)


def gpu_case(target: str, *, backward: bool = False, **sizes: Any) -> Case:
    return Case(sizes, ("bfloat16",), backward, target=target)


def need(module: str, device: str | None = None) -> ModuleType:
    """The module, or Missing with the reason."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Missing(f"{module} needs a CUDA device")
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise Missing(f"{module}: {e}") from None


def mamba2() -> ModuleType:
    """transformers' Mamba-2, whose plain PyTorch functions serve where no kernel is installed."""
    return need("transformers.models.mamba2.modeling_mamba2")


def compiled(build: Callable[[Case], Peer]) -> Callable[[Case], Peer]:
    """The same peer under torch.compile."""

    def compiled_peer(case: Case) -> Peer:
        peer = build(case)
        return replace(peer, run=torch.compile(peer.run))

    return compiled_peer
