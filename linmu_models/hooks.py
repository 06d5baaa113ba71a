"""What goes into the attention (or M-MATE) modules of a decoder, and what comes out of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def has_attention(layer: nn.Module) -> bool:
    """Whether a decoder layer has attention, or a block in its place; else it is linear in the teacher already."""
    return isinstance(getattr(layer, "self_attn", None), nn.Module)


def decoder_of(model: Any) -> Any:
    """The part of a model that has the decoder's layers. In some families `get_decoder` gives it with its head."""
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers"):
        inner = (getattr(decoder, name, None) for name in ("model", "decoder"))
        found = next((module for module in inner if isinstance(module, nn.Module) and module is not decoder), None)
        if found is None:
            break
        decoder = found
    return decoder


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Decoder layer -> its attention (or M-MATE) module, in order. Hybrids have layers without."""
    return {i: layer.self_attn for i, layer in enumerate(decoder_of(model).layers) if has_attention(layer)}


def rotary_pair(rotary: Any) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of rotary embeddings; some families give them as complex numbers, of pairs of channels."""
    if isinstance(rotary, Tensor) and torch.is_complex(rotary):
        return rotary.real.repeat_interleave(2, dim=-1), rotary.imag.repeat_interleave(2, dim=-1)
    given: tuple[Tensor, Tensor] | None = rotary
    return given


@contextlib.contextmanager
def _removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that last as long as the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def record_outputs(
    modules: Sequence[nn.Module], part: Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Collect what each module returns, `(B, L, D)`, or what `part` gives of it, while the context is open.

    An attention module returns (output, weights), a mixer may return the output alone. Recomputation in the backward
    pass happens outside the context and is not recorded.
    """
    outputs: list[Any] = [None] * len(modules)  # until each has run

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            whole = output if isinstance(output, Tensor) else output[0]
            outputs[index] = whole if part is None else part(whole)

        return hook

    # The decoder passes hidden_states by keyword; a hook without kwargs sees no inputs.
    handles = [m.register_forward_hook(keep(i), with_kwargs=True) for i, m in enumerate(modules)]
    with _removed(handles):
        yield outputs


@functools.cache
def _forward_names(module_class: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has an input of that name."""
    kind: Any = type(module)
    return name in _forward_names(kind)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """All that a module's forward is given, by name."""
    kind: Any = type(module)
    return {**dict(zip(_forward_names(kind), args, strict=False)), **kwargs} if args else kwargs


def tokens_of(inputs: Mapping[str, Any]) -> Any:
    """The embeddings of a call's tokens, or their ids; None where it has neither."""
    return inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]


@contextlib.contextmanager
def record_inputs(
    modules: Sequence[nn.Module], part: Callable[[Tensor], Tensor] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Collect the tensors that each attention module is given by name, or what `part` gives of each, while the context
    is open: `hidden_states` `(B, L, D)`, and what its layer's rotary embedding needs. Its mask is left out."""
    inputs: list[dict[str, Any]] = [{} for _ in modules]

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, kwargs: Any) -> None:
            inputs[index] = {name: kwargs[name] for name in ("hidden_states", "position_embeddings") if name in kwargs}
            if "position_embeddings" in kwargs:
                inputs[index]["position_embeddings"] = rotary_pair(kwargs["position_embeddings"])
            if part is not None:
                pair = inputs[index].pop("position_embeddings", None)
                inputs[index] = {name: part(value) for name, value in inputs[index].items()}
                if pair is not None:
                    inputs[index]["position_embeddings"] = (part(pair[0]), part(pair[1]))

        return hook

    handles = [m.register_forward_pre_hook(keep(i), with_kwargs=True) for i, m in enumerate(modules)]
    with _removed(handles):
        yield inputs


@contextlib.contextmanager
def replace_inputs(modules: Sequence[nn.Module], inputs: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """While the context is open, give each module these `hidden_states` `(B, L, D)` in place of its own."""

    def put(states: Tensor) -> Callable[..., Any]:
        return lambda _module, args, kwargs: (
            args,
            {**kwargs, "hidden_states": states.to(kwargs["hidden_states"].dtype)},
        )

    handles = [
        m.register_forward_pre_hook(put(x["hidden_states"]), with_kwargs=True)
        for m, x in zip(modules, inputs, strict=True)
    ]
    with _removed(handles):
        yield
