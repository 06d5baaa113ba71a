"""`TokenLayout`: compiled planner against the numpy definition, and both against direct formulas."""

from __future__ import annotations

import _ctypes
import copy
import itertools
import pickle
import re
import resource
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import linmu_ops
from linmu_ops import TokenLayout, _native, _registry, major_scan_order, token_layout
from linmu_ops.reference import token_layout as reference

COMPILED = ["_C", "liblinmu_cpu.so"]


def compiled_planner(name):
    if name not in _native.planners():
        pytest.skip(f"no compiled planner: {_native.planner_errors()[name]}")
    return _native.planners()[name]


@pytest.fixture(params=["numpy", *COMPILED])
def planner(request, monkeypatch):
    module = reference if request.param == "numpy" else compiled_planner(request.param)
    monkeypatch.setattr(token_layout, "_planner", lambda: module)
    token_layout._from_grid.cache_clear()
    yield module
    token_layout._from_grid.cache_clear()


@st.composite
def layouts(draw, max_rows=3, max_blocks=3, max_size=5):
    """(blocks, positions, batch_size, length): gaps within and between blocks, some tokens out of order."""
    rows = draw(st.integers(1, max_rows))
    blocks, positions, length = [], [], 0
    for row in range(rows):
        at = draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, max_blocks))):
            sizes = draw(st.tuples(*[st.integers(1, max_size)] * 3))
            n = int(np.prod(sizes))
            gaps = draw(st.sampled_from([[0], [0, 0, 1], [2, 0, 0, 0, 3]]))
            own = []
            for k in range(n):
                at += gaps[k % len(gaps)]
                own.append(at)
                at += 1
            if draw(st.booleans()):
                own = own[::-1]
            blocks.append((row, *sizes))
            positions += own
            at += draw(st.integers(0, 2))
        length = max(length, at)
    order = draw(st.permutations(range(len(blocks))))  # the table need not be sorted
    starts = np.cumsum([0] + [b[1] * b[2] * b[3] for b in blocks])
    positions = [p for i in order for p in positions[starts[i] : starts[i + 1]]]
    return [blocks[i] for i in order], positions, rows, length + draw(st.integers(0, 2))


TRIPLES = st.tuples(*[st.integers(1, 6)] * 3)
SHIFTS = st.tuples(*[st.integers(0, 7)] * 3)


def cells(layout):
    """Per block: (row, sizes, {(t, y, x): position})."""
    at = 0
    for row, *sizes in layout.blocks.tolist():
        names = list(itertools.product(*map(range, sizes)))
        yield row, sizes, dict(zip(names, layout.positions[at : at + len(names)].tolist(), strict=True))
        at += len(names)


