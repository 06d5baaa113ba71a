"""What a tutor would point at: for each answer token the cells it is read off, and for each cell what is known of it.

The shipped teacher is trained with these hints beside its answers; they take no part in evaluation or distillation.
"""

from dataclasses import dataclass

import numpy as np

from linmu_distill.data.assets import CLASSES, LETTERS, is_letter
from linmu_distill.data.drawing import Sample
from linmu_distill.data.long_tasks import NEEDLE_SIZE
from linmu_distill.data.tasks import MAX_COUNT, VIDEO_FRAMES

UNKNOWN = -100
# Facts and how many values each has; those of an answer token are the facts of the cells it is read off.
FACTS = {
    "row": NEEDLE_SIZE[0],
    "column": NEEDLE_SIZE[1],
    "frame": VIDEO_FRAMES[1],
    "letter": NEEDLE_SIZE[1],
    "moved": 2,
    "symbol": len(CLASSES),
    "kind": 3,
}


@dataclass(frozen=True)
class Pointer:
    """An answer token and the cells it is read off."""

    token: int
    """Index among the answer tokens of all turns, ends included."""
    cells: tuple[int, ...]
    """Flat indices into `Sample.cells`."""
    share: float
    """How much of the attention each cell deserves; what is left belongs to the first token of the sequence."""
    facts: tuple[str, ...]
    """By which of its facts the cell is found."""


def cell_facts(sample: Sample) -> np.ndarray:
    """Facts of each visual token, `(N, len(FACTS))` int64, `UNKNOWN` where there is nothing to know."""
    cells = sample.cells
    frame, row, column = np.indices(cells.shape)
    kind = np.select([cells > len(LETTERS), cells > 0], [2, 1], 0)
    known = {"row": row, "column": column, "symbol": cells, "kind": kind}
    if sample.group == "video":
        # A cell may hold what it held at first by another digit's leaving and coming only if two digits move; one does.
        known |= {"frame": frame, "moved": (cells > 0) & (cells != cells[0])}
    if sample.group == "needle":
        letters = is_letter(cells)
        known["letter"] = np.where(letters, column - np.argmax(letters, axis=2, keepdims=True), UNKNOWN)
    nothing = np.full(cells.shape, UNKNOWN)
    return np.stack([known.get(name, nothing) for name in FACTS], axis=-1).reshape(-1, len(FACTS))


def cell_pointers(sample: Sample) -> list[tuple[int, tuple[int, ...]]]:
    """(cell, those it should look back at): a digit at where it began, a letter at its word so far, itself included."""
    cells = sample.cells.flatten()
    pairs: list[tuple[int, tuple[int, ...]]] = []
    if sample.group == "video":
        for digit in np.unique(cells[cells > 0]):
            path = np.flatnonzero(cells == digit).tolist()
            pairs += [(cell, (path[0],)) for cell in path]
    if sample.group == "needle":
        letters = np.flatnonzero(is_letter(cells)).tolist()
        pairs += [(cell, tuple(letters[: i + 1])) for i, cell in enumerate(letters)]
    return pairs


def answer_pointers(sample: Sample) -> list[Pointer]:
    """The pointers of all turns of a sample."""
    pointers, start = [], 0
    for question, answer in sample.turns:
        for token, cells, share, facts in _turn_pointers(sample, question, answer):
            pointers.append(Pointer(start + token, tuple(int(c) for c in cells), share, facts))
        start += len(answer) + 1
    return pointers


def _turn_pointers(sample: Sample, question: str, answer: str) -> list[tuple[int, np.ndarray, float, tuple[str, ...]]]:
    cells, words = sample.cells, question.split()
    frames, rows, columns = cells.shape
    flat = np.arange(cells.size).reshape(cells.shape)

    def holding(symbol: str, part: np.ndarray = flat) -> np.ndarray:
        return part[cells.reshape(-1)[part] == CLASSES.index(symbol)]

    if sample.group == "read":
        # "k text": two characters, the cells, a newline.
        return [(k * (columns + 3) + 2 + c, flat[0, k, c : c + 1], 1.0, ("row", "column"))
                for k in range(rows) for c in range(columns)]  # fmt: skip
    if sample.group == "line":
        k = int(words[1]) - 1
        return [(c, flat[0, k, c : c + 1], 1.0, ("row", "column")) for c in range(columns)]
    if words[0] == "where":
        return [(i, holding(words[2]), 1.0, ("symbol",)) for i in (1, 2)]
    if words[0] == "how":
        return [(1, holding(words[2]), 1.0 / (MAX_COUNT + 3), ("symbol",))]
    if words[0] == "track":
        return [
            (2 + 3 * t + i, holding(words[1], flat[t]), 1.0, ("frame", "symbol")) for t in range(frames) for i in (0, 1)
        ]
    if words == ["what", "moved"]:
        last, first = holding(answer[0], flat[-1]), holding(answer[0], flat[0])
        read_off = {
            0: (last, ("moved",)),
            **dict.fromkeys((2, 3), (first, ("frame", "symbol"))),
            **dict.fromkeys((5, 6), (last, ("frame", "symbol"))),
        }
        return [(i, where, 1.0, facts) for i, (where, facts) in read_off.items()]
    if words == ["digit"]:
        return [(0, holding(answer), 1.0, ("kind",))]
    if words == ["word"]:
        letters = flat[is_letter(cells)]
        return [(i, letters[i : i + 1], 1.0, ("letter",)) for i in range(len(answer))]
    raise ValueError(f"no pointers for the question {question!r}")
