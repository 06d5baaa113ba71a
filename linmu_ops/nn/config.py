"""The options of the blocks, and the presets that set them.

An option stays only if something justifies it. Each names in its text the equation or section of the paper that it is
of, or the table and row that measured it: `table/row`, as in `bench/reports`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any

Triple = tuple[int, int, int]

LONGEST = 2**20  # tokens of a window, along one dimension
WIDEST = 2**12  # channels of a head's feature map


class _Options:
    """Checks the types of a dataclass's fields; JSON and command lines give others."""

    def _check_types(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON gives a tuple back
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            kind = str(field.type).replace("Triple", "tuple[int, int, int]")
            self._require(field.name, _is_of(kind, value), f"of type {kind}")

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            value: Any = getattr(self, name)
            raise ValueError(f"{type(self).__name__}: {name} must be {rule}, got {value!r}")

    def _check_within(self, name: str, low: int, high: int) -> None:
        self._require(name, low <= getattr(self, name) <= high, f"in [{low}, {high}]")

    def _check_shared(self) -> None:
        """What both blocks have."""
        for name in ("window", "image_window"):
            size = getattr(self, name)
            fits = size is None or (min(size) >= 1 and max(size) <= LONGEST)
            self._require(name, fits, f"three sizes in [1, {LONGEST}]")
        decays, scale = decay_range(getattr(self, "initial_decay")), getattr(self, "initial_scale")  # noqa: B009
        self._require("initial_decay", decays is None or all(0 < d < 1 for d in decays), "in (0, 1)")
        self._require("initial_scale", scale is None or (isfinite(scale) and scale > 0), "finite and > 0")


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value is of a field's type."""
    if "|" in kind:
        return any(_is_of(part.strip(), value) for part in kind.split("|"))
    if kind.startswith("tuple["):
        parts = kind[len("tuple[") : -1].split(", ")
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, parts, value))
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    types: dict[str, type] = {"int": Integral, "float": Real, "str": str, "None": type(None)}
    return isinstance(value, types[kind])


