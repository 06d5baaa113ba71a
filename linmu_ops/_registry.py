"""One table of ops and implementations: who serves, why the others do not, and how to force one.

Each op exists once per *namespace*, with the same schema, fake and autograd formula:

    linmu::op            the native op: compiled kernels per device, the reference as the dispatcher's default
    linmu_reference::op  the plain PyTorch definition, always
    linmu_triton::op     Triton kernels

so a forced choice is an ordinary op that traces, compiles and differentiates like any other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from . import _flops, _native, _transforms
from ._dims import shown

NAMESPACE = {"cpu": "linmu", "cuda": "linmu", "triton": "linmu_triton", "reference": "linmu_reference"}
# Order of preference per device.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# What stands behind liblinmu_cuda.so, and which kernels of a GPU were less exact there than the bound of their tests.
EVIDENCE = (
    "compiled for sm_90a, right on an H100 to rounding, but no GPU has run the scans by slices, which serve "
    "bfloat16 there, nor the present forward of windows without a bias: both are newer; "
    "for sm_80 and sm_100 they have not run on a GPU"
)
INEXACT = {
    ("ssd_scan", "triton"): "on an H100 it exceeded its tests' bound, for three causes that are mended since; not "
    "measured there again"
}

_libraries = {ns: torch.library.Library(ns, "DEF") for ns in ("linmu", "linmu_reference", "linmu_triton")}


class LinmuWarning(UserWarning):
    """Something works, but not as well or as fast as it could."""


@dataclass(frozen=True)
class Op:
    """One op: its schema and what serves it. `backward` is the op `<name>_bwd`, or None."""

    name: str
    schema: str
    backward: str | None
    entries: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...]  # name, schema, reference, fake
    autograd: tuple[Callable[..., None], Callable[..., Any]] | None  # setup_context, backward
    limits: dict[str, Limit]  # per implementation that does not take every call
    notes: dict[str, Limit]  # per implementation that does some call in another way


@dataclass(frozen=True)
class Asked:
    """What a `Limit` judges: a call's arguments by name, as far as they are known."""

    arguments: dict[str, Any]
    shared_memory: int  # bytes that one block may have on the GPU

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def differentiates(self) -> bool:
        return torch.is_grad_enabled() and any(
            isinstance(v, torch.Tensor) and v.requires_grad for v in self.arguments.values()
        )


# The reason an implementation cannot serve a call, or what it does in another way; or None.
Limit = Callable[[Asked], str | None]


@dataclass(frozen=True)
class Choice:
    """One row of `explain`: `why_not` is None for a usable implementation. `note` says what it does in another way."""

    impl: str
    why_not: str | None
    chosen: bool = False
    note: str | None = None


OPS: dict[str, Op] = {}
_binaries: dict[str, _native.Binary] = {}
# (op, device type, is it float64) -> implementation, fixed once binaries are loaded
_default: dict[tuple[str, str, bool], str] = {}
_transformed: dict[Any, _transforms.Transformed] = {}  # by the op of a namespace
_warned: set[Any] = set()


def define_op(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    bwd_schema: str | None = None,
    bwd_reference: Callable[..., Any] | None = None,
    bwd_fake: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    limits: dict[str, Limit] | None = None,
    notes: dict[str, Limit] | None = None,
) -> None:
    """Define `name` (and `<name>_bwd`) in every namespace.

    `backward(ctx, bwd_op, *grads)` receives the namespace's own `<name>_bwd`, so gradients stay with the
    implementation that computed the forward.
    """
    entries = [(name, schema, reference, fake)]
    if bwd_schema:
        assert bwd_reference and bwd_fake
        entries.append((f"{name}_bwd", bwd_schema, bwd_reference, bwd_fake))
    autograd = (setup_context, backward) if setup_context and backward else None
    bwd_name = f"{name}_bwd" if bwd_schema else None
    OPS[name] = Op(name, schema, bwd_name, tuple(entries), autograd, limits or {}, notes or {})
    for ns, lib in _libraries.items():
        define_in(ns, lib, OPS[name])


