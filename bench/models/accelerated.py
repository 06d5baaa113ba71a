"""`python -m bench.models.accelerated`: transformers' own linear layers, plain and on our kernels.

    python -m bench.models.accelerated [--family qwen3_5] [--part core] [--tokens 4096] [--seconds 3] [--no-write]

For each family a model of four layers with random weights, as wide as the small published ones. Three things are
timed, of a prompt and of a token after it: the *core* of a linear layer (convolution, scan, norm; its projections give
what they once gave, and cost nothing), the *decoder*, and the *model*, that is the decoder and the output layer. Beside
both is the *bound*: the same with a core that costs nothing. Rows go to bench/results/<device>/accelerated, the page is
bench/reports/accelerated.md.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as hf
import typer
from torch import Tensor, nn

from bench import timing
from bench.provenance import where
from bench.runs.sheet import check_named, write_sheet
from linmu_distill.checkpoint import write_atomically
from linmu_distill.files import read_lines
from linmu_models import accelerate_transformers
from linmu_models.cache import cache_argument
from linmu_ops._tables import markdown

PLAIN, OURS, BOUND = "transformers", "accelerated", "bound"
HERE = Path(__file__).parents[1]
BEFORE = 256  # tokens before a decoded one
# Decoded tokens of a sample. It begins with putting our functions in place, and Python then learns their types anew.
STEPS = {"core": 64, "decoder": 4, "model": 4}
LIMIT = 2e-3  # of the largest value: how far results may lie apart

_HYBRID = ["linear_attention"] * 3 + ["full_attention"]
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2",
        dict(hidden_size=768, num_heads=24, head_dim=64, state_size=128, n_groups=1, expand=2, vocab_size=50288),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        dict(
            hidden_size=768, shared_intermediate_size=2048, intermediate_size=2048, num_local_experts=0,
            num_experts_per_tok=0, num_attention_heads=12, num_key_value_heads=4, mamba_n_heads=48, mamba_d_head=32,
            mamba_d_state=128, mamba_n_groups=1, mamba_expand=2, vocab_size=100352,
            layer_types=["mamba", "mamba", "mamba", "attention"], position_embedding_type="nope",
        ),
    ),
    "qwen3_5": (
        "Qwen3_5",
        dict(
            hidden_size=1024, intermediate_size=3584, num_attention_heads=8, num_key_value_heads=2, head_dim=256,
            linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
            vocab_size=248320, layer_types=_HYBRID,
        ),
    ),
}  # fmt: skip
MIXERS = ("mixer", "mamba", "linear_attn")  # what a decoder layer calls its linear one
Row = dict[str, Any]


def build(family: str, small: bool = False) -> Any:
    """A model of random weights; `small`: with few words and channels, for tests."""
    name, sizes = SIZES[family]
    kind = getattr(hf, f"{name}TextConfig" if family == "qwen3_5" else f"{name}Config")
    sizes = {**sizes, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if small:
        sizes["vocab_size"] = 128
    torch.manual_seed(0)
    return getattr(hf, f"{name}ForCausalLM")(kind(**sizes)).eval().requires_grad_(False)


def decoder_of(model: Any) -> Any:
    """The part that gives hidden states."""
    return getattr(model, model.base_model_prefix)


def mixers(model: Any) -> list[nn.Module]:
    """The linear layers."""
    found = [getattr(layer, name, None) for layer in decoder_of(model).layers for name in MIXERS]
    return [mixer for mixer in found if mixer is not None]


class Given(nn.Module):
    """Stands for a projection, and gives what that once gave."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def _projections(mixer: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in mixer.named_children() if isinstance(part, nn.Linear)}


class Skipped:
    """While open, the linear layers of a model are their projections alone."""

    def __init__(self, model: Any) -> None:
        self.mixers = mixers(model)

    def __enter__(self) -> None:
        for mixer in self.mixers:
            parts = _projections(mixer)
            last = parts.pop("out_proj")

            def forward(hidden_states: Tensor, *_: Any, parts: Any = parts, last: Any = last, **__: Any) -> Tensor:
                widest = max((part(hidden_states) for part in parts.values()), key=lambda t: t.shape[-1])
                out: Tensor = last(widest[..., : last.in_features])
                return out

            mixer.forward = forward

    def __exit__(self, *_: object) -> None:
        for mixer in self.mixers:
            del mixer.forward


