"""Where the visual tokens of a batch are, and what every layer derives from it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from . import _layout_part, _native, _registry
from .reference import token_layout as reference

WRAPS = ("join", "mask")
SLAB_CHUNK = 64  # tokens of a slab that stand together in `TokenLayout.slab_chunks`


class WindowTable(NamedTuple):
    """The windows of a batch, one after the other. Window i has the entries offsets[i] to offsets[i + 1] - 1.

    tokens: (num_visual,) int32. Flat index row * L + position of each token, in window order.
    offsets: (num_windows + 1,) int32. Where each window starts; no window is empty.
    coords: (num_visual,) int32. In-window coordinate (ct * (2 wh - 1) + cy) * (2 ww - 1) + cx of each token, for the
        unclamped window (wt, wh, ww): coords[i] - coords[j] + ((wt - 1) * (2 wh - 1) + wh - 1) * (2 ww - 1) + ww - 1
        indexes a flattened (2 wt - 1, 2 wh - 1, 2 ww - 1) bias.
    max_tokens: tokens of the largest window.
    """

    tokens: Tensor
    offsets: Tensor
    coords: Tensor
    max_tokens: int


class Cut(NamedTuple):
    """What a part of a layout tells of slabs (see `TokenLayout.slab_chunks`) that lie in several calls. At most one of
    a row has begun in earlier calls, and at most one goes on in later ones.

    begin: (B,) int64. Position of the first token of the slab that goes on; -1: it is in an earlier call; L: none does.
    first: (B,) int64. Number, in its block, of the first token of the slab that has begun; 0 where none has.
    before: (B,) int64. How many visual tokens of it came in earlier calls; 0 where none has begun.
    queries: (n, SLAB_CHUNK) int64. Flat positions of its tokens in this call, by windows; a window's last one fills up.
    keys: (n, k) int64. Numbers, counted from `first`, of earlier tokens of the same window; -1 fills up.
    inverse: (B, L) int64. Where a token stands in the flattened `queries`; -1 where it does not.
    rows: on the host, for each row its begin, its before, and how many tokens of text come from its begin on.
    """

    begin: Tensor
    first: Tensor
    before: Tensor
    queries: Tensor
    keys: Tensor
    inverse: Tensor
    rows: tuple[tuple[int, int, int], ...]


class Partition(NamedTuple):
    """How blocks are partitioned: the arguments of `TokenLayout.window_table`, in their order."""

    window: Sequence[int]
    shift: Sequence[int] = (0, 0, 0)
    wrap: str = "join"
    image_window: Sequence[int] | None = None
    image_shift: Sequence[int] | None = None

    def of(self, image: bool) -> tuple[Sequence[int], Sequence[int]]:
        """Window and shift of a block: of an image (T = 1) or of a video."""
        window = self.image_window if image and self.image_window is not None else self.window
        shift = self.image_shift if image and self.image_shift is not None else self.shift
        return window, shift


class TokenLayout:
    """Where the visual tokens of a batch are.

    An image or video is a block of (T, H, W) tokens within a row. Its tokens need not be adjacent: there may be
    timestamps between frames, or a newline token after each row of patches. But between its first and its last token no
    other block may begin.

    Args:
        blocks: (num_blocks, 4) integers. Rows (batch row, T, H, W); T = 1 is an image.
        positions: (num_visual,) integers. For each block in turn, for each of its tokens in t, y, x order, its
            position in the row.
        batch_size: rows B.
        length: tokens per row L; B * L < 2**31.
        spans: (num_blocks, 2) integers (first, count). Of a part of longer rows: so many tokens of a block, in t, y, x
            order, came in earlier calls, and so many are in this one. T, H and W are those of the whole block. None:
            all blocks are whole. `part` makes such a layout.

    Raises:
        ValueError: the table does not describe disjoint blocks inside (B, L), in one line that names the entry.

    Notes:
        Build it once per forward, outside compiled graphs, and share it between layers.

        A method computes its result on first use. The layout keeps it per device, and per layer mod 4 or per window.
        Later calls are a dictionary lookup (2 us, 9 us for a window table). The tensors are shared: do not write to
        them.

        In a `torch.compile`d function a kept result is an ordinary input, and the next layout needs no recompilation. A
        first use there breaks the graph. So call once, outside, what the graph will use.

        Compiled code plans on the host. Where none is built numpy does, with one warning. Two rows of 32k tokens, a
        16 x 32 x 64 video each, with four scan orders, mask, segments and a shifted (16, 4, 4) table took 1 ms compiled
        and 26 ms in numpy, on one core of a shared x86-64 server.

    Source: LinMU, arXiv:2601.01322. Reference: linmu_ops/reference/token_layout.py.
    """

    def __init__(self, blocks: Any, positions: Any, batch_size: int, length: int, spans: Any = None) -> None:
        self.batch_size = _integer("batch_size", batch_size, 0)
        self.length = _integer("length", length, 0)
        if self.batch_size * self.length >= 2**31:
            raise ValueError(f"TokenLayout: batch_size * length must be < 2**31, got {batch_size} * {length}")
        self.blocks = _integers("blocks", blocks, "(num_blocks, 4)", (-1, 4))
        self.positions = _integers("positions", positions, "(num_visual,)", (-1,))
        self.spans = whole = _layout_part.whole_spans(self.blocks)
        places, self._margins = self.positions, None
        planned_length = self.length
        if spans is not None:
            given = _integers("spans", spans, "(num_blocks, 2)", (-1, 2))
            self.spans = _layout_part.checked_spans(self.blocks, self.positions, given)
        self.is_part = self.spans != whole
        if self.is_part:
            outside = (self.positions < 0) | (self.positions >= self.length)
            if outside.any():
                raise ValueError(
                    f"TokenLayout: positions must be in 0..{self.length - 1}, got {self.positions[outside][0]}"
                )
            places, planned_length, self._margins = _layout_part.planned(
                self.blocks, self.positions, self.spans, self.length
            )
        self._plan = _planner().Plan(self.blocks, places, self.batch_size, planned_length)
        self._cache: dict[Any, Any] = {}

    @staticmethod
    def from_grid(grid: Sequence[int], batch_size: int = 1) -> TokenLayout:
        """Every token visual: each row is one (T, H, W) block in t, y, x order. Equal calls share one layout."""
        return _from_grid(_triple("grid", grid, 1), _integer("batch_size", batch_size, 0))

    @classmethod
    def from_input_ids(
        cls, input_ids: Any, token_ids: int | Sequence[int], grids: Sequence[Sequence[int]]
    ) -> TokenLayout:
        """Find blocks by their placeholder tokens.

        Args:
            input_ids: (B, L) integers, padded on either side.
            token_ids: the placeholder's id, or several (image and video).
            grids: (T, H, W) of each block, in tokens (after patch merging), in order of appearance, first row first.
                Each takes the next T*H*W placeholders of its row, whatever lies between them.

        Raises:
            ValueError: a row's placeholders are not those of whole grids, or grids are left over.
        """
        ids = _integers("input_ids", input_ids, "(B, L)", (-1, -1))
        wanted = [_integer("token_ids", i) for i in (token_ids if isinstance(token_ids, Sequence) else (token_ids,))]
        sizes = [_triple(f"grids[{i}]", g, 1) for i, g in enumerate(grids)]
        rows, positions = np.nonzero(np.isin(ids, wanted))
        counts = np.bincount(rows, minlength=len(ids)).tolist()
        blocks: list[tuple[int, ...]] = []
        for row, count in enumerate(counts):
            taken = 0
            while taken < count:
                if len(blocks) == len(sizes):
                    raise ValueError(
                        f"TokenLayout: row {row} must have {taken} placeholder tokens for its grids, got {count}"
                    )
                t, h, w = sizes[len(blocks)]
                if taken + t * h * w > count:
                    raise ValueError(
                        f"TokenLayout: row {row} must have {taken + t * h * w} placeholder tokens for its grids up to "
                        f"grids[{len(blocks)}] = {(t, h, w)}, got {count}"
                    )
                taken += t * h * w
                blocks.append((row, t, h, w))
        if len(blocks) < len(sizes):
            raise ValueError(
                f"TokenLayout: grids must be {len(blocks)}, as many as the placeholder tokens fill, got {len(sizes)}"
            )
        return cls(blocks, positions, *ids.shape)

    def part(self, start: int, stop: int) -> TokenLayout:
        """The layout of the positions from `start` to `stop`, for a call that has these tokens alone. It may cut images
        and videos whose tokens lie in the order of their positions.

        Windows fall where the whole block puts them. `ExactMMATE` goes on from the state of the call before.
        """
        start, stop = _integer("start", start, 0), _integer("stop", stop, 0)
        if not start <= stop <= self.length:
            raise ValueError(f"TokenLayout: start, stop must be in order within {self.length}, got {start}, {stop}")
        blocks, positions, spans = _layout_part.part_of(self.blocks, self.positions, self.spans, start, stop)
        return TokenLayout(blocks, positions, self.batch_size, stop - start, spans)

    @property
    def num_visual(self) -> int:
        """Visual tokens in the batch."""
        return len(self.positions)

    @property
    def has_visual(self) -> bool:
        return len(self.positions) > 0

    def visual_mask(self, device: torch.device | str | None = None) -> Tensor:
        """(B, L) bool, True at visual tokens: the mask of the `Reverse` of `ssd_scan`."""
        return self._segments(device)[0]

    def reverse_seq_idx(self, device: torch.device | str | None = None) -> Tensor:
        """(B, L) int32: i + 1 from the first to the last token of blocks[i], text between them included; else 0."""
        return self._segments(device)[1]

    def scan_order(self, layer: int, device: torch.device | str | None = None) -> Tensor:
        """(B, L) int32, the position visited at t in layer `layer`; see `major_scan_order`."""
        if layer < 0:
            raise ValueError(f"TokenLayout: layer must be >= 0, got {layer}")
        if self.is_part:
            raise ValueError("TokenLayout: scan_order must be of whole images and videos, got a part of one")
        mode = layer % 4
        return self._cached(("scan_order", mode), device, lambda plan: (plan.scan_order(mode),))[0]

    def window_table(
        self,
        window: Sequence[int],
        shift: Sequence[int] = (0, 0, 0),
        wrap: str = "join",
        image_window: Sequence[int] | None = None,
        image_shift: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> WindowTable:
        """Partition every block into shifted windows.

        In a dimension of size s with window w and shift h (mod s), the token at c is in window ((c - h) mod s) // w, at
        in-window coordinate ((c - h) mod s) % w. The last window is smaller where w does not divide s. Where w >= s
        there is one window and no shift.

        Args:
            window: (T, H, W), each >= 1, with (2T - 1)(2H - 1)(2W - 1) < 2**31.
            shift: (T, H, W), each >= 0.
            wrap: "join": tokens that wrapped around an edge (c < h) share a window with those at the other edge;
                "mask": they form a window of their own, as Swin's mask does.
            image_window: window of blocks with T = 1; `window` if None.
            image_shift: shift of blocks with T = 1; `shift` if None.
            device: where the tensors go; the CPU if None.
        """
        given = _window_key(Partition(window, shift, wrap, image_window, image_shift))

        def table(plan: Any) -> tuple[Any, ...]:
            whole = plan.window_table(*given)
            return whole if self._margins is None else _layout_part.table_of_part(whole, self.length, self._margins)

        return WindowTable(*self._cached(("window_table", *given), device, table))

    def slab_chunks(
        self,
        window: Sequence[int],
        shift: Sequence[int] = (0, 0, 0),
        wrap: str = "join",
        image_window: Sequence[int] | None = None,
        image_shift: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The visual tokens by slabs: the frames of a block whose windows begin together. A slab has whole chunks.

        The arguments are those of `window_table`.

        Returns:
            tokens: (n, SLAB_CHUNK) int64. Flat positions row * L + position. A slab's last token fills up its last
                chunk.
            begin: (n,) int64. Flat position of the first token of a chunk's slab; -1 where that is in an earlier call.
            inverse: (B, L) int64. Where a visual token stands in the flattened `tokens`; 0 at text.
            between: (n, k) int64. Flat positions of the text between the first and the last token of a chunk's slab; -1
                fills up.
        """
        given = _window_key(Partition(window, shift, wrap, image_window, image_shift))
        return self._cached(("slab_chunks", *given), device, lambda plan: self._slabs(*given))

    def _slabs(self, window: Any, shift: Any, image_window: Any, image_shift: Any, mask: bool) -> tuple[Any, ...]:
        tokens, begin = [np.zeros((0, SLAB_CHUNK), np.int64)], [np.zeros(0, np.int64)]
        inverse = np.zeros(self.batch_size * self.length, np.int64)
        text = np.ones(self.batch_size * self.length, bool)
        rows = np.repeat(self.blocks[:, 0], [count for _, count in self.spans])
        text[rows * self.length + self.positions] = False
        between: list[np.ndarray] = []
        chunks = 0
        for (row, frames, height, width), positions, (came, count) in zip(
            self.blocks.tolist(), _layout_part.split(self.positions, self.spans), self.spans, strict=True
        ):
            full, moved = (image_window, image_shift) if frames == 1 else (window, shift)
            part = np.repeat(_layout_part.axis_parts(frames, full[0], moved[0], mask), height * width)
            first = dict(zip(*(t.tolist() for t in np.unique(part, return_index=True)), strict=True))
            flat, part = row * self.length + positions, part[came : came + count]
            for slab in np.unique(part):
                own = np.sort(flat[part == slab], axis=None)
                many = -(-own.size // SLAB_CHUNK)
                inverse[own] = chunks * SLAB_CHUNK + np.arange(own.size)
                tokens.append(np.pad(own, (0, many * SLAB_CHUNK - own.size), mode="edge").reshape(many, SLAB_CHUNK))
                earlier = first[slab] < came
                begin.append(np.full(many, -1 if earlier else own[0]))
                after = row * self.length if earlier else own[0]
                between += [after + np.flatnonzero(text[after : own[-1]])] * many
                chunks += many
        filled = np.full((chunks, max(map(len, between), default=0)), -1, np.int64)
        for row, mine in zip(filled, between, strict=True):
            row[: len(mine)] = mine
        return np.concatenate(tokens), np.concatenate(begin), inverse.reshape(self.batch_size, self.length), filled

    def cut(self, windows: Partition, device: torch.device | str | None = None) -> Cut:
        """Of a part: the slabs that lie in several calls. Windows have wrap="mask": one that wraps around in time would
        be in two slabs."""
        given = _window_key(windows)
        if windows.wrap != "mask":
            raise ValueError(f"TokenLayout: wrap must be 'mask' for a part of an image or video, got {windows.wrap!r}")
        shape = self.batch_size, self.length

        def tables(plan: Any) -> tuple[Any, ...]:
            return _layout_part.cut_tables(self.blocks, self.positions, self.spans, shape, given, SLAB_CHUNK)

        return Cut(*self._cached(("cut", *given), device, tables))

    def numbers(self, device: torch.device | str | None = None) -> Tensor:
        """(B, L) int64: the number of a visual token in its block, in t, y, x order; -1 at text."""

        def number(plan: Any) -> tuple[Any]:
            out = np.full((self.batch_size, self.length), -1)
            own = _layout_part.split(self.positions, self.spans)
            for row, positions, (first, count) in zip(self.blocks[:, 0], own, self.spans, strict=True):
                out[row, positions] = first + np.arange(count)
            return (out,)

        return self._cached(("numbers",), device, number)[0]

    def text_chunks(self, size: int, device: torch.device | str | None = None) -> Tensor:
        """(n,) int64: the chunks of `size` tokens, row after row, in which not every token is visual."""

        def chunks(plan: Any) -> tuple[Any]:
            text = ~self._planned_segments(plan)[0]
            text = np.pad(text, ((0, 0), (0, -self.length % size)))
            return (np.flatnonzero(text.reshape(-1, size).any(1)),)

        return self._cached(("text_chunks", size), device, chunks)[0]

    def _segments(self, device: torch.device | str | None) -> Any:
        return self._cached(("segments",), device, self._planned_segments)

    def _planned_segments(self, plan: Any) -> tuple[Any, ...]:
        mask, index = plan.segments()
        if self._margins is None:
            return np.asarray(mask, dtype=bool), index
        own = slice(self._margins.before, self._margins.before + self.length)
        return np.ascontiguousarray(np.asarray(mask, dtype=bool)[:, own]), np.ascontiguousarray(index[:, own])

    def _cached(self, key: tuple[Any, ...], device: Any, compute: Callable[[Any], tuple[Any, ...]]) -> Any:
        where = torch.device("cpu" if device is None else device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        found = self._cache.get((where, *key))
        if found is None:
            found = self._fill((where, *key), compute)
        if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() == 0:
            return found
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if mode is None or mode.allow_non_fake_inputs:
            return found
        return tuple(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in found)

    def _fill(self, key: tuple[Any, ...], compute: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
        # Not is_compiling(), which holds as well in Python that runs, untraced, while something is being traced; nor
        # torch.compiler.disable, which would import the compiler with this module.
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError("TokenLayout: inside a compiled graph, call only methods that were called before it")
        # It outlives the mode or transform it is made under, whose tensors are fake, wrapped, or not to be saved for a
        # later backward.
        with torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack():
            made = tuple(
                torch.from_numpy(v).to(key[0]) if isinstance(v, np.ndarray) else v for v in compute(self._plan)
            )
        self._cache[key] = made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        spans = self.spans if self.is_part else None
        return type(self), (self.blocks, self.positions, self.batch_size, self.length, spans)

    def __repr__(self) -> str:
        shown = [f"{t}x{h}x{w}@{row}" for row, t, h, w in self.blocks[:4].tolist()]
        more = [f"... {len(self.blocks)} in all"] if len(self.blocks) > 4 else []
        blocks = ", ".join(shown + more)
        return f"TokenLayout(batch_size={self.batch_size}, length={self.length}, blocks=[{blocks}])"


def major_scan_order(layout: TokenLayout, layer: int, device: torch.device | str | None = None) -> Tensor:
    """The order in which a layer visits the tokens: the token_order of `ssd_scan`.

    A (T, H, W) block is visited in the order t,y,x · t,x,y · y,x,t · x,y,t for the layer mod 4; the last axis is the
    fastest. The visits fall on the block's own positions, in rising order. All other tokens stay where they are.

    Args:
        layout: TokenLayout.
        layer: >= 0.
        device: where the tensor goes; the CPU if None.

    Returns:
        (B, L) int32, a permutation per row: the position visited at t. Cached in the layout; do not write to it.

    Source: LinMU, arXiv:2601.01322 (called RMS there).
    """
    return layout.scan_order(layer, device)


@lru_cache(maxsize=32)
def _from_grid(grid: tuple[int, int, int], batch_size: int) -> TokenLayout:
    t, h, w = grid
    rows = np.arange(batch_size)
    return TokenLayout(
        np.stack([rows, *(np.full_like(rows, s) for s in grid)], axis=1),
        np.tile(np.arange(t * h * w), batch_size),
        batch_size,
        t * h * w,
    )


def _planner() -> Any:
    """The compiled planner, else the numpy one."""
    compiled = _native.planner()
    if compiled is not None:
        return compiled
    _registry.warn_once("TokenLayout", f"linmu_ops.TokenLayout plans in numpy, slowly: {_native.planner_error()}", 4)
    return reference


def _window_key(windows: Partition) -> tuple[Any, ...]:
    """How blocks are partitioned, checked, as a planner takes it."""
    (window, shift), (image_window, image_shift) = windows.of(image=False), windows.of(image=True)
    given = (
        _triple("window", window, 1),
        _triple("shift", shift, 0),
        _triple("image_window", image_window, 1),
        _triple("image_shift", image_shift, 0),
        windows.wrap == "mask",
    )
    if windows.wrap not in WRAPS:
        raise ValueError(f"TokenLayout: wrap must be one of {', '.join(WRAPS)}, got {windows.wrap!r}")
    for name, w in (("window", given[0]), ("image_window", given[2])):
        if (2 * w[0] - 1) * (2 * w[1] - 1) * (2 * w[2] - 1) >= 2**31:
            raise ValueError(f"TokenLayout: {name} must have (2T-1)(2H-1)(2W-1) < 2**31, got {w}")
    return given


def _integer(name: str, value: Any, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"TokenLayout: {name} must be an integer, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"TokenLayout: {name} must be >= {least}, got {number}")
    return number


def _triple(name: str, values: Any, least: int) -> tuple[int, int, int]:
    try:
        t, h, w = (operator.index(v) for v in values)
        if min(t, h, w) >= least:
            return t, h, w
    except (TypeError, ValueError):
        pass  # not iterable, not integers, not three
    raise ValueError(f"TokenLayout: {name} must be three integers >= {least}, got {values}")


def _integers(name: str, values: Any, want: str, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only int64 copy; -1 in `shape` is any size."""
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.size == 0 and not isinstance(values, (np.ndarray, Tensor)):
        array = np.zeros([max(s, 0) for s in shape], np.int64)  # [] has neither shape nor dtype
    if array.dtype.kind not in "iu":
        raise ValueError(f"TokenLayout: {name} must be integers, got {array.dtype}")
    if array.ndim != len(shape) or any(s not in (-1, n) for s, n in zip(shape, array.shape, strict=True)):
        raise ValueError(f"TokenLayout: {name} must be {want}, got shape {array.shape}")
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array
