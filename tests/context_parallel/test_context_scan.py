"""Rows split over processes are scanned as whole rows are: values, states, every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from linmu_ops import Reverse, TokenLayout
from linmu_ops._testing import grouped, run_op, small_inputs
from linmu_ops.context_parallel import ContextParallel
from linmu_ops.context_parallel import ssd_scan as split_scan
from linmu_ops.context_parallel import window_attention as split_windows
from tests.context_parallel.gang import Gang, assert_whole, bytes_sent, joined, results, slabs

OWN = [f"reverse_{name}" for name in Reverse._fields]
PER_TOKEN = {"x", "dt", "B", "C", "gate", "seq_idx", "y", "reverse_dt", "reverse_B", "reverse_C", "reverse_mask"}
PER_TOKEN |= {"reverse_seq_idx"}
LENGTHS = {1: [37], 2: [20, 17], 3: [1, 23, 13], 4: [9, 0, 16, 12]}
DIRECTIONS = ["forward", "reverse", "both"]


def within(lengths, rows=2):
    """An order of whole rows in which each slab's tokens are visited within its visits."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    orders = [torch.cat([s + torch.randperm(n) for s, n in zip(starts, lengths, strict=False)]) for _ in range(rows)]
    return torch.stack(orders).int()


def case(direction, **changes):
    """The small case, of one direction, without what is None."""
    inputs = small_inputs("ssd_scan", dtype=torch.float64) | dict(direction=direction, token_order=None) | changes
    left_out = [*(OWN if direction == "forward" else ()), *(("gate",) if direction != "both" else ())]
    return {k: v for k, v in inputs.items() if v is not None and k not in left_out}


def work(group, lengths, inputs, order, weights, move=False):
    context = ContextParallel(group, lengths)
    token_order = None if order is None else context.order(order, move=move)
    return results(
        lambda **values: split_scan(context=context, token_order=token_order, **grouped(values)),
        inputs[context.rank],
        weights[context.rank],
    )


def check(gang, lengths, inputs, order=None, move=False):
    y, *state = [torch.randn(2, sum(lengths), 8, 8).double(), torch.randn(2, 8, 8, 12).double()]
    state = state if inputs["return_final_state"] else []
    want = results(lambda **v: run_op("ssd_scan", token_order=order, **v), inputs, [y, *state])
    per_token = PER_TOKEN if inputs.get("gate", torch.empty(0)).dim() != 1 else PER_TOKEN - {"gate"}
    # The final state is the same on all ranks: each one's loss takes its share.
    n = len(lengths)
    shares = [[part, *(w / n for w in state)] for part in y.split(lengths, dim=1)]
    got = gang(n, work, lengths, slabs(lengths, per_token, inputs), order, shares, move)
    assert_whole(lengths, per_token | {"output 0"}, {"output 1"} if state else (), got, want)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_slabs_are_scanned_as_a_row(gang, n, direction):
    """Everything at once: segments and a mask that cross borders, an order, groups of heads, states; uneven slabs, one
    of a token, one of none."""
    check(gang, LENGTHS[n], case(direction), within(LENGTHS[n]))