def prefill(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """Hidden states, and the cache."""
    out = decoder_of(model)(input_ids=ids, use_cache=True)
    return out[0], out.get("past_key_values", out.get("cache_params"))


def step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Hidden states of a token after what the cache holds."""
    decoder = decoder_of(model)
    out: Tensor = decoder(input_ids=ids, use_cache=True, **{cache_argument(decoder): cache})[0]
    return out


def core(model: Any, run: Callable[[], object], again: bool) -> Callable[[], Any]:
    """The last call that `run` makes of the first linear layer, to be made without projections: with the cache as it
    was, or, with `again`, as the call before left it."""
    mixer, calls = mixers(model)[0], []

    def note(_: nn.Module, args: Any, given: Any) -> None:
        calls.append((args, {name: _own(value) for name, value in given.items()}))

    handle = mixer.register_forward_pre_hook(note, with_kwargs=True)
    run()
    handle.remove()
    args, given = calls[-1]
    z = args[0] if args else given["hidden_states"]
    alone = copy.copy(mixer)
    alone._modules = dict(mixer._modules)
    for name, part in _projections(mixer).items():
        alone._modules[name] = nn.Identity() if name == "out_proj" else Given(part(z))
    if again:
        return lambda: alone(*args, **given)
    return lambda: alone(*args, **{name: _own(value) for name, value in given.items()})


def _own(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, hf.Cache) else value


def functions(model: Any, tokens: int) -> dict[tuple[str, str, str], Callable[[], Any]]:
    """(part, kind, variant) to what is timed."""
    vocabulary = model.config.vocab_size
    ids, head = torch.randint(vocabulary, (1, tokens)), model.get_output_embeddings()
    some, token = ids[:, :BEFORE], ids[:, :1]
    _, cache = prefill(model, some)
    found: dict[tuple[str, str, str], Callable[[], Any]] = {}
    prompt = core(model, lambda: prefill(model, ids), again=False)
    one = core(model, lambda: step(model, token, copy.deepcopy(cache)), again=True)

    def decode(own: Any, part: str) -> Tensor:
        for _ in range(STEPS[part]):
            out = step(model, token, own)
            out = head(out[:, -1:]) if part == "model" else out
        return out

    def steps() -> Any:
        return [one() for _ in range(STEPS["core"])][-1]

    for variant in (PLAIN, OURS, BOUND):
        own = [copy.deepcopy(cache) for _ in range(2)]
        parts: dict[tuple[str, str], Callable[[], Any]] = {
            ("model", "prompt"): lambda: head(prefill(model, ids)[0][:, -1:]),
            ("decoder", "token"): functools.partial(decode, own[0], "decoder"),
            ("model", "token"): functools.partial(decode, own[1], "model"),
        }
        if variant != BOUND:
            parts |= {("core", "prompt"): prompt, ("core", "token"): steps}
        for (part, kind), run in parts.items():
            found[part, kind, variant] = _within(variant, model, run)
    return found


def _within(variant: str, model: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    if variant == PLAIN:
        return run

    def within() -> Any:
        with accelerate_transformers(model) if variant == OURS else Skipped(model):
            return run()

    return within


@torch.no_grad()
def measure(
    family: str, tokens: int, seconds: float, small: bool = False, parts: Sequence[str] = tuple(STEPS)
) -> Iterator[Row]:  # fmt: skip
    """Rows of one family, as they come; results are compared before they are timed."""
    model = build(family, small)
    found = functions(model, tokens)
    for part, kind in sorted({(part, kind) for part, kind, _ in found if part in parts}):
        mine = {variant: run for (p, k, variant), run in found.items() if (p, k) == (part, kind)}
        plain, ours = (_tensor(mine[name]()) for name in (PLAIN, OURS))
        apart = float((plain - ours).abs().max() / plain.abs().max())
        common = dict(family=family, part=part, kind=kind, tokens=tokens if kind == "prompt" else BEFORE, apart=apart)
        if not apart <= LIMIT and part != "core":
            yield common | dict(variant=OURS, status=f"not timed: differs by {apart:.1e} of the largest value")
            continue
        times = timing.interleave(mine, "cpu", seconds=seconds, warmup=0.0, rounds=(2, 50))
        count = STEPS[part] if kind == "token" else 1
        for variant, t in times.items():
            numbers = dict(seconds=t.median / count, seconds_p20=t.p20 / count, seconds_p80=t.p80 / count)
            yield common | dict(variant=variant, status="ok", samples=t.rounds, **numbers)
        print(family, part, kind, {v: f"{t.median / count:.4f} s" for v, t in times.items()}, flush=True)


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _cells(rows: list[Row]) -> list[str]:
    by = {row["variant"]: row for row in rows}
    first = rows[0]
    lengths = f"{first['tokens']:,} tokens" if first["kind"] == "prompt" else f"a token after {first['tokens']:,}"
    named = [first["family"], first["part"], lengths]
    if PLAIN not in by or OURS not in by:
        return [*named, "-", "-" if first["status"] == "ok" else first["status"], "", "", ""]
    plain, ours = by[PLAIN]["seconds"], by[OURS]["seconds"]
    told = [f"{1e3 * plain:,.2f}", f"{1e3 * ours:,.2f}", f"{plain / ours:.1f}"]
    if BOUND not in by:
        return [*named, *told, "", ""]
    bound = by[BOUND]["seconds"]
    return [*named, *told, f"{1e3 * bound:,.2f}", f"{bound / ours:.0%}"]


def write_page(rows: list[Row], folder: Path) -> Path:
    """`folder/accelerated.md`."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["part"], row["kind"]), []).append(row)
    head = ["family", "part", "what", f"{PLAIN}, ms", f"{OURS}, ms", "times faster", f"{BOUND}, ms", "of the bound"]
    row = rows[0]
    sizes = [
        f"- `{family}`: " + ", ".join(f"{k} {v}" for k, v in SIZES[family][1].items() if isinstance(v, int))
        for family in dict.fromkeys(r["family"] for r in rows)
    ]
    parts = [
        "# transformers' linear layers, plain and accelerated", "",
        "Models of four layers, random weights, float32. *Core*: convolution, scan and norm of one linear layer, "
        "without its projections. *Bound*: the same with a core that costs nothing. *Model*: decoder and output layer. "
        "Medians of samples that take turns in one process.", "",
        markdown(head, [_cells(group) for group in groups.values()], left=3), "", *sizes, "",
        f"Made by `python -m bench.models.accelerated` at {row['commit']}{'-dirty' if row.get('dirty') else ''}, on "
        f"{row['device']}, {row['isa']}, {row['threads']} threads.", "",
    ]  # fmt: skip
    return write_sheet(folder, "accelerated.md", parts)


def main(
    family: Annotated[list[str] | None, typer.Option(help="Families; all if none is named.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="core, decoder, model; all if none is named.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 4096,
    seconds: Annotated[float, typer.Option(min=0, help="Of samples, for each variant.")] = 3.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if left out.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = HERE / "results" / "cpu" / "accelerated",
    reports: Annotated[Path, typer.Option(help="Folder of the page.")] = HERE / "reports",
) -> None:
    """transformers' linear layers, plain and accelerated."""
    check_named("family", family, SIZES)
    check_named("part", part, STEPS)
    if threads:
        torch.set_num_threads(threads)
    timing.keep_memory()
    place, file = where("cpu"), results / "float32.jsonl"
    parts = part or list(STEPS)
    for name in family or SIZES:
        old = read_lines(file, ("family", "part")) if file.exists() else []
        rows = [row for row in old if row["family"] != name or row["part"] not in parts]
        file.parent.mkdir(parents=True, exist_ok=True)
        for row in measure(name, tokens, seconds, parts=parts):
            rows.append(row | place)
            rows.sort(key=lambda row: (list(SIZES).index(row["family"]), row["part"], row["kind"]))
            write_atomically(file, "".join(json.dumps(one) + "\n" for one in rows))
            page = write_page(rows, reports)
    print(page)


if __name__ == "__main__":
    typer.run(main)
