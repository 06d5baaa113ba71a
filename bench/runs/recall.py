"""How many pairs a state of fixed size holds: associative recall by one layer, trained, as the pairs grow past it.

    python -m bench.runs.recall [--steps 1500] [--seeds 3]

A sequence shows n tokens, each a key and its value, then the n keys in another order; at each the value is asked for.
One token holds a whole pair, so that nothing is tested but memory. Attention keeps all pairs; a scan keeps, for each
head, a state of head size x head size. Goes on where it stopped: results are lines of
bench/results/ablations/recall.jsonl, the page is bench/reports/recall.md.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from linmu_ops._tables import markdown
from linmu_ops.nn import MMATE, MMATEConfig

from .. import plots
from ..provenance import where
from .page import accuracy
from .table import Results

KEYS, VALUES, HEADS = 512, 64, 4
PAIRS = (4, 8, 16, 32, 64, 128, 256)
MIXERS = {"attention, head size 16": (False, 16), "scan, head size 16": (True, 16), "scan, head size 32": (True, 32)}
"""Name -> (a scan, head size)."""


class Attention(nn.Module):
    """Causal softmax attention without positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        q, k, v = self.qkv(z).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Memory(nn.Module):
    """Embeddings of keys and values, one mixer, one language head."""

    def __init__(self, scan: bool, head_dim: int) -> None:
        super().__init__()
        dim = HEADS * head_dim
        self.key, self.value = nn.Embedding(KEYS, dim), nn.Embedding(VALUES, dim)
        self.norm, self.last = nn.RMSNorm(dim), nn.RMSNorm(dim)
        options = MMATEConfig(branches="flex", reverse=False, head_norm=True, initial_decay=0.9999)
        self.mixer = MMATE(dim, HEADS, config=options) if scan else Attention(dim)
        self.head = nn.Linear(dim, VALUES)

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        """Keys, their values and the keys that are asked for, each (B, n), to logits (B, n, VALUES)."""
        z = torch.cat((self.key(keys) + self.value(values), self.key(asked)), dim=1)
        return self.head(self.last(z + self.mixer(self.norm(z)))[:, keys.shape[1] :])


def sequences(count: int, pairs: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, the keys asked for and the right answers, each (count, pairs); keys of a sequence differ."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, KEYS, generator=rng).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (count, pairs), generator=rng)
    order = torch.rand(count, pairs, generator=rng).argsort(1)
    return keys, values, keys.gather(1, order), values.gather(1, order)


def train(scan: bool, head_dim: int, pairs: int, seed: int, steps: int, held_out: int = 100) -> list[float]:
    """Train a memory on fresh sequences; the share of right answers in each held-out one."""
    torch.manual_seed(seed)
    model = Memory(scan, head_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        *inputs, target = sequences(max(8, 1024 // pairs), pairs, 1 + seed * steps + step)
        loss = functional.cross_entropy(model(*inputs).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    *inputs, target = sequences(held_out, pairs, 0)
    with torch.no_grad():
        return (model.eval()(*inputs).argmax(-1) == target).double().mean(1).tolist()


def run(pairs: tuple[int, ...], seeds: int, steps: int, results: Results, reports: Path) -> Path:
    """Run what is missing, seed by seed, and write the page."""
    for seed in range(seeds):
        for name, (scan, head_dim) in MIXERS.items():
            for count in pairs:
                key = f"{count} {seed} {steps}"
                if (name, key) not in results.read():
                    began = time.perf_counter()
                    right = train(scan, head_dim, count, seed, steps)
                    seconds = time.perf_counter() - began
                    facts = {"row": name, "key": key, "seed": seed, "pairs": count, "steps": steps, "right": right}
                    results.append({**facts, "seconds": seconds, **where("cpu")})
                    print(f"{name}, {count} pairs, seed {seed}: {np.mean(right):.1%}  ({seconds:.0f} s)")
                    write_page(pairs, steps, results, reports)
    return write_page(pairs, steps, results, reports)


def write_page(pairs: tuple[int, ...], steps: int, results: Results, folder: Path) -> Path:
    """`folder/recall.md` and its plot, of the numbers of pairs for which every mixer has a result."""
    every = [record for record in results.read().values() if record["steps"] == steps]

    def of(name: str, count: int) -> list[dict[str, Any]]:
        return [record for record in every if record["row"] == name and record["pairs"] == count]

    shown = [count for count in pairs if all(of(name, count) for name in MIXERS)]
    lines = {
        name: [accuracy([np.array([record["right"] for record in of(name, count)])]) for count in shown]
        for name in MIXERS
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recall.md"
    rows = [[name, *(f"{mean:.1%} ({low:.0%}-{high:.0%})" for mean, low, high in line)] for name, line in lines.items()]
    parts = [
        "# How many pairs a state of fixed size holds", "",
        f"One layer, {HEADS} heads, {steps} steps from scratch for each number of pairs. A sequence shows n tokens, "
        "each a key and its value, then asks for the value of each key. Attention keeps every token; a scan keeps, for "
        "each head, a matrix of head size x head size, whatever the length. Share of right answers with its 95 % "
        f"interval over seeds and held-out sequences; {1 / VALUES:.1%} is chance.", "",
        markdown(["pairs", *map(str, shown)], rows), "",
    ]  # fmt: skip
    if shown:
        plots.answer_curves(folder / "recall.svg", [str(count) for count in shown], lines, "pairs", None)
        parts += [plots.drawn(folder / "recall.svg", "python -m bench.runs.recall"), ""]
    path.write_text("\n".join(parts))
    return path


def main(
    steps: Annotated[int, typer.Option(min=10, help="Training steps of each memory.")] = 1500,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Associative recall as the number of pairs grows past the size of the state."""
    print(run(PAIRS, seeds, steps, Results(Path("bench/results/ablations/recall.jsonl")), Path("bench/reports")))


if __name__ == "__main__":
    typer.run(main)