SIMPLE = dict.fromkeys([*OWN, "D", "dt_bias", "initial_state", "seq_idx", "gate"])
KINDS = {
    "nothing more": SIMPLE,
    "own decays": SIMPLE | {k: v for k, v in case("both").items() if k in ("reverse_dt", "reverse_A", "D")},
    "a gate of heads": SIMPLE | {"gate": torch.rand(8, dtype=torch.float64)},
    "a mask alone": SIMPLE | {k: v for k, v in case("both").items() if k in ("reverse_mask", "initial_state", "gate")},
    "y alone": {"return_final_state": False},  # the first rank needs no state of others, and they its gradient
    "segments alone": SIMPLE | {k: v for k, v in case("both").items() if k in ("seq_idx", "initial_state")},
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_slabs_are_scanned_as_a_row_without_some_arguments(gang, kind, direction):
    check(gang, LENGTHS[4], case(direction, **KINDS[kind]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n", [2, 4])
def test_an_order_may_move_tokens_between_ranks(gang, n, direction):
    order = torch.stack([torch.randperm(37) for _ in range(2)]).int()
    check(gang, LENGTHS[n], case(direction), order, move=True)


def test_segments_are_told_apart_by_every_bit_of_their_numbers(gang):
    """float32, in which a state travels, does not hold all of an int32."""
    numbers = torch.tensor([2**31 - 1, 2**31 - 2, -(2**31), -(2**31) + 1, 7, 7 + 2**16, 7, 6], dtype=torch.int32)
    seq_idx = numbers.repeat_interleave(5)[:37].repeat(2, 1)
    lengths = [5, 10, 10, 12]
    inputs = case("both", seq_idx=seq_idx, reverse_seq_idx=seq_idx.roll(5, 1))
    check(gang, lengths, inputs)
    inputs = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    want = run_op("ssd_scan", **inputs)
    weights = [[torch.ones(()), torch.ones(())]] * 4
    got = joined(
        lengths, PER_TOKEN | {"output 0"}, gang(4, work, lengths, slabs(lengths, PER_TOKEN, inputs), None, weights)
    )
    assert (got["output 0"] - want[0]).abs().max() < 1e-5 * want[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_slabs_are_as_exact_as_narrow_rows(gang, dtype):
    """y is rounded once more: an ulp of it."""
    inputs = case("both")
    narrow = small_inputs("ssd_scan", dtype=dtype)
    inputs = {k: v.to(narrow[k].dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    weights = [[torch.ones(()), torch.ones(())]] * 4
    got = gang(4, work, LENGTHS[4], slabs(LENGTHS[4], PER_TOKEN, inputs), None, weights)
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    (y, state), (right_y, right_state) = run_op("ssd_scan", **inputs), run_op("ssd_scan", **exact)
    got = joined(LENGTHS[4], PER_TOKEN | {"output 0"}, got)
    for mine, one, right in ((got["output 0"], y, right_y), (got["output 1"] / 4, state, right_state)):
        scale = right.abs().max() * torch.finfo(mine.dtype).eps
        assert (mine - right).abs().max() <= 2 * (one - right).abs().max() + 4 * scale


def test_a_value_that_is_not_finite_reaches_those_that_see_it_alone(gang):
    """Masked from the reverse scan, or of another segment: on other ranks too."""
    inputs = case("both", initial_state=None, reverse_seq_idx=None, seq_idx=None, reverse_mask=None, gate=None)
    lengths = [10, 10, 10, 7]
    seq_idx = (torch.arange(37) // 15).int().repeat(2, 1)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[:, 17] = False
    for at, changes in ((17, dict(reverse_mask=mask)), (17, dict(seq_idx=seq_idx)), (3, dict(seq_idx=seq_idx))):
        given = {**inputs, **changes, "x": inputs["x"].clone(), "B": inputs["B"].clone()}
        given["x"][0, at] = torch.nan
        given["B"][0, at] = torch.inf
        want, _ = run_op("ssd_scan", **given)
        weights = [[torch.ones(()), torch.ones(())]] * 4
        got = joined(
            lengths, PER_TOKEN | {"output 0"}, gang(4, work, lengths, slabs(lengths, PER_TOKEN, given), None, weights)
        )
        assert 0 < want.isfinite().sum() < want.numel()
        assert got["output 0"].isfinite().equal(want.isfinite())


def sent(group, length, direction):
    inputs = case(direction, token_order=None, seq_idx=None)
    context = ContextParallel(group, length)
    for name in PER_TOKEN & set(inputs):
        inputs[name] = inputs[name][:, torch.arange(length) % 37][:, context.start : context.stop]
    weights = [torch.ones(()), torch.ones(())]
    return bytes_sent(lambda: results(lambda **v: split_scan(context=context, **grouped(v)), inputs, weights))


def test_what_is_sent_does_not_grow_with_the_row(gang):
    """A state and a decay of each head, in each direction, and five numbers per row of segments; backward the same for
    each rank that they came from."""
    B, H, P, N = 2, 8, 8, 12
    for length in (37, 370):
        for direction, numbers in (("forward", H * P * N + H), ("both", 2 * (H * P * N + H) + 5)):
            for sizes in gang(3, sent, length, direction):
                assert sizes == [8 * B * numbers, 3 * 8 * B * numbers]  # forward, backward


def refusals(group):
    context = ContextParallel(group, 10)
    order = torch.arange(10).flip(0)[None].int()
    x, mine, angles = torch.zeros(1, 3, 1, 2), torch.zeros(1, 5, 1, 2), torch.zeros(1, 5, 3)
    layout = TokenLayout.from_grid((1, 1, 10))
    calls = (
        lambda: context.order(order),
        lambda: context.order(order[:, 1:]),
        lambda: ContextParallel(group, [1, 2, 3]),
        lambda: ContextParallel(group, [12, -2]),
        lambda: context.shard(torch.zeros(1, 9)),
        lambda: split_scan(x, x[..., 0], torch.zeros(1), x, x, context=context),
        lambda: split_scan(x, x[..., 0], torch.zeros(1), x, x, context=context, normalize=True),
        lambda: split_windows(
            mine, mine, mine, layout=layout, context=context, window=(1, 1, 2), cos=angles, sin=angles
        ),
    )
    texts = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        texts.append(str(caught.value))
    return texts


def test_errors_say_what_is_wrong(gang):
    texts = gang(2, refusals)
    assert texts[0][:4] == [
        "ContextParallel: token_order must visit a rank's tokens within its slab, unless move=True sends them, "
        "got position 9 of rank 1 at visit 0 of rank 0 in row 0",
        "ContextParallel: token_order must be (B, L) with L=10, got shape (1, 9)",
        "ContextParallel: lengths must be 2 numbers >= 0, got [1, 2, 3]",
        "ContextParallel: lengths must be 2 numbers >= 0, got [12, -2]",
    ]
    assert texts[0][4] == "ContextParallel: t must have 10 tokens in dim 1, got shape (1, 9)"
    assert texts[1][5] == "ssd_scan: x must have the 5 tokens of rank 1 in dim 1, got shape (1, 3, 1, 2)"
    assert texts[0][6] == "ssd_scan: normalize must be False for rows that are split over ranks, got True"
    assert texts[0][7] == "window_attention: cos must have an even R of at most P=2, got R=3"
    assert texts[0][:4] == texts[1][:4]


def on_a_mesh(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "cp"))
    context = ContextParallel(mesh["cp"], 7)
    whole = torch.arange(14).view(1, 7, 2) + 100 * mesh.get_local_rank("data")
    with pytest.raises(ValueError, match=r"^ContextParallel: group must be a mesh of one dimension, got 2$"):
        ContextParallel(mesh, 7)
    mine = context.shard(whole).double().requires_grad_()
    again = context.unshard(mine)
    (again * whole).sum().backward()
    return context.lengths, again.detach().equal(whole.double()), mine.grad.equal(2.0 * context.shard(whole))


def test_a_dimension_of_a_mesh_is_a_group(gang: Gang):
    assert gang(4, on_a_mesh) == [((4, 3), True, True)] * 4
