"""The models' bench on the tiny shape: what it compares is equal, and what goes wrong is a row that says so."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache

import linmu_models
import linmu_ops
from bench import report as ops_report
from bench.models import breakdown, measure, memory, report, run
from bench.models.inputs import decoder_inputs
from bench.models.measure import Task
from bench.models.shapes import SHAPES, build, video_layout
from bench.models.variants import FREE, PLAIN, STUDENT, Decode, Prefill, Variant, filled_cache, variants
from bench.page import write

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return build(TINY, torch.float32, "cpu", tower=False)


def run_main(tmp_path, *extra):
    options = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--batch",
        "2",
        "--seconds",
        "0",
        "--save",
        str(tmp_path / "r.jsonl"),
    ]
    assert run.main([*options, *extra]) == 0
    return report.read_rows(tmp_path / "r.jsonl")


def test_every_shape_has_a_configuration():
    for name, shape in SHAPES.items():
        small = shape.with_layers(1)
        teacher, student = build(small, torch.float32, "meta", tower=False)
        assert isinstance(student, linmu_models.LinmuModel), name
        assert len(teacher.get_decoder().layers) == 1
        assert teacher.get_decoder().layers[0].mlp.gate_proj.out_features == shape.text["intermediate_size"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["plain", "compiled"])
def test_compiled_and_plain_are_equal_and_decode_needs_no_prefill(models, tmp_path, capsys, compiled):
    wanted = ["--layers", "1", "--preset", "paper", "--prefill", "512", "--decode", "300"]
    rows = run_main(tmp_path, *wanted, *([] if compiled else ["--plain"]))
    assert [r["status"] for r in rows] == ["ok"] * (10 if compiled else 6)
    if compiled:
        assert {r["variant"] for r in rows} == {v.name for v in variants(*models, "cpu")}
    students = [r for r in rows if r["student"]]
    assert all(r["times_strongest"] <= r["times_plain"] for r in students)
    free = {r["kind"]: r["seconds"] for r in rows if r["variant"] == FREE}
    assert all(r["times_free"] == r["seconds"] / free[r["kind"]] for r in students)
    assert len(students) == len(rows) - len(free) - len(students) == (4 if compiled else 2)
    decoded = [r for r in rows if r["kind"] == "decode"]
    sizes = {r["variant"]: r["cache_bytes"] for r in decoded}
    t = TINY.with_layers(1).text
    heads, size = t["num_attention_heads"], t["hidden_size"] // t["num_attention_heads"]
    assert sizes[STUDENT] == 2 * t["num_hidden_layers"] * heads * size * size * 4
    assert sizes[PLAIN] == memory.kv_bytes(TINY.with_layers(1), 300, 2, 4)
    assert all(r["tokens_per_second"] > 0 and r["commit"] and r["parameters"] for r in decoded)
    assert "x strongest" in capsys.readouterr().out


def test_whole_model_rows(tmp_path):
    rows = run_main(tmp_path, "--prefill", "--decode", "--whole", "400", "--plain")
    found = [(r["part"], r["variant"], r["status"]) for r in rows]
    assert found == [("whole", name, "ok") for name in (PLAIN, STUDENT, FREE)]


def test_smolvlm_takes_its_images():
    from bench.models.inputs import whole_inputs

    shape = SHAPES["smolvlm"].with_layers(1)
    small = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, vocab_size=128)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    shape = type(shape)(shape.family, shape.text | small, shape.vision | vision)
    for model in build(shape, torch.float32, "cpu"):
        logits = Prefill(Variant("", model)).whole(**whole_inputs(model, 300, 1))
        assert logits.shape == (1, 1, 128) and logits.isfinite().all()


def test_prefill_is_the_model_itself(models):
    """The bench's own way through the decoder gives what the whole model gives for the same embeddings."""
    teacher, student = models
    layout, inputs = decoder_inputs(teacher, 512, 1)
    for model in (teacher, student):
        prefill = Prefill(Variant("", model))
        got = prefill.decoder(**inputs, **prefill.prepare(layout))
        positions = inputs["positions"].expand(3, -1, -1)
        if model is student:
            model.layout_source = lambda given: layout
        with torch.no_grad():
            want = model(inputs_embeds=inputs["embeddings"], position_ids=positions, logits_to_keep=1).logits
        torch.testing.assert_close(got, want)
    student.layout_source = None