def windows_by_formula(layout, window, shift, mask, image_window, image_shift):
    """{window: {(row, position): coordinate}}, straight from the definition."""
    out = defaultdict(dict)
    for i, (row, sizes, positions) in enumerate(cells(layout)):
        full, shifts = (image_window, image_shift) if sizes[0] == 1 else (window, shift)
        for cell, position in positions.items():
            key, coordinate = [i], 0
            for c, s, w, h in zip(cell, sizes, full, shifts, strict=True):
                h = 0 if w >= s else h % s
                key += [((c - h) % s) // min(w, s), mask and c < h]
                coordinate = coordinate * (2 * w - 1) + ((c - h) % s) % min(w, s)
            out[tuple(key)][row, position] = coordinate
    return out


@settings(max_examples=150, deadline=None)
@given(layouts(), TRIPLES, SHIFTS, TRIPLES, SHIFTS, st.booleans())
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_the_reference(name, table, window, shift, image_window, image_shift, mask):
    compiled = compiled_planner(name)
    arguments = (np.array(table[0], np.int64).reshape(-1, 4), np.array(table[1], np.int64), *table[2:])
    got, want = compiled.Plan(*arguments), reference.Plan(*arguments)
    for mode in range(4):
        np.testing.assert_array_equal(got.scan_order(mode), want.scan_order(mode), strict=True)
    windows = (window, shift, image_window, image_shift, mask)
    for g, w in zip(
        (*got.segments(), *got.window_table(*windows)), (*want.segments(), *want.window_table(*windows)), strict=True
    ):
        np.testing.assert_array_equal(g, w, strict=isinstance(w, np.ndarray))


@settings(max_examples=60, deadline=None)
@given(layouts(), TRIPLES, SHIFTS, TRIPLES, SHIFTS, st.sampled_from(["join", "mask"]))
def test_window_table_is_the_formula(table, window, shift, image_window, image_shift, wrap):
    layout = TokenLayout(*table)
    made = layout.window_table(window, shift, wrap, image_window, image_shift)
    want = windows_by_formula(layout, window, shift, wrap == "mask", image_window, image_shift)
    tokens, offsets, coords = made.tokens.tolist(), made.offsets.tolist(), made.coords.tolist()
    got = [
        {(t // layout.length, t % layout.length): c for t, c in zip(tokens[a:b], coords[a:b], strict=True)}
        for a, b in itertools.pairwise(offsets)
    ]
    assert sorted(map(sorted, (g.items() for g in got))) == sorted(map(sorted, (w.items() for w in want.values())))
    assert all(g for g in got)
    assert made.max_tokens == max([len(g) for g in got], default=0)
    assert offsets[0] == 0 and offsets[-1] == layout.num_visual == len(tokens)
    assert {made.tokens.dtype, made.offsets.dtype, made.coords.dtype} == {torch.int32}


@settings(max_examples=60, deadline=None)
@given(layouts(), TRIPLES, SHIFTS, TRIPLES, SHIFTS, st.sampled_from(["join", "mask"]))
def test_slabs_are_windows_of_whole_frames(table, window, shift, image_window, image_shift, wrap):
    layout = TokenLayout(*table)
    tokens, begin, inverse, between = layout.slab_chunks(window, shift, wrap, image_window, image_shift)
    tall = [(size[0], 1 << 9, 1 << 9) for size in (window, image_window)]
    whole = layout.window_table(tall[0], (shift[0], 0, 0), wrap, tall[1], (image_shift[0], 0, 0))
    offsets = whole.offsets.tolist()
    want = [sorted(whole.tokens[a:b].tolist()) for a, b in itertools.pairwise(offsets) if b > a]
    found = {}
    for chunk, first in zip(tokens.tolist(), begin.tolist(), strict=True):
        found.setdefault(first, []).extend(chunk)
    assert sorted(map(sorted, map(set, found.values()))) == sorted(want)
    assert all(first == min(slab) for first, slab in found.items())
    text = ~layout.visual_mask().flatten()
    for first, inside in zip(begin.tolist(), between.tolist(), strict=True):
        span = range(first, max(found[first]))
        assert [p for p in inside if p >= 0] == [p for p in span if text[p]]
    visual = (~text).nonzero()[:, 0]
    assert torch.equal(tokens.flatten()[inverse.flatten()[visual]], visual)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 7))
def test_scan_order_is_the_formula(table, layer):
    layout = TokenLayout(*table)
    order = major_scan_order(layout, layer)
    assert order.dtype == torch.int32 and order.shape == (layout.batch_size, layout.length)
    want = [list(range(layout.length)) for _ in range(layout.batch_size)]
    for row, (T, H, W), positions in cells(layout):
        slots = sorted(positions.values())
        for (t, y, x), position in positions.items():
            index = (
                t * H * W + y * W + x, t * H * W + x * H + y, y * T * W + x * T + t, x * T * H + y * T + t,
            )[layer % 4]  # fmt: skip
            want[row][slots[index]] = position
    assert order.tolist() == want
    inverse = order.long().argsort(1)
    identity = torch.arange(layout.length).expand_as(inverse)
    assert torch.equal(torch.gather(order.long(), 1, inverse), identity)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_segments(table):
    layout = TokenLayout(*table)
    mask = torch.zeros(layout.batch_size, layout.length, dtype=torch.bool)
    index = torch.zeros(layout.batch_size, layout.length, dtype=torch.int32)
    for i, (row, _, positions) in enumerate(cells(layout)):
        for p in positions.values():
            mask[row, p] = True
        index[row, min(positions.values()) : max(positions.values()) + 1] = i + 1
    assert torch.equal(layout.visual_mask(), mask)
    assert torch.equal(layout.reverse_seq_idx(), index) and layout.reverse_seq_idx().dtype == torch.int32
    for size in (1, 3, 64):
        parts = [part for row in mask for part in row.split(size)]
        assert layout.text_chunks(size).tolist() == [i for i, part in enumerate(parts) if not part.all()]


def test_known_orders(planner):
    layout = TokenLayout.from_grid((2, 2, 3))
    # positions t*6 + y*3 + x, in the order visited
    assert major_scan_order(layout, 0).tolist() == [list(range(12))]
    assert major_scan_order(layout, 1).tolist() == [[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]]
    assert major_scan_order(layout, 2).tolist() == [[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]
    assert major_scan_order(layout, 7).tolist() == [[0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]]


def test_known_windows(planner):
    layout = TokenLayout.from_grid((1, 1, 7))
    join = layout.window_table((1, 1, 3), (0, 0, 2))
    assert join.tokens.tolist() == [2, 3, 4, 5, 6, 0, 1] and join.offsets.tolist() == [0, 3, 6, 7]
    assert join.coords.tolist() == [0, 1, 2, 0, 1, 2, 0] and join.max_tokens == 3
    mask = layout.window_table((1, 1, 3), (0, 0, 2), "mask")
    assert mask.tokens.tolist() == [2, 3, 4, 5, 6, 0, 1] and mask.offsets.tolist() == [0, 3, 5, 6, 7]
    assert mask.coords.tolist() == join.coords.tolist()
    whole = layout.window_table((4, 4, 9), (2, 2, 4), "mask")
    assert whole.offsets.tolist() == [0, 7] and whole.coords.tolist() == list(range(7))


def test_image_window_is_for_images_only(planner):
    layout = TokenLayout([(0, 1, 2, 2), (0, 2, 2, 2)], range(12), 1, 12)
    made = layout.window_table((1, 1, 1), image_window=(1, 2, 2))
    assert made.offsets.tolist() == [0, *range(4, 13)]
    assert made.coords.tolist() == [0, 1, 3, 4, *[0] * 8]


IMAGE, VIDEO, PAD = 7, 8, 0


def test_from_input_ids_interleaved_and_padded(planner):
    ids = torch.tensor(
        [
            [PAD, PAD, 1, VIDEO, VIDEO, 2, VIDEO, VIDEO, 3, IMAGE, IMAGE, 4],
            [PAD] * 11 + [5],
            [1, IMAGE, IMAGE, 9, IMAGE, IMAGE, 2, IMAGE, 3, 4, 5, 6],
        ]
    )
    layout = TokenLayout.from_input_ids(ids, (IMAGE, VIDEO), [(2, 1, 2), (1, 1, 2), (1, 2, 2), (1, 1, 1)])
    assert layout.blocks.tolist() == [[0, 2, 1, 2], [0, 1, 1, 2], [2, 1, 2, 2], [2, 1, 1, 1]]
    assert layout.positions.tolist() == [3, 4, 6, 7, 9, 10, 1, 2, 4, 5, 7]
    assert (layout.batch_size, layout.length, layout.num_visual, layout.has_visual) == (3, 12, 11, True)
    assert torch.equal(layout.visual_mask(), (ids == IMAGE) | (ids == VIDEO))
    assert layout.reverse_seq_idx().tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1, 0, 2, 2, 0], [0] * 12, [0, 3, 3, 3, 3, 3, 0, 4, 0, 0, 0, 0],
    ]  # fmt: skip
    # y,x,t: both frames of the left token first; the timestamp (id 2, position 5) stays in place
    assert layout.scan_order(2)[0].tolist() == [0, 1, 2, 3, 6, 5, 4, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([[7, 7, 7, 1]], [(1, 1, 2), (1, 1, 2)],
         r"row 0 must have 4 placeholder tokens for its grids up to grids\[1\] = \(1, 1, 2\), got 3"),
        ([[7, 7, 1, 1], [7, 7, 7, 1]], [(1, 1, 2), (1, 1, 2)], "row 1 must have 2 placeholder tokens .*, got 3"),
        ([[7, 7, 1, 1]], [(1, 1, 2), (1, 1, 2)], "grids must be 1, as many as the placeholder tokens fill, got 2"),
        ([[7, 7, 1, 1]], [], "row 0 must have 0 placeholder tokens for its grids, got 2"),
        ([[7, 7]], [(1, 0, 2)], r"grids\[0\] must be three integers >= 1, got \(1, 0, 2\)"),
        ([7, 7], [(1, 1, 2)], r"input_ids must be \(B, L\), got shape \(2,\)"),
        ([[7.0, 7.0]], [(1, 1, 2)], "input_ids must be integers, got float64"),
    ],
)  # fmt: skip
def test_from_input_ids_errors(ids, grids, message):
    with pytest.raises(ValueError, match=f"^TokenLayout: {message}$"):
        TokenLayout.from_input_ids(ids, IMAGE, grids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(1, 1, 1, 1)], [0], 1, 4), "blocks[0] must be in a row of 0..0, got row 1"),
        (([(-1, 1, 1, 1)], [0], 1, 4), "blocks[0] must be in a row of 0..0, got row -1"),
        (([(0, 1, 0, 1)], [], 1, 4), "blocks[0] must have sizes (T, H, W) >= 1, got (1, 0, 1)"),
        (([(0, 1, 1, 1), (0, 1, 2, 4)], range(9), 1, 4), "blocks[1] must fit in length 4, got (T, H, W) = (1, 2, 4)"),
        (([(0, 2**62, 2**62, 2)], [0], 1, 4), f"blocks[0] must fit in length 4, got (T, H, W) = ({2**62}, {2**62}, 2)"),
        (([(0, 1, 1, 2)], [0], 1, 4), "positions must have 2 entries, T*H*W per block, got 1"),
        (([(0, 1, 1, 2)], [0, 4], 1, 4), "positions must be in 0..3, got 4 at index 1"),
        (([(0, 1, 1, 2)], [-1, 0], 1, 4), "positions must be in 0..3, got -1 at index 0"),
        (([(0, 1, 1, 3)], [2, 1, 2], 1, 4), "blocks[0] must name each position once, got position 2 twice"),
        (([(0, 1, 1, 2), (0, 1, 1, 1)], [1, 3, 2], 1, 4),
         "blocks of a row must not overlap, got blocks[0] at 1..3 and blocks[1] at 2..2 in row 0"),
        (([(0, 1, 1, 1)], [0.5], 1, 4), "positions must be integers, got float64"),
        (([(0, 1, 1)], [0], 1, 4), "blocks must be (num_blocks, 4), got shape (1, 3)"),
        (([], [], -1, 4), "batch_size must be >= 0, got -1"),
        (([], [], 1, 2.5), "length must be an integer, got 2.5"),
        (([], [], 2**16, 2**15), "batch_size * length must be < 2**31, got 65536 * 32768"),
    ],
)  # fmt: skip
def test_errors(planner, arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"TokenLayout: {message}") + "$"):
        TokenLayout(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=(0, 4, 4)), "window must be three integers >= 1, got (0, 4, 4)"),
        (dict(window=(float("nan"), 4, 4)), "window must be three integers >= 1, got (nan, 4, 4)"),
        (dict(window=(4, 4)), "window must be three integers >= 1, got (4, 4)"),
        (dict(window=4), "window must be three integers >= 1, got 4"),
        (dict(window=(1, 1, 1), shift=(0, -1, 0)), "shift must be three integers >= 0, got (0, -1, 0)"),
        (dict(window=(1, 1, 1), image_window=(1, 2.0, 2)), "image_window must be three integers >= 1, got (1, 2.0, 2)"),
        (dict(window=(1, 1, 1), image_shift=(1, 2)), "image_shift must be three integers >= 0, got (1, 2)"),
        (dict(window=(1, 1, 1), wrap="roll"), "wrap must be one of join, mask, got 'roll'"),
        (dict(window=(1, 2**20, 2**20)),
         "window must have (2T-1)(2H-1)(2W-1) < 2**31, got (1, 1048576, 1048576)"),
    ],
)  # fmt: skip
def test_window_errors(arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"TokenLayout: {message}") + "$"):
        TokenLayout.from_grid((2, 2, 2)).window_table(**arguments)


