"""The emulator itself: its instructions against plain products, its faults, and index arithmetic swept on the host."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from linmu_ops import TokenLayout
from tests.ops.cases.window_attention import make_layout

I64 = ctypes.c_int64


@pytest.fixture
def probes(emulated):
    return emulated


def at(t):
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_is_a_matrix_product_of_the_documented_fragments(probes, dtype):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    expected = d + a.float() @ b.float()
    probes.probe_mma(dtype == torch.float16, at(a), at(b), at(d))
    torch.testing.assert_close(d, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mn_major", range(4))  # bit 0: A, bit 1: B; else K-major
def test_products_of_tiles(probes, dtype, mn_major):
    a, b = torch.randn(32, 48).to(dtype), torch.randn(32, 48).to(dtype)
    product, again = torch.full((32, 32), torch.nan), torch.full((32, 48), torch.nan)
    stored = [t.T.contiguous() if mn_major >> i & 1 else t for i, t in enumerate((a, b))]
    code = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}[dtype]
    probes.probe_tiles(code, mn_major, at(stored[0]), at(stored[1]), at(product), at(again), 1)
    torch.testing.assert_close(product, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)
    if not mn_major & 2:
        torch.testing.assert_close(again, product.to(dtype).float() @ b.float(), rtol=1e-5, atol=1e-3)


def test_an_asynchronous_copy_arrives_when_waited_for(probes):
    a = torch.ones(32, 48)
    product, again = torch.zeros(32, 32), torch.zeros(32, 48)
    probes.probe_tiles(0, 0, at(a), at(a), at(product), at(again), 0)
    assert product.isnan().all()


@pytest.mark.parametrize(
    "fault, message",
    [(0, ""), (1, "before it is made"), (2, "deadlock"), (3, "whole pieces of 16 bytes")],
)
def test_tma_copies_arrive_when_their_barrier_is_waited_for(probes, fault, message):
    data = torch.arange(9 * 64).view(9, 64).short()
    before, after = torch.zeros(9, 64).short(), torch.zeros(9, 64).short()
    text = ctypes.create_string_buffer(400)
    probes.probe_tma(at(data), fault, at(before), at(after), text, len(text))
    assert message in text.value.decode() and bool(message) == bool(text.value)
    if not message:
        assert (before == -1).all()
        data[7] = 0  # beyond the tensor
        assert after.equal(data)


@pytest.mark.parametrize(
    "fault, message",
    [(0, ""), (1, "beyond shared memory"), (3, "all lanes"), (4, "diverges")],
)
def test_faults_are_seen(probes, fault, message):
    out, text = torch.full((2, 64), torch.nan), ctypes.create_string_buffer(400)
    probes.probe_fault(fault, at(out), text, len(text))
    assert message in text.value.decode() and bool(message) == bool(text.value)
    if not message:
        assert out.equal(torch.arange(63, -1, -1.0).expand(2, 64))


@pytest.mark.parametrize("blocks", [1, 3])  # a product is computed when issued, or when waited for
@pytest.mark.parametrize(
    "fault, message",
    [
        (0, ""), (1, "written while a product is on its way"), (2, ""), (3, "never waited for"),
        (4, "has not fenced"), (5, "has not fenced"), (6, ""),
    ],
)  # fmt: skip
def test_products_are_there_once_waited_for(probes, fault, message, blocks):
    before, after, text = torch.zeros(128, 2), torch.zeros(128, 2), ctypes.create_string_buffer(400)
    probes.probe_product(fault, blocks, at(before), at(after), text, len(text))
    assert message in text.value.decode() and bool(message) == bool(text.value)
    if not message:
        assert before[:, 0].eq(16).all() and before[:, 1].isnan().all()
        assert after.equal(torch.tensor([16.0, 16 if fault == 2 else 32]).expand(128, 2))


@pytest.mark.parametrize("fault, message", [(0, ""), (1, "deadlock")])
def test_barriers_count_arrivals(probes, fault, message):
    out, text = torch.zeros(64), ctypes.create_string_buffer(400)
    probes.probe_arrivals(fault, at(out), text, len(text))
    assert message in text.value.decode() and bool(message) == bool(text.value)
    if not message:
        assert out.equal(torch.arange(63, -1, -1.0))


def test_a_missing_barrier_shows(probes):
    out, text = torch.zeros(2, 64), ctypes.create_string_buffer(400)
    probes.probe_fault(2, at(out), text, len(text))
    assert out.isnan().any(1).all()


def windows(probes, tokens, offsets, B, L, R, rotary_batch, strides, head):
    entries = torch.full((len(tokens), 3), -7, dtype=torch.int64)
    ranges = torch.empty(len(offsets) - 1, 2, dtype=torch.int64)
    numbers = [I64(n) for n in (len(offsets) - 1, len(tokens), B, L, R)]
    probes.probe_windows(
        at(tokens), at(offsets), *numbers, int(rotary_batch), *map(I64, (*strides, head)), at(entries), at(ranges)
    )
    return entries, ranges


@pytest.mark.parametrize("wrap", ["join", "mask"])
@pytest.mark.parametrize("rotary_batch", [False, True])
def test_windows_are_those_of_the_layout(probes, wrap, rotary_batch):
    layout = make_layout(2)
    strides = (3 * 2**40, 5 * 2**33, 2**32)  # elements: far beyond 32 bits
    for window, shift in itertools.product([(1, 1, 1), (2, 2, 2), (3, 2, 3), (9, 9, 9)], [(0, 0, 0), (1, 1, 1)]):
        table = layout.window_table(window, shift, wrap, None, None, torch.device("cpu"))
        entries, ranges = windows(probes, table.tokens, table.offsets, 2, 90, 6, rotary_batch, strides, 3)
        assert ranges[:, 0].equal(table.offsets[:-1].long()) and ranges.sum(1).equal(table.offsets[1:].long())
        token = table.tokens.long()
        assert entries[:, 0].equal(token)
        assert entries[:, 1].equal(token // 90 * strides[0] + token % 90 * strides[1] + 3 * strides[2])
        assert entries[:, 2].equal((token if rotary_batch else token % 90) * 6)


def test_windows_of_a_corrupt_table_lie_within_it(probes):
    tokens = torch.tensor([5, -1, 180, 2**31 - 1, -(2**31), 179], dtype=torch.int32)
    offsets = torch.tensor([-9, 4, 2, 900, 3, -(2**31)], dtype=torch.int32)
    entries, ranges = windows(probes, tokens, offsets, 2, 90, 6, True, (90, 1, 0), 0)
    assert (ranges >= 0).all() and (ranges.sum(1) <= 6).all()
    assert entries[:, 0].tolist() == [5, -1, -1, -1, -1, 179]


def test_bias_index_is_the_relative_position(probes):
    sizes = (3, 2, 4)
    layout = TokenLayout.from_grid((3, 4, 8), 1)
    table = layout.window_table(sizes, (0, 0, 0), "join", None, None, torch.device("cpu"))
    bias = torch.arange(5 * 3 * 7).view(5, 3, 7)
    probes.probe_bias_index.restype = I64
    for begin, end in itertools.pairwise(table.offsets.tolist()):
        where = [(t // 32, t // 8 % 4, t % 8) for t in table.tokens[begin:end].tolist()]
        coords = table.coords[begin:end].tolist()
        for (a, i), (b, j) in itertools.product(zip(where, coords, strict=True), repeat=2):
            expected = bias[tuple(x - y + s - 1 for x, y, s in zip(a, b, sizes, strict=True))]
            assert probes.probe_bias_index(I64(105), I64(i), I64(j)) == expected
    assert (
        probes.probe_bias_index(I64(105), I64(53), I64(0)) == -1 == probes.probe_bias_index(I64(105), I64(0), I64(60))
    )
