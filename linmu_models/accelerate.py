"""transformers' own linear-attention layers on our kernels: Mamba-2 and the gated delta rule, on a CPU first.

These layers call a few functions of their modeling file, by name. Each computes in plain PyTorch where no package of
CUDA kernels is installed. We put functions of the same signature in their place, and theirs back again. So we do with
the forwards of whole layers and of their norms (`mixers`), where they are the ones that we know.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import linmu_ops
from linmu_ops import _registry, compat

from .mixers import WIDEST, gate_then_norm, gated_delta, mamba2, norm_then_gate

Function = Callable[..., Any]
Owner = ModuleType | type
CONVOLUTION = ("causal_conv1d_fn", "causal_conv1d_update")
MAMBA2 = (
    *CONVOLUTION, "mamba2_chunk_scan", "mamba2_selective_state_update", "mamba2_split_conv1d_scan_combined"
)  # fmt: skip
DELTA = (*CONVOLUTION, "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
FAMILIES = {
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), MAMBA2),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_next"), DELTA),
}
# Per family: its linear layer and the norm of that, if it is one that we know.
CLASSES = {
    "bamba": ("BambaMixer", "BambaRMSNormGated"),
    "falcon_h1": ("FalconH1Mixer",),
    "granitemoehybrid": ("GraniteMoeHybridMambaLayer", "GraniteMoeHybridRMSNormGated"),
    "mamba2": ("Mamba2Mixer", "MambaRMSNormGated"),
    "nemotron_h": ("NemotronHMamba2Mixer", "NemotronHRMSNormGated"),
    "zamba2": ("Zamba2MambaMixer", "Zamba2RMSNormGated"),
    "qwen3_5": ("Qwen3_5GatedDeltaNet", "Qwen3_5RMSNormGated"),
    "qwen3_5_moe": ("Qwen3_5MoeGatedDeltaNet", "Qwen3_5MoeRMSNormGated"),
    "qwen3_next": ("Qwen3NextGatedDeltaNet", "Qwen3NextRMSNormGated"),
}
# What stands for a forward, by the digest of its source: another version of transformers may compute something else.
# Of those of 5.23 the cache has another name.
FORWARDS: dict[str, Function] = {
    "c215be341ddf": mamba2,
    "691f3ca98636": mamba2,
    "d0ddba7970a9": mamba2,
    "8274bd4cb696": mamba2,
    "08cf65a63ca5": gated_delta,
    "8f31ae7d35da": gated_delta,
    "d97f22719fb5": gated_delta,
    "177c5d3df989": gated_delta,
    "2ed3aa30edfb": gate_then_norm,
    "5a4bd64da7fd": norm_then_gate,
}


def accelerate_transformers(model: nn.Module | None = None) -> Accelerated:
    """Let transformers' linear layers run on `ssd_scan`, `gated_delta_scan`, their steps, and `causal_conv1d`.

    Prefill, chunked prefill, decoding and training give the same results to rounding. Caches, weights and modules stay
    transformers' own. Bamba, FalconH1, GraniteMoeHybrid, Mamba2, NemotronH, Zamba2; Qwen3-Next, Qwen3.5 and its MoE.

    It holds for all models of a family, in the whole process, until it is undone:

        accelerated = accelerate_transformers()     with accelerate_transformers(model):
        ...                                             model.generate(...)
        accelerated.undo()

    Args:
        model: only what the layers of this model call; every family if None.

    Returns:
        What undoes it: `undo()`, or the end of a `with` block.

    Raises:
        TypeError: model is no module. ValueError: it has no layer of these families. ImportError: the installed
        transformers has not the functions that we know.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"accelerate_transformers: model must be a torch.nn.Module, got {type(model).__name__}")
    names = list(FAMILIES) if model is None else families_of(model)
    if not names:
        raise ValueError(
            f"accelerate_transformers: model must have layers of {', '.join(FAMILIES)}, got {type(model).__name__}"
        )
    return Accelerated([place for family in names for place in _places(family)])


def families_of(model: nn.Module) -> list[str]:
    """The families whose modeling file one of the model's modules comes from, sorted."""
    modules = {type(m).__module__ for m in model.modules()}
    return [f for f in sorted(FAMILIES) if _path(f) in modules]