def test_layer_errors():
    with pytest.raises(ValueError, match="TokenLayout: layer must be >= 0, got -1"):
        major_scan_order(TokenLayout.from_grid((1, 2, 2)), -1)


def test_empty(planner):
    for layout in (TokenLayout([], [], 2, 5), TokenLayout([], [], 0, 0), TokenLayout.from_grid((1, 2, 2), 0)):
        assert not layout.has_visual and not layout.visual_mask().any()
        assert layout.scan_order(1).shape == layout.reverse_seq_idx().shape == (layout.batch_size, layout.length)
        made = layout.window_table((1, 2, 2))
        assert made.tokens.shape == (0,) and made.offsets.tolist() == [0] and made.max_tokens == 0


def test_from_grid(planner):
    layout = TokenLayout.from_grid((2, 3, 4), batch_size=2)
    assert layout.blocks.tolist() == [[0, 2, 3, 4], [1, 2, 3, 4]] and (layout.batch_size, layout.length) == (2, 24)
    assert layout.visual_mask().all() and layout.positions.tolist() == [*range(24), *range(24)]
    assert layout is TokenLayout.from_grid([2, 3, 4], 2)


def test_takes_tensors_and_keeps_its_own_copy():
    blocks, positions = torch.tensor([[0, 1, 1, 2]]), np.array([1, 2], np.int32)
    layout = TokenLayout(blocks, positions, 1, 4)
    positions[0] = blocks[0, 0] = 3
    assert layout.positions.tolist() == [1, 2] and layout.blocks.tolist() == [[0, 1, 1, 2]]
    with pytest.raises(ValueError, match="read-only"):
        layout.positions[0] = 3