def define_in(ns: str, lib: torch.library.Library, op: Op) -> None:
    """Define `op` in the namespace `ns`, with its fake, its gradient, and what serves it where nothing else does."""
    for entry, schema, reference, fake in op.entries:
        lib.define(entry + schema)
        kernel = functools.partial(_run_triton, op.name, entry) if ns == "linmu_triton" else _exact(reference)
        lib.impl(entry, _on_one_device(op.name, entry, kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{ns}::{entry}", _on_one_device(op.name, entry, fake), lib=lib)
        _flops.register(ns, entry)
    packets = getattr(torch.ops, ns)
    kernel = getattr(packets, op.name).default
    report = None if ns == "linmu_reference" else _warn_of_transform
    if not op.autograd:
        _transformed[kernel] = _transforms.Transformed(op.name, kernel, _exact(op.entries[0][2]), report=report)
        return
    setup_context, backward = op.autograd
    bwd_op = getattr(packets, f"{op.name}_bwd").default
    references = (_exact(reference) for _, _, reference, _ in op.entries)
    transformed = _transforms.Transformed(
        op.name, kernel, next(references), bwd_op, next(references), setup_context, backward, report
    )
    _transformed[kernel] = transformed

    def formula(ctx: Any, *grads: Any) -> Any:
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _transforms.active()):
            return backward(ctx, transformed.bwd, *grads)
        return backward(ctx, bwd_op, *grads)

    torch.library.register_autograd(f"{ns}::{op.name}", formula, setup_context=setup_context, lib=lib)


def _exact(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference whose own matrix products autocast leaves alone, as it does compiled kernels."""

    @functools.wraps(reference)
    def kernel(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if not torch.amp.is_autocast_available(device):
            return reference(*args)
        with torch.autocast(device, enabled=False):
            return reference(*args)

    return kernel


def _on_one_device(op: str, entry: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, refusing a call of tensors on several devices: it would read one device's memory from another."""

    def checked(*args: Any) -> Any:
        given = [(n, a) for n, a in zip(_argument_names(entry), args, strict=False) if isinstance(a, torch.Tensor)]
        for name, tensor in given:
            if tensor.device != given[0][1].device:
                raise ValueError(f"{op}: {name} must be on {given[0][1].device}, got {tensor.device}")
        return kernel(*args)

    return checked


def _run_triton(module: str, entry: str, *args: Any) -> Any:
    """Run a Triton kernel's host side. Those index rows as they lie packed in memory, so no other layout gets there."""
    schema = getattr(torch.ops.linmu_triton, entry).default._schema.arguments
    packed: list[Any] = []
    for argument, value in zip(schema, args, strict=True):
        if isinstance(value, torch.Tensor):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and not value.is_contiguous():
                raise ValueError(f"{module}: {argument.name} must be contiguous, got strides {value.stride()}")
            value = value if written else value.contiguous()
        packed.append(value)
    return getattr(importlib.import_module(f"linmu_ops.triton_kernels.{module}"), entry)(*packed)


def schema_hash() -> str:
    """Fingerprint of every native schema; a binary built for another one refuses to register."""
    text = "\n".join(
        str(getattr(torch.ops.linmu, entry).default._schema)
        for op in sorted(OPS)
        for entry in (op, OPS[op].backward)
        if entry
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_binaries() -> None:
    """Register the compiled kernels. Called once, after every schema is defined."""
    for device in ("cpu", "cuda"):
        if device == "cuda" and torch.version.cuda is None:
            _binaries[device] = _native.Binary("liblinmu_cuda.so", error="this torch has no CUDA")
        else:
            _binaries[device] = _native.load_library(device, schema_hash())
    for op in OPS:
        for device, order in PREFERENCE.items():
            for dtype in (torch.float32, torch.float64):
                serves = next(i for i in order if why_not(op, i, device, dtype) is None)
                _default[op, device, dtype == torch.float64] = serves
    for item in filter(None, os.environ.get("LINMU_IMPL", "").split(",")):
        _everywhere.update(_wanted("LINMU_IMPL", item))


def binaries() -> dict[str, _native.Binary]:
    return dict(_binaries)


def _wanted(by: str, item: str) -> dict[str, str]:
    """What `"op:impl"` (or `"*:impl"`) forces, told by a variable or a function. Raises ValueError for an unknown op or
    implementation."""
    if not isinstance(item, str):
        raise TypeError(f"{by}: an item must be a text such as 'ssd_scan:reference', got {item!r}")
    name, _, impl = item.strip().partition(":")
    if name != "*" and name not in OPS:
        raise ValueError(f"{by}: op must be * or one of {', '.join(sorted(OPS))}, got {name!r}")
    if impl not in NAMESPACE:
        raise ValueError(f"{by}: implementation must be one of {', '.join(NAMESPACE)}, got {impl!r}")
    return dict.fromkeys(OPS if name == "*" else (name,), impl)


class _Use:
    """What one `use_impl` forces, until it is over."""

    def __init__(self, impls: dict[str, str]) -> None:
        self.impls, self.over = impls, False


_everywhere: dict[str, str] = {}  # by LINMU_IMPL
# By `use_impl`, the last one first. Entries and not a merged table: blocks need not end in the order they began.
_uses: ContextVar[tuple[_Use, ...]] = ContextVar("linmu_ops.use_impl", default=())


class _Traced(threading.local):
    """What is forced in this thread, for the compiler, which cannot look into a ContextVar."""

    def __init__(self) -> None:
        self.forced: dict[str, str] = dict(_everywhere)


_traced = _Traced()


def forced(op: str) -> str | None:
    """The implementation that is forced here and now."""
    if torch.compiler.is_dynamo_compiling():
        return _traced.forced.get(op)
    for use in reversed(_uses.get()):
        if not use.over and op in use.impls:
            return use.impls[op]
    return _everywhere.get(op)


def _forced_changed() -> None:
    _traced.forced = {op: impl for op in OPS if (impl := forced(op)) is not None}


@contextlib.contextmanager
def use_impl(*items: str) -> Iterator[None]:
    """Force implementations within a block: `with use_impl("ssd_scan:reference"): ...`. Raises if one cannot serve.

    It holds in this thread or task alone, and in the tasks that it starts. It overrides LINMU_IMPL. Of nested blocks
    the inner one holds. Blocks may end in any order.
    """
    use = _Use({op: impl for item in items for op, impl in _wanted("use_impl", item).items()})
    _uses.set((*_uses.get(), use))
    _forced_changed()
    try:
        yield
    finally:
        here = _uses.get()
        if use in here:
            _uses.set(tuple(other for other in here if other is not use))
        else:
            use.over = True  # ends in another context than it began in, as an abandoned generator may
        _forced_changed()


@functools.cache
def _triton_why_not(op: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (_native.HERE / "triton_kernels" / f"{op}.py").exists():
        return "no Triton kernel for this op"
    return None


# Where no GPU is there to ask: what the largest has of which the kernels make use.
MOST_SHARED_MEMORY = 227 * 1024


@functools.cache
def _shared_memory(device: int | None) -> int:
    """Bytes that one block may have on that GPU."""
    if not torch.cuda.is_available():
        return MOST_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device)
    return int(getattr(properties, "shared_memory_per_block_optin", MOST_SHARED_MEMORY))


def more_than(asked: Asked, needed: dict[str, int]) -> str | None:
    """The reason a GPU's shared memory does not do, given what each kernel needs of it at least."""
    kernel = max(needed, key=lambda k: needed[k])
    if needed[kernel] <= asked.shared_memory:
        return None
    return f"its {kernel} needs {needed[kernel]} bytes of shared memory per block, the GPU has {asked.shared_memory}"


def _beyond(op: str, impl: str, like: torch.Tensor | None, arguments: dict[str, Any]) -> str | None:
    """The reason `impl` cannot serve a call of these arguments, of whatever device and dtype."""
    limit = OPS[op].limits.get(impl)
    if limit is None or not arguments:
        return None
    try:
        return limit(Asked(arguments, _shared_memory(None if like is None else like.device.index)))
    except IndexError as error:
        raise ValueError(f"explain: tensors must be of the shapes that {op} takes") from error


@functools.cache
def _argument_names(op: str) -> tuple[str, ...]:
    return tuple(a.name for a in getattr(torch.ops.linmu, op).default._schema.arguments)


def why_not(op: str, impl: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason `impl` cannot serve `op` on tensors of `device` and `dtype`, or None if it can."""
    if impl == "reference":
        return None
    if impl in ("cpu", "cuda"):
        if device != impl:
            return f"the tensors are on {device}"
        error = _binaries[impl].error
        if error:
            return f"{_binaries[impl].file}: {error}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"linmu::{op}", impl.upper()):
            return f"{_binaries[impl].file} has no kernel for this op"
        return "the CUDA kernels take no float64" if impl == "cuda" and dtype == torch.float64 else None
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device} (TRITON_INTERPRET=1 would interpret)"
    return "the Triton kernels take no float64" if dtype == torch.float64 else _triton_why_not(op)


def _automatic(op: str, device: str, dtype: torch.dtype) -> str:
    return _default.get((op, device, dtype == torch.float64), "reference")


def _device_type(device: Any) -> str:
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"explain: device must be a device, such as 'cpu' or 'cuda', got {shown(device)}") from error


def _check_arguments(op: str, arguments: dict[str, Any]) -> None:
    """Of `explain`: whether the op has each, and has it as a tensor."""
    kinds = {a.name: str(a.type) for a in getattr(torch.ops.linmu, op).default._schema.arguments}
    public = inspect.signature(getattr(importlib.import_module(__package__), op)).parameters
    for name, value in arguments.items():
        if name not in kinds and name not in public:
            raise ValueError(f"explain: {name} must be an argument of {op}")
        if "Tensor" in kinds.get(name, "") and not isinstance(value, torch.Tensor | None):
            raise TypeError(f"explain: {name} must be a Tensor, got {shown(value)}")


def explain(op: str, *tensors: torch.Tensor, device: str | None = None, **named: Any) -> list[Choice]:
    """Which implementation serves `op` for these tensors (or this device type), and why the others do not.

    Give the tensors of the call, in the order in which the op takes them, or by name (a scan's `reverse` as it is).
    Some implementations have a limit on sizes; they are judged by the tensors that are given. Returns one
    `Choice(impl, why_not, chosen, note)` per implementation.
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(OPS))}, got {shown(op)}")
    names = _argument_names(op)
    if len(tensors) > len(names):
        raise ValueError(f"explain: tensors must be at most the {len(names)} of {op}, got {len(tensors)}")
    if tensors and not isinstance(tensors[0], torch.Tensor):
        raise TypeError(f"explain: {names[0]} must be a Tensor, got {shown(tensors[0])}")
    where = _device_type(device) if device is not None else tensors[0].device.type if tensors else "cpu"
    dtype = tensors[0].dtype if tensors else torch.float32
    reverse = named.pop("reverse", None)
    if reverse is not None and not hasattr(reverse, "_asdict"):
        raise TypeError(f"explain: reverse must be that of {op}, got {shown(reverse)}")
    named |= {} if reverse is None else {f"reverse_{name}": t for name, t in reverse._asdict().items()}
    arguments = dict(zip(names, tensors, strict=False)) | named
    _check_arguments(op, arguments)

    def reason(impl: str) -> str | None:
        like = tensors[0] if tensors else None
        return why_not(op, impl, where, dtype) or _beyond(op, impl, like, arguments)

    wanted = forced(op)
    chosen = wanted or _automatic(op, where, dtype)
    if wanted is None and reason(chosen):
        chosen = next(i for i in PREFERENCE.get(where, ("reference",)) if reason(i) is None)
    asked, notes = Asked(arguments, 0), OPS[op].notes
    return [Choice(i, reason(i), i == chosen, notes[i](asked) if i in notes else None) for i in NAMESPACE]


def serves(op: str, like: torch.Tensor) -> str:
    """The implementation of `op` for tensors like `like`, but for its limits on sizes."""
    return forced(op) or _automatic(op, like.device.type, like.dtype)


def warn_once(key: Any, message: str, stacklevel: int = 5) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, LinmuWarning, stacklevel=stacklevel)


def _warn_of_reference(op: str, device: str) -> None:
    if not torch.compiler.is_compiling() and (op, device) not in _warned:
        reasons = "; ".join(f"{i}: {why_not(op, i, device)}" for i in PREFERENCE.get(device, ()) if i != "reference")
        warn_once((op, device), f"linmu_ops.{op} runs the slow reference on {device} ({reasons})")


def _warn_of_inexact(op: str, impl: str, device: str) -> None:
    if device == "cuda" and (op, impl) in INEXACT and not torch.compiler.is_compiling():
        warn_once(("inexact", op, impl), f"linmu_ops.{op}: {impl} may be less exact than cuda: {INEXACT[op, impl]}")


def _warn_of_transform(op: str, what: str) -> None:
    slow = "makes one call per sample" if what == "vmap" else "runs the slow reference"
    warn_once((op, what), f"linmu_ops.{op}: {what} {slow}", 8)


def _within_limits(op: str, impl: str, like: torch.Tensor, args: tuple[Any, ...]) -> str:
    """`impl`, or the next in order where this call is beyond its limits."""
    arguments = dict(zip(_argument_names(op), args, strict=True))
    reason = _beyond(op, impl, like, arguments)
    if reason is None:
        return impl
    device = like.device.type
    order = PREFERENCE[device]
    for other in order[order.index(impl) + 1 :]:
        if not (why_not(op, other, device, like.dtype) or _beyond(op, other, like, arguments)):
            if not torch.compiler.is_compiling():
                warn_once((op, impl, reason), f"linmu_ops.{op}: {other} serves in place of {impl}: {reason}")
            return other
    return "reference"


def check_apart(op: str, *written: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError where what an op writes to lies in the memory of another of its arguments, which kernels read
    while they write. PyTorch's own ops refuse this, too. Within a graph or a transform tensors have no place yet."""
    if torch.compiler.is_compiling() or _transforms.active():
        return
    given = {name: t for name, t in tensors.items() if t is not None}
    # A decoded token's ops have up to 18 tensors: storages are asked for once, and hardly any is shared.
    storages = {name: t.untyped_storage()._cdata for name, t in given.items()}
    if len(set(storages.values())) == len(storages):
        return
    for name in written:
        for other, t in given.items():
            shared = other != name and storages[other] == storages.get(name)
            if shared and _overlap(given[name], t):
                raise ValueError(f"{op}: {name} must be in memory of its own, as it is written to, got that of {other}")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two views of one storage meet, from their first elements to their last."""
    ends = []
    for t in (a, b):
        if not t.numel():
            return False
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        ends.append((t.storage_offset() * t.itemsize, (t.storage_offset() + last + 1) * t.itemsize))
    return ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]


def mark_written(state: torch.Tensor) -> None:
    """Before an op that writes to `state`: let autograd know, as of PyTorch's own, lest a backward pass reads it."""
    if not torch.compiler.is_compiling() and not state.is_inference():
        torch.autograd.graph.increment_version(state)


def call(op: str, like: torch.Tensor, *args: Any) -> Any:
    """Run `op` through the implementation that serves tensors like `like`."""
    device = like.device.type
    impl = forced(op)
    if impl is None:
        impl = _automatic(op, device, like.dtype)
        if impl == "reference" and device != "meta":
            _warn_of_reference(op, device)
        elif impl in OPS[op].limits:
            impl = _within_limits(op, impl, like, args)
    else:
        reason = why_not(op, impl, device, like.dtype)
        if reason is None and impl in OPS[op].limits:
            reason = _beyond(op, impl, like, dict(zip(_argument_names(op), args, strict=True)))
        if reason is not None and device != "meta":
            raise RuntimeError(f"{op}: implementation {impl!r} is forced but cannot serve: {reason}")
    _warn_of_inexact(op, impl, device)
    kernel = getattr(getattr(torch.ops, NAMESPACE[impl]), op).default
    if torch.compiler.is_dynamo_compiling():
        return kernel(*args)
    if _transforms.active():
        return _transformed[kernel](*args)
    if not any(isinstance(a, torch.Tensor) and a.is_neg() for a in args):
        return kernel(*args)
    # PyTorch resolves negative views for ops that write nothing, and fails an assertion for those that do.
    plain = [a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args]
    out = kernel(*plain)
    for argument, given, used in zip(kernel._schema.arguments, args, plain, strict=True):
        if argument.is_write and given is not used:
            given.copy_(used)
    return out
