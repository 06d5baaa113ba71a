"""Random calls of every op: sizes, groups, dtypes, options crossed, values and places of each tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st

from linmu_ops import TokenLayout
from linmu_ops._directions import DIRECTIONS
from linmu_ops.branch_mix_norm import NORMS
from linmu_ops.gated_delta_scan import DIFFERENTIABLE as DELTA_DIFFERENTIABLE
from linmu_ops.ssd_scan import DIFFERENTIABLE
from linmu_ops.window_attention import WRAPS

from .tensors import DTYPES, Tensors, batches, dtypes, judge, manners, seeds, sizes, some, threads, with_threads

MOST = 200_000  # elements of a state, or scores: a case takes milliseconds

HEADS = st.sampled_from((1, 2, 3, 4, 6, 8, 12)).flatmap(
    lambda h: st.tuples(st.just(h), *[st.sampled_from([g for g in range(1, h + 1) if h % g == 0])] * 3)
).map(list)  # fmt: skip
SMALL = ("dt", "A", "D", "dt_bias", "reverse_dt", "reverse_A", "reverse_dt_bias", "gate", "weight", "bias", "mix")
SMALL += ("g", "beta", "reverse_g", "reverse_beta", "rest", "c_map", "scale")
# Where a tensor may be of another dtype than the values'; float64 only beside float64.
mixed = st.dictionaries(st.sampled_from(SMALL), dtypes)
common = dict(seed=seeds, dtype=dtypes, mixed=mixed, threads=threads)


def case(**strategies: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({**common, **strategies})


def other_dtype(case: dict[str, Any], t: Tensors, name: str) -> torch.dtype:
    given = DTYPES[case["mixed"].get(name, "float32")]
    return t.small if given == torch.float64 != t.dtype or name not in case["mixed"] else given


SCAN_TENSORS = (
    "x", "dt", "A", "B", "C", "D", "dt_bias", "reverse_dt", "reverse_dt_bias", "reverse_A", "reverse_B", "reverse_C",
    "gate", "reverse_mask", "reverse_seq_idx", "seq_idx", "token_order", "initial_state",
)  # fmt: skip
ssd_scan_cases = case(
    B=batches, L=sizes(130), heads=HEADS, P=sizes(70), N=sizes(70), direction=st.sampled_from(DIRECTIONS),
    options=some(
        "D", "dt_bias", "dt_softplus", "reverse_dt", "reverse_dt_bias", "reverse_A", "reverse_B", "reverse_C", "gate",
        "head_gate", "reverse_mask", "reverse_seq_idx", "seq_idx", "token_order", "initial_state", "return_final_state",
        "normalize",
    ),
    chunk_size=st.none() | st.integers(1, 140), manners=manners(*SCAN_TENSORS),
)  # fmt: skip


def scan_inputs(case: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    B, L, P, N, (H, Gx, Gb, Gc) = case["B"], case["L"], case["P"], case["N"], case["heads"]
    if B * H * P * N > MOST:
        reject()
    t, direction, options = Tensors(case), case["direction"], case["options"]
    softplus, mean = "dt_softplus" in options, "normalize" in options
    kind = "uniform" if mean else "normal"  # no weight of a mean is below 0
    shapes: dict[str, tuple[Any, ...]] = dict(
        x=(B, L, Gx, P), dt=(B, L, H), A=(H,), B=(B, L, Gb, N), C=(B, L, Gc, N), D=(H,), dt_bias=(H,),
        initial_state=(B, H, P + mean, N), gate=(B, L, H),
    )  # fmt: skip
    for name in ("dt", "dt_bias", "A", "B", "C"):
        shapes[f"reverse_{name}"] = shapes[name]
    for name in ("seq_idx", "reverse_seq_idx", "token_order", "reverse_mask", *shapes):
        plain = name.removeprefix("reverse_")
        backward = name.startswith("reverse_")
        if name not in ("x", "dt", "A", "B", "C", *options) and not (name == "gate" and "head_gate" in options):
            continue
        if (backward and direction == "forward") or (name == "gate" and direction != "both"):
            continue
        if name == "gate":
            t.draw(name, (H,) if "head_gate" in options else shapes[name], "uniform", other_dtype(case, t, name))
        elif plain == "seq_idx":
            t.segments(name, B, L)
        elif name == "token_order":
            t.order(B, L)
        elif name == "reverse_mask":
            t.mask(name, B, L)
        elif plain == "A":
            factor = 2 if case["seed"] % 3 else 0.01
            t.draw(name, shapes[name], "uniform", other_dtype(case, t, name), -factor)
        elif plain in ("dt", "dt_bias"):
            t.draw(name, shapes[name], "normal" if softplus else "uniform", other_dtype(case, t, name))
        elif name == "initial_state":
            t.draw(name, shapes[name], kind, dtype=t.small)
        else:
            t.draw(
                name, shapes[name], "normal" if name == "x" else kind,
                other_dtype(case, t, name) if name == "D" else t.dtype,
            )  # fmt: skip
    final = "return_final_state" in options
    return t, dict(
        direction=direction, dt_softplus=softplus, return_final_state=final, chunk_size=case["chunk_size"],
        normalize=mean,
    )  # fmt: skip


def without_infinite_logs(out: Any) -> Any:
    """The log of nothing becomes 0, which the log of something is not."""
    return tuple(o.masked_fill(o == -math.inf, 0) for o in out) if isinstance(out, tuple) else out


@with_threads
def ssd_scan(case: dict[str, Any]) -> None:
    t, options = scan_inputs(case)
    judge("ssd_scan", t, options, [k for k in DIFFERENTIABLE if k in t.bases], without_infinite_logs)


ssd_step_cases = case(
    B=batches, heads=HEADS, P=sizes(130), N=sizes(130), options=some("D", "dt_bias", "dt_softplus", "normalize"),
    manners=manners("x", "dt", "A", "B", "C", "D", "dt_bias", "state"),
)  # fmt: skip


@with_threads
def ssd_step(case: dict[str, Any]) -> None:
    B, P, N, (H, Gx, Gb, Gc) = case["B"], case["P"], case["N"], case["heads"]
    if B * H * P * N > MOST:
        reject()
    t, softplus, mean = Tensors(case), "dt_softplus" in case["options"], "normalize" in case["options"]
    kind = "uniform" if mean else "normal"
    t.draw("state", (B, H, P + mean, N), kind, dtype=t.small)
    for name, shape in dict(x=(B, Gx, P), B=(B, Gb, N), C=(B, Gc, N)).items():
        t.draw(name, shape, "normal" if name == "x" else kind)
    t.draw("dt", (B, H), "normal" if softplus else "uniform", other_dtype(case, t, "dt"))
    t.draw("A", (H,), "uniform", other_dtype(case, t, "A"), -1)
    if "D" in case["options"]:
        t.draw("D", (H,), kind, dtype=other_dtype(case, t, "D"))
    if "dt_bias" in case["options"]:
        t.draw("dt_bias", (H,), "normal" if softplus else "uniform", other_dtype(case, t, "dt_bias"))
    judge("ssd_step", t, dict(dt_softplus=softplus, normalize=mean), [], without_infinite_logs)


DELTA_TENSORS = (
    "q", "k", "v", "g", "beta", "reverse_q", "reverse_k", "reverse_g", "reverse_beta", "gate", "reverse_mask",
    "reverse_seq_idx", "seq_idx", "token_order", "initial_state",
)  # fmt: skip
gated_delta_scan_cases = case(
    B=batches, L=sizes(130), heads=HEADS, K=sizes(70, 1), V=sizes(70), direction=st.sampled_from(DIRECTIONS),
    options=some(
        "reverse_q", "reverse_k", "reverse_g", "reverse_beta", "gate", "head_gate", "reverse_mask", "reverse_seq_idx",
        "seq_idx", "token_order", "initial_state", "return_final_state", "normed",
    ),
    scale=st.sampled_from((None, 1.0, -0.3, 0.0)), chunk_size=st.none() | st.integers(1, 140),
    manners=manners(*DELTA_TENSORS),
)  # fmt: skip


def delta_inputs(case: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    B, L, K, V, (H, Gq, Gk, Gv) = case["B"], case["L"], case["K"], case["V"], case["heads"]
    if B * H * K * V > MOST:
        reject()
    t, direction, options = Tensors(case), case["direction"], case["options"]
    shapes: dict[str, tuple[Any, ...]] = dict(
        q=(B, L, Gq, K), k=(B, L, Gk, K), v=(B, L, Gv, V), g=(B, L, H), beta=(B, L, H), initial_state=(B, H, K, V),
        gate=(B, L, H),
    )  # fmt: skip
    for name in DELTA_TENSORS:
        plain = name.removeprefix("reverse_")
        if name not in ("q", "k", "v", "g", "beta", *options) and not (name == "gate" and "head_gate" in options):
            continue
        if (plain != name and direction == "forward") or (name == "gate" and direction != "both"):
            continue
        if name == "gate":
            t.draw(name, (H,) if "head_gate" in options else shapes[name], "uniform", other_dtype(case, t, name))
        elif plain == "seq_idx":
            t.segments(name, B, L)
        elif name == "token_order":
            t.order(B, L)
        elif name == "reverse_mask":
            t.mask(name, B, L)
        elif plain in ("g", "beta"):
            factor = 1 if plain == "beta" else -2 if case["seed"] % 3 else -0.01
            t.draw(name, shapes[plain], "uniform", other_dtype(case, t, name), factor)
        elif plain == "k" and "normed" not in options:
            # Longer keys make a state that grows without bound, and all that is judged a matter of chance.
            t.draw(name, shapes[plain], "uniform", factor=K**-0.5)
        else:
            t.draw(name, shapes[plain], dtype=t.small if name == "initial_state" else t.dtype)
    return t, dict(
        direction=direction, scale=case["scale"], use_qk_l2norm_in_kernel="normed" in options,
        return_final_state="return_final_state" in options, chunk_size=case["chunk_size"],
    )  # fmt: skip


@with_threads
def gated_delta_scan(case: dict[str, Any]) -> None:
    t, options = delta_inputs(case)
    judge("gated_delta_scan", t, options, [k for k in DELTA_DIFFERENTIABLE if k in t.bases])


gated_delta_step_cases = case(
    B=batches, heads=HEADS, K=sizes(130, 1), V=sizes(130), options=some("normed"),
    scale=st.sampled_from((None, 1.0, -0.3, 0.0)), manners=manners("q", "k", "v", "g", "beta", "state"),
)  # fmt: skip


@with_threads
def gated_delta_step(case: dict[str, Any]) -> None:
    B, K, V, (H, Gq, Gk, Gv) = case["B"], case["K"], case["V"], case["heads"]
    if B * H * K * V > MOST:
        reject()
    t, normed = Tensors(case), "normed" in case["options"]
    t.draw("state", (B, H, K, V), dtype=t.small)
    t.draw("q", (B, Gq, K))
    t.draw("k", (B, Gk, K), "normal" if normed else "uniform", factor=1 if normed else K**-0.5)
    t.draw("v", (B, Gv, V))
    t.draw("g", (B, H), "uniform", other_dtype(case, t, "g"), -2)
    t.draw("beta", (B, H), "uniform", other_dtype(case, t, "beta"))
    judge("gated_delta_step", t, dict(scale=case["scale"], use_qk_l2norm_in_kernel=normed), [])


STEP_TENSORS = (
    "keys", "values", "steps", "ssm", "q", "k", "v", "dt", "dt_bias", "rest", "c_map", "scale", "cos", "sin", "z_gate",
    "real", "sinks",
)  # fmt: skip
exact_step_cases = case(
    B=batches, heads=HEADS, P=sizes(130, 1), N=sizes(70, 1), rotary=st.integers(0, 65), sinks=st.integers(0, 9),
    window=st.integers(1, 70), kept=st.integers(0, 40), behind=st.sampled_from((1, 20, 300, 10**6)),
    far_limit=st.sampled_from((1, 7, 200, 2**62)),
    softmax_scale=st.none() | st.sampled_from((1.0, -0.3, 0.0, 1e-3)),
    options=some("one_rotary", "interleaved", "nothing_beyond", "z_gate", "real"), manners=manners(*STEP_TENSORS),
)  # fmt: skip


@with_threads
def exact_step(case: dict[str, Any]) -> None:
    B, P, N, (H, G, *_), t, options = case["B"], case["P"], case["N"], case["heads"], Tensors(case), case["options"]
    s, window = case["sinks"], case["window"]
    n = s + window + min(window, 64) + case["kept"]
    if B * H * P * (n + N) > 4 * MOST:
        reject()
    for name, shape in dict(keys=(B, G, n, P), values=(B, G, n, P), q=(B, H, P), k=(B, G, P), v=(B, G, P)).items():
        t.draw(name, shape)
    t.draw("steps", (B, G, n - s, H // G), "uniform", t.small)
    t.add("seen", t.integers((B,), 0, case["behind"]))
    t.draw("ssm", (B, H, P + 1, N), "uniform", t.small)
    for name, shape in dict(dt=(B, H), dt_bias=(H,), rest=(B, H), c_map=(H, P, N), scale=(H,)).items():
        t.draw(name, shape, dtype=other_dtype(case, t, name))
    if s:
        t.mask("sinks", B, s)
    if R := min(case["rotary"], P) // 2 * 2:
        angle = 3 * t.normal((1 if "one_rotary" in options else B, R), "normal")
        t.add("cos", angle.cos().to(t.small))
        t.add("sin", angle.sin().to(t.small))
    if "z_gate" in options:
        t.draw("z_gate", (B, H * P))
    if "real" in options:
        t.add("real", t.uniform((B,), "normal") < 0.7)
    judge(
        "exact_step", t,
        dict(
            window=window, softmax_scale=case["softmax_scale"], interleaved="interleaved" in options,
            nothing_beyond="nothing_beyond" in options, far_limit=case["far_limit"],
        ),
        [],
    )  # fmt: skip


causal_conv1d_cases = case(
    B=batches, L=sizes(130), D=sizes(130), K=st.integers(1, 8), activation=st.sampled_from((None, "silu")),
    options=some("bias", "seq_idx", "token_order", "initial_state", "return_final_state"),
    manners=manners("x", "weight", "bias", "seq_idx", "token_order", "initial_state"),
)  # fmt: skip


def conv_inputs(case: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    B, L, D, K, options, t = case["B"], case["L"], case["D"], case["K"], case["options"], Tensors(case)
    t.draw("x", (B, L, D))
    t.draw("weight", (D, K), dtype=other_dtype(case, t, "weight"))
    if "bias" in options:
        t.draw("bias", (D,), dtype=other_dtype(case, t, "bias"))
    if "seq_idx" in options:
        t.segments("seq_idx", B, L)
    if "token_order" in options:
        t.order(B, L)
    if "initial_state" in options:
        t.draw("initial_state", (B, K - 1, D))
    return t, dict(activation=case["activation"], return_final_state="return_final_state" in options)


@with_threads
def causal_conv1d(case: dict[str, Any]) -> None:
    t, options = conv_inputs(case)
    judge("causal_conv1d", t, options, [k for k in ("x", "weight", "bias", "initial_state") if k in t.bases])


causal_conv1d_step_cases = case(
    B=batches, D=sizes(130), K=st.integers(1, 8), older=st.integers(0, 2), activation=st.sampled_from((None, "silu")),
    options=some("bias"),
    manners=manners("state", "x", "weight", "bias"),
)  # fmt: skip


@with_threads
def causal_conv1d_step(case: dict[str, Any]) -> None:
    B, D, K, t = case["B"], case["D"], case["K"], Tensors(case)
    t.draw("state", (B, K - 1 + case["older"], D))
    t.draw("x", (B, D))
    t.draw("weight", (D, K), dtype=other_dtype(case, t, "weight"))
    if case["options"]:
        t.draw("bias", (D,), dtype=other_dtype(case, t, "bias"))
    judge("causal_conv1d_step", t, dict(activation=case["activation"]), [])


branch_mix_norm_cases = case(
    B=batches, L=sizes(70), D=sizes(130), mix=st.sampled_from(("one", "channels", "tokens")),
    norm=st.sampled_from(NORMS), eps=st.sampled_from((1e-6, 1e-5, 1e-2, 1.0)), options=some("mask", "weight", "bias"),
    manners=manners("a", "b", "mix", "mask", "weight", "bias"),
)  # fmt: skip


def branch_inputs(case: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    B, L, D, norm, t = case["B"], case["L"], case["D"], case["norm"], Tensors(case)
    if (norm, D) in (("layer", 2), ("rms", 1)):
        reject()  # normalised, it is 1 or -1 whatever it is: the gradient is what roundings leave
    t.draw("a", (B, L, D))
    t.draw("b", (B, L, D))
    shape = {"one": (1,), "channels": (D,), "tokens": (B, L)}[case["mix"]]
    t.draw("mix", shape, "uniform", other_dtype(case, t, "mix"))
    if "mask" in case["options"]:
        t.mask("mask", B, L)
    if "weight" in case["options"] and norm != "none":
        t.draw("weight", (D,), dtype=other_dtype(case, t, "weight"))
    if "bias" in case["options"] and norm == "layer":
        t.draw("bias", (D,), dtype=other_dtype(case, t, "bias"))
    return t, dict(norm=norm, eps=case["eps"])


@with_threads
def branch_mix_norm(case: dict[str, Any]) -> None:
    t, options = branch_inputs(case)
    judge("branch_mix_norm", t, options, [k for k in ("a", "b", "mix", "weight", "bias") if k in t.bases])


gated_norm_cases = case(
    B=batches, L=sizes(70), group=sizes(130).filter(lambda n: n > 1), groups=st.integers(1, 3),
    norm_before_gate=st.booleans(), eps=st.sampled_from((1e-6, 1e-5, 1e-2, 1.0)), options=some("weight"),
    manners=manners("x", "z", "weight"),
)  # fmt: skip


def gated_norm_inputs(case: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    B, L, size, t = case["B"], case["L"], case["group"], Tensors(case)
    D = size * case["groups"]
    t.draw("x", (B, L, D))
    t.draw("z", (B, L, D))
    if "weight" in case["options"]:
        t.draw("weight", (D,), dtype=other_dtype(case, t, "weight"))
    return t, dict(group_size=size, norm_before_gate=case["norm_before_gate"], eps=case["eps"])


@with_threads
def gated_norm(case: dict[str, Any]) -> None:
    t, options = gated_norm_inputs(case)
    judge("gated_norm", t, options, [k for k in ("x", "z", "weight") if k in t.bases])


near_attention_cases = case(
    B=batches, heads=st.sampled_from((1, 2, 3, 4, 6)).flatmap(
        lambda h: st.tuples(st.just(h), st.sampled_from([g for g in range(1, h + 1) if h % g == 0]))
    ).map(list),
    P=sizes(130, 1), L=sizes(140), before=sizes(70), lists=st.integers(0, 4), m=sizes(70), window=sizes(70, 1),
    kind=st.sampled_from(("windows", "anything")), scale=st.none() | st.sampled_from((1.0, -0.3, 0.0, 1e-3)),
    manners=manners("q", "k", "v"),
)  # fmt: skip


def near_inputs(case: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    B, L, P, n, m, (H, G), t = case["B"], case["L"], case["P"], case["lists"], case["m"], case["heads"], Tensors(case)
    T = L + case["before"]
    if B * H * L * (T + m) > 2 * MOST:
        reject()
    for name, length, heads in (("q", L, H), ("k", T, G), ("v", T, G)):
        t.draw(name, (B, length, heads, P))
    low, high = (t.integers((B, L), 0, T + 1) for _ in range(2))
    which = t.integers((B, G, L), -1, n)
    if case["kind"] == "windows":
        own = torch.arange(T - L, T)
        low, high = ((own - case["window"] + 1).clamp(min=0).expand(B, L), (own + 1).expand(B, L))
        which = (own // case["window"]).clamp(max=n).expand(B, G, L) - 1
    places = dict(low=low, high=high, which=which, listed=t.integers((n, m), -1, max(T, 0)))
    for name, values in places.items():
        t.add(name, values.int())
    return t, dict(scale=case["scale"])


@with_threads
def near_attention(case: dict[str, Any]) -> None:
    t, options = near_inputs(case)
    judge("near_attention", t, options, ["q", "k", "v"], without_infinite_logs)


FAR_TENSORS = (
    "y", "lse", "rest", "q", "k", "v", "steps", "entered", "when", "b_map", "c_map", "scale", "rates", "z_gate",
    "initial_state", "last",
)  # fmt: skip
far_attention_cases = case(
    B=batches, heads=HEADS, P=sizes(130, 1), N=sizes(70, 1), L=sizes(140), before=sizes(70), steps=st.integers(1, 70),
    softmax_scale=st.none() | st.sampled_from((1.0, -0.3, 0.0, 1e-3)), options=some("z_gate", "initial_state", "last"),
    manners=manners(*FAR_TENSORS),
)  # fmt: skip


@with_threads
def far_attention(case: dict[str, Any]) -> None:
    B, L, P, N, (H, G, *_), t, options = (
        case["B"], case["L"], case["P"], case["N"], case["heads"], Tensors(case), case["options"],
    )  # fmt: skip
    T = L + case["before"]
    most = min(case["steps"], T)
    if B * H * T * (P + N) * max(most, 1) > 4 * MOST:
        reject()
    for name, shape in dict(y=(B, L, H, P), q=(B, L, H, P), k=(B, T, G, P), v=(B, T, G, P)).items():
        t.draw(name, shape)
    for name, shape in dict(lse=(B, L, H), rest=(B, L, H), b_map=(G, P, N), c_map=(H, P, N), scale=(H,)).items():
        t.draw(name, shape, dtype=other_dtype(case, t, name))
    t.draw("steps", (B, T, G, H // G), "uniform", other_dtype(case, t, "steps"))
    t.draw("rates", (H,), "uniform", other_dtype(case, t, "rates"))
    t.add("entered", t.integers((B, G, T), -1, most + 1).int())
    t.add("when", t.integers((B, L), -1, most + 1).int())
    if "z_gate" in options:
        t.draw("z_gate", (B, L, H * P))
    if "initial_state" in options:
        t.draw("initial_state", (B, H, P + 1, N), "uniform", t.small)
    if "last" in options:
        t.add("last", t.integers((B,), 0, most + 1).int())
    judge("far_attention", t, dict(softmax_scale=case["softmax_scale"]), [])


TRIPLES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)).map(list)
SHIFTS = st.tuples(*[st.integers(0, 6)] * 3).map(list)
window_attention_cases = case(
    B=batches, heads=st.sampled_from((1, 2, 3, 4, 6)).flatmap(
        lambda h: st.tuples(st.just(h), st.sampled_from([g for g in range(1, h + 1) if h % g == 0]))
    ).map(list),
    P=sizes(130, 1), grid=TRIPLES, window=TRIPLES, shift=SHIFTS, wrap=st.sampled_from(WRAPS),
    image_window=st.none() | TRIPLES, image_shift=st.none() | SHIFTS,
    blocks=st.none() | st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), TRIPLES).map(list), max_size=3),
    rotary=st.integers(0, 65), scale=st.none() | st.sampled_from((1.0, -0.3, 0.0, 1e-3)),
    options=some("bias", "one_rotary", "interleaved", "causal", "return_lse"),
    manners=manners("q", "k", "v", "bias", "cos", "sin"),
)  # fmt: skip


def layout_of(blocks: list[list[Any]], rows: int, length: int | None = None) -> TokenLayout:
    """Each row holds [text before, text between two frames, sizes] of each block."""
    table, positions, longest = [], [], 1
    for row in range(rows):
        at = 0
        for before, between, (T, H, W) in blocks[row % max(len(blocks), 1) :]:
            at += before
            table.append((row, T, H, W))
            for _ in range(T):
                positions += range(at, at + H * W)
                at += H * W + between
        longest = max(longest, at + 1)
    return TokenLayout(table, positions, rows, longest)


def window_inputs(case: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    B, P, (H, G), t = case["B"], case["P"], case["heads"], Tensors(case)
    if case["blocks"] is None:
        L, where = math.prod(case["grid"]), dict(grid=tuple(case["grid"]))
    else:
        layout = layout_of(case["blocks"], B)
        L, where = layout.length, dict(layout=layout)
    if B * H * L * min(L, math.prod(case["window"])) > 2 * MOST:
        reject()
    for name, heads in (("q", H), ("k", G), ("v", G)):
        t.draw(name, (B, L, heads, P))
    options = dict(
        window=tuple(case["window"]), shift=tuple(case["shift"]), wrap=case["wrap"], scale=case["scale"],
        interleaved="interleaved" in case["options"], causal="causal" in case["options"],
        return_lse="return_lse" in case["options"], image_shift=case["image_shift"], **where,
    )  # fmt: skip
    if case["image_window"] is not None:
        options |= dict(image_window=tuple(case["image_window"]))
    elif "bias" in case["options"]:
        t.draw("bias", (H, *(2 * w - 1 for w in case["window"])), dtype=other_dtype(case, t, "bias"))
    if R := min(case["rotary"], P) // 2 * 2:
        angle = 3 * t.normal((1 if "one_rotary" in case["options"] else B, L, R // 2), "normal")
        angle = angle.repeat_interleave(2, -1) if options["interleaved"] else torch.cat((angle, angle), -1)
        t.add("cos", angle.cos().to(t.small))
        t.add("sin", angle.sin().to(t.small))
    return t, options


@with_threads
def window_attention(case: dict[str, Any]) -> None:
    t, options = window_inputs(case)

    def comparable(out: Any) -> Any:
        return (out[0], out[1].masked_fill(out[1] == -math.inf, 0)) if options["return_lse"] else out

    judge("window_attention", t, options, [k for k in ("q", "k", "v", "bias") if k in t.bases], comparable)