def test_cached_copied_pickled_shown():
    layout = TokenLayout([(0, 2, 3, 4), *[(1, 1, 1, 1)] * 5], [*range(24), *range(5)], 2, 30)
    assert layout.scan_order(1) is layout.scan_order(5, "cpu") is not layout.scan_order(2)
    assert layout.window_table((1, 2, 2)).tokens is layout.window_table([1, 2, 2], image_shift=(0, 0, 0)).tokens
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert torch.equal(other.scan_order(1), layout.scan_order(1)) and other.scan_order(1) is not layout.scan_order(
            1
        )
    shown = "TokenLayout(batch_size=2, length=30, blocks=[2x3x4@0, 1x1x1@1, 1x1x1@1, 1x1x1@1, ... 6 in all])"
    assert repr(layout) == shown


def test_survives_inference_mode():
    layout = TokenLayout.from_grid((1, 2, 3), batch_size=3)
    with torch.inference_mode():
        order = layout.scan_order(3)
    assert not order.is_inference()


def test_compiled_callers_do_not_recompile():
    compiles = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=compiles)
    def f(x, layout):
        made = layout.window_table((1, 2, 2), device=x.device)
        visited = torch.gather(x, 1, layout.scan_order(1, x.device).long())
        return visited * layout.visual_mask(x.device), x.flatten()[made.tokens.long()] + made.max_tokens

    for n in (4, 5, 6, 7):
        layout, x = TokenLayout.from_grid((1, n, n), 2), torch.randn(2, n * n)
        made, order = layout.window_table((1, 2, 2)), layout.scan_order(1)
        layout.visual_mask()
        visited, windows = f(x, layout)
        torch.testing.assert_close(visited, torch.gather(x, 1, order.long()))
        torch.testing.assert_close(windows, x.flatten()[made.tokens.long()] + 4)
    assert compiles.frame_count == 1


