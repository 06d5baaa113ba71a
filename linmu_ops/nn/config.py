"""Every choice of the M-MATE block that is not fixed by the attention layer it replaces."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any

CHOICES = {
    "reverse_projections": ("shared", "separate"),
    "feature_map": ("none", "relu2", "hedgehog"),
    "gate": ("head", "token"),
    "mix": ("scalar", "channel", "token", "softmax"),
    "norm": ("none", "rms", "layer"),
    "wrap": ("join", "mask"),
}
# Beyond any sequence and any head: what is larger is a slip, and would end in the words of an allocator.
LONGEST = 2**20
WIDEST = 4096


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value is of a field's type; JSON and command lines give others."""
    if "|" in kind:
        return any(_is_of(part.strip(), value) for part in kind.split("|"))
    if kind.startswith("tuple["):
        parts = kind[len("tuple[") : -1].split(", ")
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, parts, value))
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    types: dict[str, type] = {"int": Integral, "float": Real, "str": str, "None": type(None)}
    return isinstance(value, types[kind])


@dataclass(frozen=True)
class MMATEConfig:
    """Options of `MMATE`, `FlexMA` and `LocalSwin`. JSON-able: `MMATEConfig(**json.loads(json.dumps(asdict(c)))) == c`.

    Sections and equations are those of LinMU, arXiv:2601.01322; "open" marks what the paper leaves open.

    Branches
        flex: Flex-MA, the scan (3.1). Off: `out = Norm(y_swin)`, 0 on text (Table 4, row 3).
        swin: Local-Swin, the window attention (3.1). Off: `out = Norm(y_flex)` (Table 4, row 2).

    Flex-MA
        rotary: rotate B and C by the layer's position embeddings, so that C_i . B_j is the teacher's q_i . k_j (open).
        rotary_interleaved: the pairs that rotate together are channels (0, 1), (2, 3), ... instead of (0, R/2), ...;
            for both branches. R, the last size of cos, may be smaller than the head: the rest is not rotated.
        feature_map: of B and C after their rotation, makes C . B fall off faster between keys that are alike, as
            softmax does (beyond the paper): "relu2", relu(.)^2 of each channel; "hedgehog", softmax over the channels
            of a learned linear map per head, the identity at first (Zhang et al., arXiv:2402.04347, one sign of
            theirs); it needs head_norm or normalizer.
        feature_dim: channels of hedgehog's maps, the size N of the scan's state; 0 for the head size. The maps start as
            the identity and its negative in turns, so that twice the head size is the paper's softmax of both signs.
        reverse: the reverse scan over visual tokens (Eq. 2). Off: a causal scan everywhere.
        reverse_projections: "shared" B and C for both directions, or "separate" ones for the reverse scan, the
            tildes of Eq. 2. Step size and decay are separate either way.
        gate: g of Eq. 3 from one learned logit per "head", or per "token" and head from a linear map of the input.
        initial_gate: g at the start, in (0, 1) (the paper says "identity"; open).
        major_scan: visit visual tokens in the order of the layer, t,y,x . t,x,y . y,x,t . x,y,t (3.1.1). Off: in place.
        initial_decay: decay of the state per token at the start, in (0, 1); exp(dt A) with A = -1, so that the scan
            is an exponential average. A pair spreads the memory length 1/(1 - decay) geometrically over the heads
            (the paper says "standard initialization"; open).
        initial_scale: initial value of the learned scale of C . B per head, in units of the attention's own scale
            1/sqrt(head size) (open).
        conv_width: taps of a causal depthwise convolution of [x, B, C] along the visiting order, 2 to 8, starting as
            the identity; 0 for none (open).
        z_gate: multiply y by silu(W_z z + b), starting at 1 (open; "over 90 % of parameters reused" speaks against).
        head_norm: RMSNorm of y per head, before the output projection (open).
        skip: add D x to y, D per head, starting at 0 (open).
        normalizer: divide y by what the same scans make of X = 1, so that it is a mean of X, weighted by C . B and the
            step sizes, as attention's is (beyond the paper; of linear attention, Katharopoulos et al.,
            arXiv:2006.16236); it needs a feature_map. With mix="softmax", the log of that sum stands in for log n.

    Local-Swin
        window: window of a video block in tokens (T, H, W); clamped to the block (section 2: 16 x 4 x 4).
        image_window: window of a block with T = 1; None for the same as `window` (open).
        shift_alternate: layers with an odd layer_idx shift their windows by half a window (section 2).
        wrap: windows that wrap around after a shift "join" the edges they cover (Fig. 4), or "mask" them apart (Swin).
        causal_windows: within its window a token attends to no later one, as in a causal teacher (beyond the paper).
        relative_bias: learned bias per head and relative position, starting at 0; needs image_window=None (open).
        text_window: causal softmax attention of text tokens over the last this many tokens of their row, themselves
            included; 0 for none. Linear in length, a cache of this many keys in decoding (beyond the paper).
        sink_tokens: the first this many tokens of a row, as far as they are text, are in every later token's window;
            needs mix="softmax" and text_window (beyond the paper; attention sinks: Xiao et al., arXiv:2309.17453).

    Fusion (Algorithm 1)
        mix: lambda as one learned logit ("scalar"), one per model channel ("channel"), or per "token" from a linear
            map of the input. "softmax" (beyond the paper): per token and head, before the output projection, with
            1 - lambda the share of a softmax over all tokens that falls to those in the window: sigmoid of the log
            of the mass of their scores, less that of the n tokens before them, log n plus a linear map of the input.
            Where there are none, a block made from attention is that attention, exactly.
        initial_mix: lambda at the start, in (0, 1); not for "softmax", which `MMATE.calibrate` sets.
        norm: final norm: "layer" (Algorithm 1), "rms", or "none"; each with a learned scale per channel that
            `MMATE.calibrate` sets from the teacher.
        norm_eps: added to the variance in both norms.
    """

    flex: bool = True
    swin: bool = True
    rotary: bool = True
    rotary_interleaved: bool = False
    feature_map: str = "none"
    feature_dim: int = 0
    reverse: bool = True
    reverse_projections: str = "shared"
    gate: str = "head"
    initial_gate: float = 0.5
    major_scan: bool = True
    initial_decay: float | tuple[float, float] = 0.985
    initial_scale: float = 3.0
    conv_width: int = 0
    z_gate: bool = False
    head_norm: bool = False
    skip: bool = False
    normalizer: bool = False
    window: tuple[int, int, int] = (16, 4, 4)
    image_window: tuple[int, int, int] | None = (1, 16, 16)
    shift_alternate: bool = True
    wrap: str = "join"
    causal_windows: bool = False
    relative_bias: bool = False
    text_window: int = 0
    sink_tokens: int = 0
    mix: str = "scalar"
    initial_mix: float = 0.5
    norm: str = "none"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("window", "image_window", "initial_decay"):
            if isinstance(getattr(self, name), list):  # as JSON gives it back
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            kind = str(field.type)
            self._require(field.name, _is_of(kind, getattr(self, field.name)), f"of type {kind}")
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("initial_gate", "initial_mix"):
            self._require(name, 0 < getattr(self, name) < 1, "in (0, 1)")
        self._require("initial_decay", all(0 < d < 1 for d in self.decays), "in (0, 1)")
        self._require("conv_width", self.conv_width == 0 or 2 <= self.conv_width <= 8, "0, or 2 to 8")
        # The softmax hides the size of C, by which y would be calibrated.
        sized = self.head_norm or self.normalizer or self.feature_map != "hedgehog"
        self._require("head_norm", sized, 'on with feature_map="hedgehog" and without normalizer')
        self._require("feature_dim", 0 <= self.feature_dim <= WIDEST, f"in [0, {WIDEST}]")
        mapped = self.feature_dim == 0 or self.feature_map == "hedgehog"
        self._require("feature_dim", mapped, '0 with a feature_map other than "hedgehog"')
        positive = not self.normalizer or (self.feature_map != "none" and not self.skip)
        self._require("normalizer", positive, "off without a feature_map, and with skip")
        self._require("text_window", 0 <= self.text_window <= LONGEST, f"in [0, {LONGEST}]")
        for name in ("window", "image_window"):
            size = getattr(self, name)
            fits = size is None or (min(size) >= 1 and max(size) <= LONGEST)
            self._require(name, fits, f"three sizes in [1, {LONGEST}]")
        self._require("image_window", not (self.relative_bias and self.image_window), "None where relative_bias is on")
        self._require("swin", self.flex or self.swin, "on where flex is off")
        both = self.flex and self.swin
        self._require("mix", both or self.mix != "softmax", 'other than "softmax" where a branch is off')
        self._require("sink_tokens", 0 <= self.sink_tokens <= LONGEST, f"in [0, {LONGEST}]")
        self._require("initial_scale", isfinite(self.initial_scale), "finite")
        self._require("norm_eps", 0 <= self.norm_eps < 1, "in [0, 1)")
        sinks = self.sink_tokens == 0 or (self.mix == "softmax" and self.text_window > 0)
        self._require("sink_tokens", sinks, '0 without mix="softmax" and text_window')

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            value: Any = getattr(self, name)
            raise ValueError(f"MMATEConfig: {name} must be {rule}, got {value!r}")

    @property
    def decays(self) -> tuple[float, float]:
        """`initial_decay` as a pair."""
        d = self.initial_decay
        return d if isinstance(d, tuple) else (d, d)


PAPER = MMATEConfig()
"""The structure of the paper's block, not its letter. The paper has a LayerNorm after the mix, g and lambda per token,
and B and C of the reverse scan's own; here there is no norm, g is per head, lambda one number, and the scans share B
and C. All heads start with a memory of 67 tokens, C . B with a learned scale of 3."""

EXACT = MMATEConfig(
    mix="softmax",
    causal_windows=True,
    text_window=256,
    sink_tokens=4,
    window=(8, 8, 8),
    major_scan=False,
    initial_decay=0.9998,
    feature_map="hedgehog",
    initial_scale=8.0,
    normalizer=True,
    z_gate=True,
)
"""A causal decoder's attention, exactly, where all that it looks at lies within a token's window; the scan stands for
the rest. What the tables in `bench/reports` chose for conversion."""

PRESETS = {"exact": EXACT, "paper": PAPER}