class Accelerated:
    """Functions of transformers that are ours until `undo()`."""

    def __init__(self, places: Iterable[tuple[Owner, str]]) -> None:
        self._places = list(places)
        for owner, name in self._places:
            _replace(owner, name)

    def undo(self) -> None:
        """Put transformers' own functions back, unless another call still needs ours. A second time does nothing."""
        places, self._places = self._places, []
        for owner, name in places:
            _restore(owner, name)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


# Per function that is replaced: theirs, and how many calls asked for ours.
_replaced: dict[tuple[str, str], tuple[Function, int]] = {}


def _key(owner: Owner, name: str) -> tuple[str, str]:
    return f"{owner.__module__}.{owner.__name__}" if isinstance(owner, type) else owner.__name__, name


def _places(family: str) -> list[tuple[Owner, str]]:
    """What is replaced in a family, and where."""
    module = _module(family)
    found: list[tuple[Owner, str]] = [(module, name) for name in FAMILIES[family]]
    for name in CLASSES[family]:
        owner = getattr(module, name)
        theirs, _ = _replaced.get(_key(owner, "forward"), (owner.forward, 0))
        if _digest(theirs) in FORWARDS:
            found.append((owner, "forward"))
        else:
            _registry.warn_once(
                ("accelerate_transformers", name),
                f"accelerate_transformers: {name}.forward is not the one that we know, so it stays, on our functions",
            )
    return found


@functools.cache
def _digest(forward: Function) -> str | None:
    """Of a function's source; None where it cannot be read."""
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _replace(owner: Owner, name: str) -> None:
    key = _key(owner, name)
    theirs, count = _replaced.get(key, (getattr(owner, name), 0))
    _replaced[key] = theirs, count + 1
    ours = FORWARDS[_digest(theirs) or ""] if isinstance(owner, type) else OURS[name]

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    setattr(owner, name, function)


def _restore(owner: Owner, name: str) -> None:
    key = _key(owner, name)
    theirs, count = _replaced.pop(key)
    if count > 1:
        _replaced[key] = theirs, count - 1
    else:
        setattr(owner, name, theirs)