@torch.no_grad()
def test_without_attention_a_token_has_its_own_value(models):
    """And nothing else does: a token gives the same whatever was before it."""
    teacher = models[0]
    _, inputs = decoder_inputs(teacher, 512, 1)
    free, plain = (Prefill(Variant("", teacher, free=f)) for f in (True, False))
    other = inputs | dict(embeddings=torch.cat((-inputs["embeddings"][:, :-1], inputs["embeddings"][:, -1:]), 1))
    assert torch.equal(free.decoder(**inputs), free.decoder(**other))
    assert not torch.allclose(plain.decoder(**inputs), plain.decoder(**other))
    assert Decode(Variant("", teacher, free=True), 300, 2, 3).cache.get_seq_length() == 0


def test_a_filled_cache_is_as_long_as_it_says(models):
    for model in models:
        for static in (None, 40):
            cache = filled_cache(model, 32, 2, static)
            assert int(cache.get_seq_length()) == 32


@pytest.mark.parametrize("block", linmu_ops.nn.config.PRESETS)
@pytest.mark.parametrize("tokens", [3, 100, 700])
def test_the_state_behind_a_step_is_that_of_a_prefix(block, tokens):
    """In every field: what is counted is equal, what is filled is filled, and a step reads as much."""
    student = build(TINY, torch.float32, "cpu", tower=False, block=block)[1]
    real = DynamicCache(config=student.config.get_text_config(decoder=True))
    decoder, positions = student.get_decoder(), torch.arange(tokens).expand(2, -1)
    with torch.no_grad():
        decoder(
            inputs_embeds=torch.randn(2, tokens, 64), position_ids=positions, past_key_values=real, use_cache=True,
            linmu=linmu_models.LinmuInputs(),
        )  # fmt: skip
    read, prefix = [], copy.deepcopy(real)
    for cache in (real, filled_cache(student, tokens, 2), filled_cache(student, tokens, 2, tokens + 8)):
        assert int(cache.get_seq_length()) == tokens
        for layer, wanted in zip(cache.layers, prefix.layers, strict=True):
            for name, state in wanted.state._asdict().items():
                mine = getattr(layer.state, name)
                if state is None:
                    assert mine is None, name
                elif state.is_floating_point():
                    assert mine.dtype == state.dtype and torch.equal(mine != 0, state != 0), name
                else:
                    assert torch.equal(mine, state), name
        # In plain PyTorch, whose shapes show what is read.
        with torch.no_grad(), linmu_ops.use_impl("exact_step:reference"), Made() as made:
            decoder(
                input_ids=torch.full((2, 1), 7), position_ids=positions[:, :1] + tokens, past_key_values=cache,
                use_cache=True, linmu=linmu_models.LinmuInputs(),
            )  # fmt: skip
        read.append(made.shapes)
    assert read[0] == read[1]
    windows = student.linmu_layers()[0].self_attn.windows
    keys = min(tokens + 1, windows.text_window)
    if block == "exact":
        keys = windows.state_tokens if tokens > 512 else windows.sink_tokens + tokens + 1
    assert not windows.text_window or any(keys in shape for shape in read[1])


