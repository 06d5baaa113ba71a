"""Taking tokens back from a state that cannot forget them: their inputs are kept, and read again up to the place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

TAKEN_BACK = 128  # tokens that can be taken back at least, of those read since recording began; twice as many at most

Inputs = dict[str, Tensor]  # (B, n, ...) each, hidden_states among them
Run = Callable[[Inputs, bool], Tensor]


class HoldsState(Protocol):
    """A cache layer whose state is of constant size."""

    def value(self) -> dict[str, Tensor]:
        """Copies of the tensors of the state; none before the first token."""

    def put(self, value: Mapping[str, Tensor]) -> None:
        """Make that the state, by copying."""


class Record:
    """What one layer needs to take tokens back: a state, and the inputs of the tokens read since.

    crop cuts the inputs. The next call reads what is left of them again, from that state on, before its own: from then
    on they stay.

    Attributes:
        base: the state before `calls`.
        calls: inputs of the calls since then, in order.
        behind: tokens were taken back; the layer's state is that of more tokens than there are.
    """

    def __init__(self) -> None:
        self.base: dict[str, Tensor] = {}
        self.calls: list[Inputs] = []
        self.behind = False
        self._head: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many can be taken back now."""
        return sum(_length(call) for call in self.calls)

    def begin(self, layer: HoldsState, run: Run, given: Inputs, whole: int = 0) -> Inputs:
        """Prepare a call. `run(inputs, first)` reads tokens into the layer's state and gives its outputs (B, n, D).

        whole: so many of the first tokens, in which there are visual blocks, cannot be read in parts; `first` tells
            that these are among the inputs.

        Returns:
            The last tokens of `given`, which the caller runs: none where all have been run. `end` joins the outputs.
        """
        self.settle(layer, run)
        length, self._head = _length(given), None
        cut = max(whole, length - TAKEN_BACK) if length > 2 * TAKEN_BACK else whole
        if cut:
            self.forget()
            self._head = run(_part(given, 0, cut), True)
            given = _part(given, cut, length)
        elif self.tokens + length > 2 * TAKEN_BACK:
            self._advance(layer, run, self.tokens + length - TAKEN_BACK)
        if not self.calls:
            self.base = layer.value()
        if cut < length:
            # Copies: a part of a long prompt would keep all of it alive.
            self.calls.append({name: t.detach().clone() for name, t in given.items()})
        return given

    def end(self, out: Tensor | None) -> Tensor:
        """All outputs of a call, of those of what `begin` returned."""
        parts = [t for t in (self._head, out) if t is not None]
        self._head = None
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def settle(self, layer: HoldsState, run: Run) -> None:
        """Bring the layer's state to where tokens were taken back to."""
        if self.behind:
            layer.put(self.base)
            self._run(run, _joined(self.calls))
            self.forget()

    def crop(self, layer: HoldsState, tokens: int) -> None:
        """Take so many tokens back; 0 keeps all, for good."""
        left = self.tokens - tokens
        if tokens and left == 0:
            layer.put(self.base)
        if left == 0 or (tokens == 0 and not self.behind):
            self.forget()
        elif tokens:
            self.calls, self.behind = [_part(_joined(self.calls), 0, left)], True

    def forget(self) -> None:
        """Keep all that was read, for good."""
        self.base, self.calls, self.behind = {}, [], False

    def map(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of all that is kept."""
        self.base = {name: rows(t) for name, t in self.base.items()}
        self.calls = [{name: rows(t) for name, t in call.items()} for call in self.calls]

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [t for kept in (self.base, *self.calls) for t in kept.values()]

    def _advance(self, layer: HoldsState, run: Run, tokens: int) -> None:
        """Let the oldest tokens stay for good."""
        if tokens >= self.tokens:
            self.forget()
            return
        now, calls = layer.value(), _joined(self.calls)
        layer.put(self.base)
        self._run(run, _part(calls, 0, tokens))
        self.base, self.calls = layer.value(), [_part(calls, tokens, _length(calls))]
        layer.put(now)

    @torch.no_grad()
    def _run(self, run: Run, inputs: Inputs) -> None:
        run(inputs, False)


def _length(inputs: Inputs) -> int:
    return inputs["hidden_states"].shape[1]


def _part(inputs: Inputs, first: int, last: int) -> Inputs:
    return {name: t[:, first:last] for name, t in inputs.items()}


def _joined(calls: list[Inputs]) -> Inputs:
    """As of one call. A mask, the one input that a call may lack, is of ones where it does."""
    names = dict.fromkeys(name for call in calls for name in call)

    def of(call: Inputs, name: str) -> Tensor:
        if name in call:
            return call[name]
        like = next(other[name] for other in calls if name in other)
        return like.new_ones(call["hidden_states"].shape[:2])

    return {name: torch.cat([of(call, name) for call in calls], dim=1) for name in names}


def mixers_of(layer: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer that have a layer of the cache."""
    return [child for child in layer.children() if hasattr(child, "layer_idx")]


def before_mixer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a layer that is linear in the teacher: keeps its inputs where its cache layer records."""
    layer = _recording(module, kwargs)
    if layer is None:
        return None
    if kwargs.get("seq_idx") is not None:  # several sequences, after which no cache goes on
        layer.record.forget()
        return None
    hidden, mask = kwargs["hidden_states"], kwargs.get("attention_mask")
    given = {"hidden_states": hidden}
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    if mask is not None:
        rest["attention_mask"] = None
    if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
        given["attention_mask"] = mask

    def run(inputs: Inputs, first: bool) -> Tensor:
        out: Tensor = module.forward(**{**rest, **inputs})
        return out

    return args, {**rest, **layer.record.begin(layer, run, given)}


def after_mixer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
    """The forward hook that goes with `before_mixer`."""
    layer = _recording(module, kwargs)
    joined: Tensor | None = None if layer is None else layer.record.end(out)
    return joined


def _recording(module: Any, kwargs: Mapping[str, Any]) -> Any:
    """The layer of the cache, where it records what this module is given."""
    for name in ("cache", "past_key_values", "cache_params"):
        layers = getattr(kwargs.get(name), "layers", ())
        if module.layer_idx < len(layers) and "hidden_states" in kwargs:
            layer = layers[module.layer_idx]
            return None if getattr(layer, "record", None) is None else layer
    return None