def test_first_use_inside_a_graph_breaks_it():
    def f(x, layout):
        return torch.gather(x, 1, layout.scan_order(1, x.device).long()) * 2

    layout, x = TokenLayout([(0, 1, 3, 2)], range(6), 1, 6), torch.randn(1, 6)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call only methods that were called before it"):
        torch.compile(f, fullgraph=True, backend="eager")(x, layout)
    torch.testing.assert_close(torch.compile(f, backend="eager")(x, layout), f(x, layout))


def test_numpy_planner_warns_once(monkeypatch):
    monkeypatch.setattr(_native, "_planners", {})
    monkeypatch.setattr(_native, "planner_error", lambda: "not built")
    monkeypatch.setattr(_registry, "_warned", set())
    with pytest.warns(linmu_ops.LinmuWarning) as caught:
        [TokenLayout([(0, 1, 1, 1)], [0], 1, 1) for _ in range(3)]
    assert [str(w.message) for w in caught] == ["linmu_ops.TokenLayout plans in numpy, slowly: not built"]


@pytest.fixture
def unread(monkeypatch):
    """As if no planner had been looked for yet."""
    monkeypatch.setattr(_native, "_planners", None)
    monkeypatch.setattr(_native, "_planner_errors", {})
    return monkeypatch


def test_stale_planners_are_refused(unread):
    for name in COMPILED:
        compiled_planner(name)
    unread.setattr(_native, "_planners", None)
    unread.setattr(reference, "VERSION", -1)
    assert _native.planner() is None
    assert _native.planner_error().count("version 1, not -1") == 2


