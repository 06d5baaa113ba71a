"""Cases, costs and peers of the layout planner: what one forward of a model asks for, from scratch."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from bench.peers import Bench, Case, Inputs, Peer, case
from linmu_ops import TokenLayout, token_layout
from linmu_ops.reference import token_layout as reference

CASES = {
    "tiny": case(grids=((2, 4, 4),), text=16),
    "image": case(quick=True, grids=((1, 64, 64),), text=128),
    "video, 64k tokens": case(quick=True, grids=((64, 32, 32),), text=256),
}
IMAGE_TOKEN = 7


def make(c: Case, dtype: torch.dtype, device: str) -> Inputs:
    row = [0] * c["text"]
    for t, h, w in c["grids"]:
        row += [IMAGE_TOKEN] * (t * h * w) + [0] * c["text"]
    return dict(input_ids=torch.tensor([row]), grids=c["grids"])


def plan(input_ids: torch.Tensor, grids: Any) -> tuple[torch.Tensor, ...]:
    """The layout, the four visiting orders, the reverse segments, and the windows of an even and an odd layer."""
    layout = TokenLayout.from_input_ids(input_ids, IMAGE_TOKEN, grids)
    out = [layout.scan_order(layer) for layer in range(4)]
    out += [layout.visual_mask(), layout.reverse_seq_idx()]
    for shift in ((0, 0, 0), (8, 2, 2)):
        table = layout.window_table(
            (16, 4, 4), shift, image_window=(1, 16, 16), image_shift=tuple(4 * s for s in shift)
        )
        out += [table.tokens, table.offsets, table.coords]
    return tuple(out)


def flops(c: Case, backward: bool) -> float:
    return 0


def num_bytes(c: Case, itemsize: int, backward: bool) -> float:
    visual = sum(t * h * w for t, h, w in c["grids"])
    length = visual + (1 + len(c["grids"])) * c["text"]
    return 8 * length + 4 * length * 5 + length + 2 * 8 * visual


def _numpy(c: Case) -> Peer:
    def run(**inputs: Any) -> Any:
        with mock.patch.object(token_layout, "_planner", return_value=reference):
            return plan(**inputs)

    return Peer(run)


BENCH = Bench("token_layout", CASES, make, flops, num_bytes, {"numpy": _numpy}, call=plan, products=False)
