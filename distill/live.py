"""Counts bytes that live at one time, and FLOPs: of real tensors, or of fakes that have no bytes."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """While open, counts the storages that operations give, until they are freed.

    What a kernel takes and frees within one operation is not seen.

    Args:
        known: tensors that were there before, which count from the start.

    Attributes:
        now, peak: bytes that live at this time, and that lived at one time at most.
        peak_apart: the same as `peak`, within `apart`.
        flops: of products, as `FlopCounterMode` counts them. (Its hooks keep alive what a checkpoint makes again.)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.peak_apart = self.flops = 0
        self._live: dict[int, Any] = {}
        for tensor in known:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._live.pop(key, None)

        self._live[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While open, what lives counts for `peak_apart`, and no FLOPs are counted."""
        peak, flops, self.peak = self.peak, self.flops, self.now
        try:
            yield
        finally:
            self.peak_apart = max(self.peak_apart, self.peak)
            self.peak, self.flops = max(peak, self.now), flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return out


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors, shared ones counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