def test_where_no_module_is_built_the_library_plans(unread):
    compiled_planner("liblinmu_cpu.so")
    unread.setattr(_native, "_planners", None)
    unread.setitem(sys.modules, "linmu_ops._C", None)
    assert list(_native.planners()) == ["liblinmu_cpu.so"] and set(_native.planner_errors()) == {"_C"}
    assert TokenLayout([(0, 1, 2, 2)], range(4), 1, 4).scan_order(3).tolist() == [[0, 2, 1, 3]]


def test_a_library_without_a_planner_is_refused(unread, tmp_path):
    """An older build of ours, say, or what is no library."""
    compiled_planner("liblinmu_cpu.so")
    for name, data in (("other", Path(_ctypes.__file__).read_bytes()), ("none", b"no library")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "liblinmu_cpu.so").write_bytes(data)
        unread.setattr(_native, "HERE", tmp_path / name)
        unread.setattr(_native, "_planners", None)
        assert "liblinmu_cpu.so" not in _native.planners() and _native.planner_errors()["liblinmu_cpu.so"]


def test_a_plan_is_freed_whether_it_was_made_or_not():
    library = compiled_planner("liblinmu_cpu.so")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def use():
        for _ in range(60):
            library.Plan(np.array([[0, 1, 512, 512]]), np.arange(2**18), 1, 2**18)
            with pytest.raises(ValueError, match="must name each position once"):
                library.Plan(np.array([[0, 1, 512, 512]]), np.zeros(2**18, int), 1, 2**18)

    use()
    before = resident()
    use()
    assert resident() - before < 60 * 2**20  # what is kept would be 4 MiB of each


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_planner_refuses_corrupt_arguments(name):
    compiled = compiled_planner(name)
    plan = compiled.Plan(np.array([[0, 1, 2, 2]]), np.arange(4), 1, 4)
    ones, zeros = (1, 1, 1), (0, 0, 0)
    for bad in (
        lambda: plan.scan_order(4), lambda: plan.scan_order(-1),
        lambda: plan.window_table((0, 1, 1), zeros, ones, zeros, False),
        lambda: plan.window_table(ones, (0, 0, -1), ones, zeros, True),
        lambda: plan.window_table((2**62, 2**62, 2**62), zeros, ones, zeros, False),
        lambda: compiled.Plan(np.zeros((1, 3), int), np.arange(4), 1, 4),
        lambda: compiled.Plan(np.zeros((0, 4), int), np.zeros((1, 1), int), 1, 4),
        lambda: compiled.Plan(np.zeros((0, 4), int), np.arange(0), 2**40, 2**40),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^TokenLayout: "):
            bad()
    for beyond in (
        lambda: plan.window_table(ones, (2**64, 0, 0), ones, zeros, True),
        lambda: compiled.Plan(np.zeros((0, 4), int), np.arange(0), 0, 2**64),
    ):
        with pytest.raises((ValueError, TypeError)):  # pybind11's own words
            beyond()