def _path(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _module(family: str) -> ModuleType:
    try:
        module = sys.modules.get(_path(family)) or importlib.import_module(_path(family))
    except ImportError:
        module = ModuleType(_path(family))
    missing = [name for name in (*FAMILIES[family], *CLASSES[family]) if not hasattr(module, name)]
    if missing:
        import transformers

        raise ImportError(
            f"accelerate_transformers: transformers must be 5.24 or like it, got {transformers.__version__}, "
            f"whose {family} has no {', '.join(missing)}"
        )
    return module


def _sums(like: Tensor) -> torch.dtype:
    """What states are kept in, of tensors like this one."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _before(state: Tensor | None, *inputs: Tensor | None) -> Tensor | None:
    """A state that a backward pass may read: the cache that it comes from is written to in place."""
    return state.clone() if state is not None and _needs_gradient(state, *inputs) else state


def _segments(given: dict[str, Any], batch: int, length: int, like: Tensor) -> Tensor | None:
    """seq_idx of packed rows, as one package of kernels calls it, or of the bounds that others take. A layer hands the
    latter on to its convolution under the model's name for them, `cu_seq_lens_q`.

    A row of a cache has inputs of the convolution before its tokens. They go with the first sequence.
    """
    if (numbers := given.get("seq_idx")) is not None:
        before = length - numbers.shape[-1]
        if numbers.dim() == 2 and before > 0 and numbers.shape[1]:
            numbers = torch.cat([numbers[:, :1].expand(-1, before), numbers], 1)
        return compat.numbered(numbers)
    bounds = next((given[name] for name in ("cu_seqlens", "cu_seq_lens_q") if given.get(name) is not None), None)
    if bounds is None:
        return None
    if batch != 1:
        raise ValueError(f"accelerate_transformers: hidden_states must be one row with cu_seq_lens_q, got {batch}")
    at = torch.arange(length, device=like.device) + (bounds[-1] - length)
    return torch.searchsorted(bounds[1:].to(at.dtype), at, right=True).int()[None]


def _convolve(
    theirs: Function, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, **given: Any,
) -> Tensor:  # fmt: skip
    batch, _, length = hidden_states.shape
    segments = _segments(given, batch, length, hidden_states)
    if activation not in (None, "silu", "swish") or weight.shape[1] > WIDEST:
        told = {} if segments is None else {"seq_idx": segments}
        out: Tensor = theirs(hidden_states, weight, bias, activation=activation, **given | told)
        return out
    y = compat.causal_conv1d_fn(hidden_states, weight, bias, segments, activation=activation)
    assert isinstance(y, Tensor)
    return y


def _convolve_update(
    theirs: Function, hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, **given: Any,
) -> Tensor:  # fmt: skip
    kept = weight.shape[1] - 1
    short = conv_state.shape[2] < kept or not 1 <= kept < WIDEST
    if activation not in (None, "silu", "swish") or short or _needs_gradient(hidden_states, weight, bias):
        out: Tensor = theirs(hidden_states, conv_state, weight, bias, activation=activation, **given)
        return out
    x, state = (t.transpose(1, 2) for t in (hidden_states, conv_state))
    y = linmu_ops.causal_conv1d(
        x, weight, bias, activation=activation and "silu", initial_state=state[:, -kept:].to(x.dtype)
    )
    assert isinstance(y, Tensor)
    conv_state.copy_(torch.cat([conv_state, hidden_states.to(conv_state.dtype)], -1)[..., -conv_state.shape[2] :])
    return y.transpose(1, 2)


def _scan(
    theirs: Function, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
    D: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
    **given: Any,
) -> Any:  # fmt: skip
    batch, length, *_ = hidden_states.shape
    return compat.mamba_chunk_scan_combined(
        hidden_states, dt, A, B, C, chunk_size, D=D, z=given.get("z"), dt_bias=dt_bias,
        initial_states=_before(initial_states, hidden_states, dt, A, B, C, D, dt_bias),
        seq_idx=_segments(given, batch, length, hidden_states), dt_softplus=dt_softplus, dt_limit=dt_limit,
        return_final_states=return_final_states,
    )  # fmt: skip


def _state_update(
    theirs: Function, state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, z: Tensor | None = None,
    **given: Any,
) -> Any:  # fmt: skip
    if _needs_gradient(state, hidden_states, dt, A, B, C, D, z, dt_bias):
        return theirs(
            state, hidden_states, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, **given
        )  # fmt: skip
    return compat.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _delta_scan(
    theirs: Function, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    batch, length, *_ = query.shape
    dtype = query.dtype
    initial_state = _before(initial_state, query, key, value, g, beta)
    out = linmu_ops.gated_delta_scan(
        query, key.to(dtype), value.to(dtype), g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        initial_state=None if initial_state is None else initial_state.to(_sums(query)),
        seq_idx=_segments(given, batch, length, query), return_final_state=output_final_state,
    )  # fmt: skip
    return out if isinstance(out, tuple) else (out, None)


def _delta_step(
    theirs: Function, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if query.shape[1] != 1 or initial_state is None or _needs_gradient(query, key, value, g, beta, initial_state):
        return _delta_scan(
            theirs, query, key, value, g, beta, initial_state=initial_state, output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **given,
        )  # fmt: skip
    # Theirs leaves the state as it was, and a cache may hold it for later.
    state = initial_state.to(_sums(query), copy=True, memory_format=torch.contiguous_format)
    q, k, v, g, beta = (t[:, 0] for t in (query, key, value, g, beta))
    y = linmu_ops.gated_delta_step(
        state, q, k.to(q.dtype), v.to(q.dtype), g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel
    )
    return y[:, None], state if output_final_state else None


def _not_as_one(theirs: Function, *args: Any, **given: Any) -> None:
    """A layer in training asks for its convolution, scan and norm as one kernel first. Without a package, theirs
    refuses packed rows there; None lets the layer go on to the functions above."""


OURS: dict[str, Function] = {
    "causal_conv1d_fn": _convolve,
    "causal_conv1d_update": _convolve_update,
    "mamba2_chunk_scan": _scan,
    "mamba2_selective_state_update": _state_update,
    "mamba2_split_conv1d_scan_combined": _not_as_one,
    "torch_chunk_gated_delta_rule": _delta_scan,
    "torch_recurrent_gated_delta_rule": _delta_step,
}
