"""Ops under torch.func, forward-mode AD, and differentiated more than once.

Each op of each namespace is here a second time, as the two `torch.autograd.Function`s that PyTorch's transforms ask
for. First derivatives and values are the kernels'; what kernels do not have, tangents and derivatives of gradients, is
that of the reference, which PyTorch differentiates as often as asked. An ordinary call does not come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

# What reports a slow path: op, what runs the reference.
Report = Callable[[str, str], None]


def active() -> bool:
    """Whether a transform of torch.func or forward-mode AD is around this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiates() -> bool:
    """Whether one of these takes derivatives: `vmap` alone does not."""
    kinds = {i.key() for i in retrieve_all_functorch_interpreters()}
    return forward_ad._current_level >= 0 or bool(kinds & {TransformType.Grad, TransformType.Jvp})


class Transformed:
    """One op of one namespace.

    Args:
        name: the op. kernel, bwd_kernel: it and `<op>_bwd`, as the dispatcher has them; None without a gradient.
        reference, bwd_reference: their definitions in plain PyTorch.
        setup_context: of the op's gradient. formula: that gradient, given ctx, what computes `<op>_bwd`, gradients.
        report: told when the reference runs where nobody asked for it.
    """

    def __init__(
        self,
        name: str,
        kernel: Any,
        reference: Callable[..., Any],
        bwd_kernel: Any = None,
        bwd_reference: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
        formula: Callable[..., Any] | None = None,
        report: Report | None = None,
    ) -> None:
        self.name, self.kernel, self.reference, self.report = name, kernel, reference, report
        self.function: Any = None
        self.bwd: Any = None  # `<op>_bwd`, such that it can be differentiated

        def per_sample(info: Any, dims: Any, *args: Any) -> Any:
            return self._per_sample(self, info, dims, args)

        torch.library.register_vmap(kernel._name, per_sample)
        if bwd_kernel is None or bwd_reference is None or setup_context is None or formula is None:
            return
        gradient, bwd = formula, _second(self, bwd_kernel, bwd_reference)

        call_bwd = self.bwd = bwd.apply

        def per_sample_bwd(info: Any, dims: Any, *args: Any) -> Any:
            return self._per_sample(call_bwd, info, dims, args)

        torch.library.register_vmap(bwd_kernel._name, per_sample_bwd)

        class First(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return kernel(*args)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return gradient(ctx, call_bwd, *grads)

            @staticmethod
            def vmap(info: Any, dims: Any, *args: Any) -> Any:
                return self._per_sample(self, info, dims, args)

        First.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
        First.__name__ = First.__qualname__ = name
        self.function = First

    def __call__(self, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        kinds = {i.key() for i in retrieve_all_functorch_interpreters()}
        forward_mode = TransformType.Jvp in kinds or forward_ad._current_level >= 0
        if forward_mode and any(_has_tangent(t) for t in tensors):
            if self.function is None:
                raise RuntimeError(f"{self.name}: has no forward-mode derivative, as it has no gradient")
            self.reported("forward-mode AD")
            return self.reference(*args)
        if self.function is not None and TransformType.Grad in kinds:
            return self.function.apply(*args)
        return self.kernel(*args)

    def reported(self, what: str) -> None:
        if self.report is not None:
            self.report(self.name, what)

    def _per_sample(self, call: Callable[..., Any], info: Any, dims: Any, args: tuple[Any, ...]) -> Any:
        """One call per sample: a kernel's batch has a place of its own in each argument, which `vmap` knows not."""
        self.reported("vmap")
        for argument, value, dim in zip(self.kernel._schema.arguments, args, dims, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and dim is None and value is not None:
                raise ValueError(f"{self.name}: {argument.name} must be mapped over by vmap: every sample writes to it")
        outputs = []
        for i in range(info.batch_size):
            sample = [a if d is None or not isinstance(a, Tensor) else a.select(d, i) for a, d in zip(args, dims)]  # noqa: B905
            outputs.append(call(*sample))
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        kind = type(outputs[0])
        stacked = kind(torch.stack(each) for each in zip(*outputs, strict=True))
        return stacked, kind(0 for _ in stacked)


def _has_tangent(t: Tensor) -> bool:
    return is_functorch_wrapped_tensor(t) or forward_ad.unpack_dual(t).tangent is not None


def _second(of: Transformed, kernel: Any, reference: Callable[..., Any]) -> Any:
    """`<op>_bwd`, whose own gradient is the reference's."""

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            out = kernel(*args)
            return tuple(out)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
            ctx.consts = [None if isinstance(v, Tensor) else (v,) for v in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if c is None else c[0] for c in ctx.consts]
            at = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
            of.reported("a derivative of its gradient")

            def again(*values: Tensor) -> tuple[Tensor, ...]:
                full = list(args)
                for i, value in zip(at, values, strict=True):
                    full[i] = value
                return tuple(reference(*full))

            _, pull = torch.func.vjp(again, *(args[i] for i in at))[:2]
            found = dict(zip(at, pull(grads), strict=True))
            return tuple(found.get(i) for i in range(len(args)))

        @staticmethod
        def vmap(info: Any, dims: Any, *args: Any) -> Any:
            return of._per_sample(Second.apply, info, dims, args)

    Second.__name__ = Second.__qualname__ = f"{of.name}_bwd"
    return Second
