"""The options of the blocks, and the presets that set them.

Each option has a reason, and its text names it: an equation, algorithm or table of the paper, or a measured row as
`table/row`. The tables are in `bench/reports`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

Triple = tuple[int, int, int]

LONGEST = 2**20  # tokens of a window, along one dimension
WIDEST = 2**12  # channels of a head's feature map
# Beyond these, float32 has no finite step size or weight.
SHORTEST = 1e-4  # decay
SCALES = (1e-4, 1e4)


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
        self._require("initial_decay", decays is None or all(SHORTEST <= d < 1 for d in decays), f"in [{SHORTEST}, 1)")
        low, high = SCALES
        self._require("initial_scale", scale is None or low <= scale <= high, f"in [{low}, {high}]")


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
        branches: "both", "flex" (the scan alone) or "swin" (the windows alone, which give 0 on text). Table 4;
            `branches/flex`, `branches/swin`.
        literal: do what the paper states. g and lambda are per token (Eq. 3, Algorithm 1), the reverse scan has B and C
            of its own (Eq. 2), and LayerNorm follows the mix (Algorithm 1). Off: g is per head, lambda is one number, B
            and C are shared, and there is no norm.

    Flex-MA, the scan
        reverse: run the reverse scan over visual tokens (Eq. 2). Off: the scan is causal everywhere; `open/no-reverse`.
        major_scan: visit visual tokens in the order of the layer: t,y,x . t,x,y . y,x,t . x,y,t for the layer's index
            mod 4 (section 3.1.1). Off: visit them in place; `open/no-major-scan`.
        initial_decay: how much of the state is left after a token, before training; in [0.0001, 1). It is exp(dt A)
            with A = -1, so the scan starts as an exponential average. A pair spreads the memory length 1/(1 - decay)
            geometrically over the heads. None: Mamba-2's start, the paper's "standard initialization".
            `open/decay-0.9999`, `open/decay-plain`.
        initial_scale: start of a learned scale of C . B per head, in units of the softmax scale; `needles/scale-3`.
            None: no scale at all, C is W_Q z as in Eq. 4.
        head_norm: apply RMSNorm to y per head, before the output projection; `open/no-head-norm`.
        z_gate: multiply y by silu(W_z z + b), which starts at 1; `open/no-z-gate`.

    Local-Swin, the windows
        text_window: text attends causally to the last this many tokens of its row, itself included. 0: text has no
            attention, as in the paper; `open/text-window-0`.
        window: size of a video's windows in tokens (T, H, W), clamped to the video (section 2); `open/window-8-4-8`.
            Layers with an odd index shift their windows by half.
        image_window: size of an image's windows (a block with T = 1); None for `window`. A page of 4 x 8 tokens, all of
            it in one window, is read as the teacher reads it; `breaking/base`.
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
    """Options of `ExactMMATE`: exact near a token, linear far from it. JSON-able.

    Near
        text_window: text attends causally to the last this many tokens of its row, itself included. >= 1;
            `open/text-window-64`.
        sink_tokens: the first this many tokens of a row are in every later token's window, as far as they are text;
            `needles/no-sinks`. (Attention sinks: Xiao et al., arXiv:2309.17453.)
        kept_tokens: of what leaves the windows, so many tokens stay exact for each key/value head: those with the
            largest step sizes; `kept/kept-0`. 0: none.
        window: size of a video's windows in tokens (T, H, W), clamped to the video; `needles/window-8-4-4`. Layers with
            an odd index shift their windows by half.
        image_window: size of an image's windows (a block with T = 1); None for `window`. A page of 4 x 8 tokens, all of
            it in one window, is read as the teacher reads it; `breaking/exact-normalizer`.

    Far
        far: what holds it: "scan", or "delta", the gated delta rule (arXiv:2412.06464), whose state overwrites what it
            holds under a key; `delta/delta-kept-0`, which finds fewer needles than `scan-kept-0` beside it.
        feature_dim: channels of the learned maps of B and C, and so the size N of the scan's state; 0 for the head
            size. The maps start as the identity and its negative in turns; `defaults/feature-dim-128`. (Hedgehog, Zhang
            et al., arXiv:2402.04347, one sign of theirs.)
        initial_decay: how much of the state is left after a token, before training; in [0.0001, 1). A pair spreads the
            memory length 1/(1 - decay) geometrically over the heads; `needles/decay-0.999`.
        initial_scale: start of the learned scale of C . B per head, in units of the softmax scale; with the scan alone;
            `recipe/exact-scale-8`.
        z_gate: multiply the far mean by silu(W_z z + b), which starts at 1; `needles/no-z-gate`.
    """

    text_window: int = 256
    sink_tokens: int = 4
    kept_tokens: int = 128
    window: Triple = (8, 8, 8)
    image_window: Triple | None = (1, 16, 16)
    far: str = "scan"
    feature_dim: int = 0
    initial_decay: float | tuple[float, float] = 0.9998
    initial_scale: float = 8.0
    z_gate: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        self._require("far", self.far in ("scan", "delta"), "scan or delta")
        self._check_within("text_window", 1, LONGEST)
        self._check_within("sink_tokens", 0, LONGEST)
        self._check_within("kept_tokens", 0, LONGEST)
        self._check_within("feature_dim", 0, WIDEST)
        self._check_shared()
        plain = type(self).__dataclass_fields__["initial_scale"].default
        self._require("initial_scale", self.far == "scan" or self.initial_scale == plain, 'left out with far="delta"')


PAPER = MMATEConfig()
"""The paper's structure, with changes that let it train in few steps. It departs from the paper in this: g is per head,
lambda is one number, B and C are shared, there is no LayerNorm, C . B has a learned scale, and memories start long.
`LITERAL` has none of these changes."""

LITERAL = MMATEConfig(literal=True, initial_decay=None, initial_scale=None)
"""What the paper states, to the letter. `linmu distill` trains it with the absolute L_hid of Eq. 6, uncalibrated."""

EXACT = ExactConfig()
"""A causal decoder's attention where nothing lies beyond a token's window. The scan stands for what does. The tables in
`bench/reports` chose these options for conversion."""

PRESETS: dict[str, MMATEConfig | ExactConfig] = {"exact": EXACT, "paper": PAPER, "literal": LITERAL}