def decay_range(initial_decay: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """`initial_decay` as a pair; None for Mamba-2's own start."""
    return (initial_decay, initial_decay) if isinstance(initial_decay, Real) else initial_decay  # type: ignore[return-value]


@dataclass(frozen=True)
class MMATEConfig(_Options):
    """Options of `MMATE`, the paper's block (LinMU, arXiv:2601.01322). JSON-able.

    Branches
        branches: "both", "flex" (the scan alone) or "swin" (the windows alone, 0 on text). Table 4; `branches/flex`,
            `branches/swin`.
        literal: what the paper states, where the default departs from it: g and lambda for each token (Eq. 3,
            Algorithm 1), B and C of their own for the reverse scan (Eq. 2), LayerNorm after the mix (Algorithm 1).
            Off: g for each head, one lambda, B and C shared, no norm.

    Flex-MA, the scan
        reverse: the reverse scan over visual tokens (Eq. 2). Off: a causal scan everywhere; `open/no-reverse`.
        major_scan: visit visual tokens in the layer's order, t,y,x . t,x,y . y,x,t . x,y,t (section 3.1.1). Off: in
            place; `open/no-major-scan`.
        initial_decay: decay of the state per token at the start, in (0, 1): exp(dt A) with A = -1, so that the scan is
            an exponential average. A pair spreads the memory length 1/(1 - decay) geometrically over the heads. None:
            Mamba-2's start, the paper's "standard initialization". `open/decay-0.9999`,
            `open/decay-plain`.
        initial_scale: start of a learned scale of C . B per head, in units of the softmax scale; `needles/scale-3`.
            None: no scale at all, C is W_Q z as in Eq. 4.
        head_norm: RMSNorm of y per head, before the output projection; `open/no-head-norm`.
        z_gate: multiply y by silu(W_z z + b), 1 at the start; `open/no-z-gate`.

    Local-Swin, the windows
        text_window: causal softmax attention of text over the last this many tokens of its row, itself included; 0 for
            none, as in the paper; `open/text-window-0`.
        window: window of a video block in tokens (T, H, W), clamped to the block (section 2); `open/window-8-4-8`.
            Layers with an odd index shift their windows by half.
        image_window: window of a block with T = 1; None for `window`. Section 2 gives none for images.
    """

    branches: str = "both"
    literal: bool = False
    reverse: bool = True
    major_scan: bool = True
    initial_decay: float | tuple[float, float] | None = 0.985
    initial_scale: float | None = 3.0
    head_norm: bool = False
    z_gate: bool = False
    text_window: int = 0
    window: Triple = (16, 4, 4)
    image_window: Triple | None = (1, 16, 16)

    def __post_init__(self) -> None:
        self._check_types()
        self._require("branches", self.branches in ("both", "flex", "swin"), "one of both, flex, swin")
        self._check_within("text_window", 0, LONGEST)
        self._check_shared()
        plain = MMATEConfig.__dataclass_fields__
        idle = {
            "swin": ("reverse", "major_scan", "initial_decay", "initial_scale", "head_norm", "z_gate"),
            "flex": ("text_window", "window", "image_window"),
        }.get(self.branches, ())
        for name in idle:
            self._require(name, getattr(self, name) == plain[name].default, f'left out with branches="{self.branches}"')

    @property
    def flex(self) -> bool:
        """Whether there is a scan."""
        return self.branches != "swin"

    @property
    def swin(self) -> bool:
        """Whether there are windows."""
        return self.branches != "flex"


@dataclass(frozen=True)
class ExactConfig(_Options):
    """Options of `ExactMMATE`: near exact, far linear. JSON-able.

    Near
        text_window: causal softmax attention of text over the last this many tokens of its row, itself included. >= 1;
            `open/text-window-64`.
        sink_tokens: the first this many tokens of a row, as far as they are text, are in every later token's window;
            `needles/no-sinks`. (Attention sinks: Xiao et al., arXiv:2309.17453.)
        window: window of a video block in tokens (T, H, W), clamped to the block; `needles/window-8-4-4`. Layers with
            an odd index shift their windows by half.
        image_window: window of a block with T = 1; None for `window`. Section 2 of the paper gives none for images.

    Far
        feature_dim: channels of the learned maps of B and C, the size N of the scan's state; 0 for the head size. The
            maps start as the identity and its negative in turns; `defaults/feature-dim-128`. (Hedgehog, Zhang et al.,
            arXiv:2402.04347, one sign of theirs.)
        reverse: the reverse scan over visual tokens (Eq. 2); `open/no-reverse`.
        initial_decay: decay of the state per token at the start, in (0, 1); a pair spreads the memory length
            1/(1 - decay) geometrically over the heads; `needles/decay-0.999`.
        initial_scale: start of the learned scale of C . B per head, in units of the softmax scale;
            `recipe/exact-scale-8`.
        z_gate: multiply the far mean by silu(W_z z + b), 1 at the start; `needles/no-z-gate`.
    """

    text_window: int = 256
    sink_tokens: int = 4
    window: Triple = (8, 8, 8)
    image_window: Triple | None = (1, 16, 16)
    feature_dim: int = 0
    reverse: bool = True
    initial_decay: float | tuple[float, float] = 0.9998
    initial_scale: float = 8.0
    z_gate: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        self._check_within("text_window", 1, LONGEST)
        self._check_within("sink_tokens", 0, LONGEST)
        self._check_within("feature_dim", 0, WIDEST)
        self._check_shared()


PAPER = MMATEConfig()
"""The paper's structure, started so that it trains in few steps. It departs from the paper's letter: g for each head,
one lambda, shared B and C, no LayerNorm, a learned scale of C . B, long memories at the start. `LITERAL` does not."""

LITERAL = MMATEConfig(literal=True, initial_decay=None, initial_scale=None)
"""What the paper states, to the letter. It is trained with the absolute L_hid of Eq. 6, and is not calibrated."""

EXACT = ExactConfig()
"""A causal decoder's attention, exactly, where all that it looks at lies within a token's window; the scan stands for
the rest. What the tables in `bench/reports` chose for conversion."""

PRESETS: dict[str, MMATEConfig | ExactConfig] = {"exact": EXACT, "paper": PAPER, "literal": LITERAL}