class Made(TorchDispatchMode):
    """The shapes of all that is made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes += [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["plain", "compiled"])
@pytest.mark.parametrize("block", ["teacher", *linmu_ops.nn.config.PRESETS])
def test_decode_goes_back(block, compiled):
    """To where it was, in every field: the next sample is the same one."""
    pair = build(TINY.with_layers(1), torch.float32, "cpu", tower=False, block="exact" if block == "teacher" else block)
    decode = Decode(Variant("", pair[block != "teacher"], compiled), 300, 2, 3)
    before = [tree_map(torch.clone, [t for t in state if t is not None]) for state in decode.states]
    first = decode()
    decode.rewind()
    assert int(decode.cache.get_seq_length()) == 300
    for layer, state in zip(decode.cache.layers, before, strict=block != "teacher"):
        for mine, wanted in zip([t for t in layer.state if t is not None], state, strict=True):
            assert torch.equal(mine, wanted)
    assert torch.equal(decode(), first)


def test_layout_of_a_prompt():
    layout = video_layout(1024, 2)
    assert layout.batch_size == 2 and layout.length == 1024 and int(layout.visual_mask().sum()) == 2 * 3 * 256
    with pytest.raises(ValueError, match="must hold a frame of 256 tokens and text, got 256"):
        video_layout(256, 1)


def failing(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(models, monkeypatch):
    found = variants(*models, "cpu")[:2]
    plain = Prefill(found[0])
    plain.decoder = failing
    rows = measure.measure(Task("prefill", "decoder", 512, 1), TINY, found, {PLAIN: plain}, seconds=0)
    assert rows[0]["status"] == "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"
    assert rows[1]["status"] == "ok" and "times_plain" not in rows[1]
    monkeypatch.setattr(memory, "available", lambda device: 1)
    rows = measure.measure(Task("decode", "decoder", 512, 1), TINY, found[:1], {}, seconds=0)
    assert rows[0]["status"].startswith("not run: needs about 0 GB, 0 are free")
    assert "not run" in report.table([r | dict(shape="tiny", layers=2, dtype="float32") for r in rows])


def test_a_variant_with_other_logits_is_not_timed(models):
    found = [Variant(PLAIN, models[0]), Variant("other", models[0])]
    other = Prefill(found[1])
    inner = other.decoder
    other.decoder = lambda **given: inner(**given) * 1.01
    rows = measure.measure(Task("prefill", "decoder", 512, 1), TINY, found, {"other": other}, seconds=0)
    assert rows[1]["status"].startswith("not timed: logits differ by") and "seconds" not in rows[1]


def test_resume_keeps_rows_and_notes_what_killed_the_process(tmp_path, monkeypatch):
    rows = run_main(tmp_path, "--prefill", "512", "--decode", "--plain")
    file = tmp_path / "r.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["status"] == report.STARTED and len(rows) == 3
    with file.open("a") as f:
        f.write(json.dumps(lines[0] | dict(tokens=600)) + "\n")

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(run, "measure", never)
    again = run_main(tmp_path, "--prefill", "512", "600", "--decode", "--plain", "--resume")
    assert [r["status"] for r in again] == ["ok", "ok", "ok", "failed: the process was killed here (out of memory?)"]


def test_report_with_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(ops_report, "HERE", tmp_path)
    target = report.results_file("cpu", "tiny", None)
    target.parent.mkdir(parents=True)
    options = ["--shape", "tiny", "--device", "cpu", "--plain", "--seconds", "0", "--batch", "1", "2"]
    assert run.main([*options, "--prefill", "512", "1k", "--decode", "1k", "--report"]) == 0
    page = (tmp_path / "reports" / "cpu_models.md").read_text()
    assert "## Model tiny" in page and "cpu_model_tiny_float32.svg" in page and "| 1,024 | 2 | student |" in page
    assert (tmp_path / "reports" / "cpu_model_tiny_float32.svg").exists()
    with pytest.raises(FileNotFoundError, match="must hold results"):
        write("cuda")


def test_peak_memory_sees_what_a_call_takes():
    _, peak = memory.peak_of(lambda: torch.ones(20_000_000).sum(), "cpu")
    if peak is None:
        pytest.skip("this system does not tell")
    assert 70e6 < peak < 200e6


def test_breakdown(models):
    for kind in ("prefill", "decode"):
        rows = breakdown.breakdown(TINY, torch.float32, "cpu", kind, 512, 1, models)
        parts = {r["part"]: r for r in rows if r["variant"] == STUDENT}
        far = "far attention" if kind == "prefill" else "exact step"
        assert {"projections", far, "MLP", "norms", "output layer", "rest"} <= set(parts)
        assert ("window attention" in parts) == (kind == "prefill")
        assert sum(r["percent"] for r in parts.values()) == pytest.approx(100)
        assert all(r["us"] > 0 and (r["floor_us"] > 0 or r["part"] == "rest") for r in rows)
        assert far in breakdown.table(rows)


def test_command_line(capsys):
    assert run.tokens("64k") == 65536 and run.tokens("100") == 100
    for module in (run, breakdown):
        with pytest.raises(SystemExit, match=r"^0$"):
            module.main(["--help"])
        assert f"usage: python -m {module.__name__}" in capsys.readouterr().out
