"""A text-only teacher through all stages, with and without a text window, judged on held-out text; and the example."""

import json
import math

import media
import pytest
import torch
from transformers import AutoModelForCausalLM

from linmu_distill.config import parse_config
from linmu_distill.examples.smollm2 import HELD_OUT_EVERY, page_text, split
from linmu_distill.held_out import measure
from linmu_distill.limited import EQUAL_MEMORY
from linmu_distill.run import Run, RunError, distill
from linmu_distill.student import ALONE
from linmu_models.chat import ChatProcessor, Conversation

PAGE = """<html><body><div id="banner"><span class="text">Get it</span></div><div class="section">
<h2 class="title"><a id="x"></a>6.3. The <code>apt</code>
Command</h2><div class="para">One<br/> &amp; two.<div class="footnote">no</div></div><pre class="screen">$ ls</pre>
<div class="sidebar"><div class="para">Three.</div></div></div></body></html>"""


def test_running_text_of_a_page():
    assert page_text(PAGE) == "6.3. The apt Command\n\nOne & two.\n\nThree."
    train, held_out = split([f"page{i}." for i in range(2 * HELD_OUT_EVERY)])
    assert held_out.split() == ["page0.", f"page{HELD_OUT_EVERY}."] and len(train.split()) == 2 * HELD_OUT_EVERY - 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokens = media.tokenizer("")
    model = media.language_model(len(tokens), tokens)
    model.save_pretrained(folder / "teacher")
    tokens.save_pretrained(folder / "teacher")
    for name, start in (("train", 0), ("held_out", 500)):
        (folder / f"{name}.txt").write_text("\n\n".join(f"Number {i} is {i * i}." for i in range(start, start + 60)))
    return folder


def test_measures_are_those_of_plain_logits(folder):
    teacher, model = (AutoModelForCausalLM.from_pretrained(folder / "teacher").eval() for _ in range(2))
    with torch.no_grad():
        model.lm_head.weight.add_(
            torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)) / 9
        )
    batch = ChatProcessor.load(folder / "teacher")(
        [Conversation((("", t),)) for t in ("some text", "more of the text")]
    )
    found = measure(model, teacher, [batch, batch], chunk_size=5)
    ids, mask = batch["input_ids"], batch["attention_mask"][:, 1:].bool()
    with torch.no_grad():
        p, q = (m(ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1) for m in (model, teacher))
    nll = -p.gather(-1, ids[:, 1:, None])[..., 0][mask].mean().item()
    assert found["tokens"] == 2 * int(mask.sum())
    assert found["nll"] == pytest.approx(nll, rel=1e-5) and found["perplexity"] == pytest.approx(
        math.exp(nll), rel=1e-4
    )
    assert found["kl"] == pytest.approx((q.exp() * (q - p)).sum(-1)[mask].mean().item(), rel=1e-4)
    assert found["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1))[mask].float().mean().item())
    assert 0 < found["agreement"] < 1
    same = measure(teacher, teacher, [batch])
    assert same["agreement"] == 1 and same["kl"] == pytest.approx(0, abs=1e-6)


def test_what_a_language_model_has_no_use_for_is_refused(folder, tmp_path):
    data = {"sets": {"t": {"format": "text", "files": [str(folder / "train.txt")]}}}
    values = {"output": str(tmp_path / "r"), "teacher": str(folder / "teacher"), "data": data,
              "evaluation": {"samples": 0}, "stage3": {"losses": {"token": 1}}}  # fmt: skip
    with pytest.raises(RunError, match=r"student.reverse must be false: .* is text only, got true"):
        distill(parse_config({**values, "preset": "paper", "student": {"text_window": 8}}))
    with pytest.raises(RunError, match=r"student\.branches must be 'flex' without text_window"):
        distill(parse_config({**values, "preset": "paper", "student": {"reverse": False}}))


def test_held_out_text_counts_once(folder, tmp_path):
    """However many batches are asked for; and other text in the same file is measured anew."""
    (tmp_path / "t.txt").write_text("Number 1 is 1.")
    sets = {"sets": {"t": {"format": "text", "files": [str(tmp_path / "t.txt")]}}}
    run = Run(
        parse_config(
            {
                "output": str(tmp_path / "r"), "teacher": str(folder / "teacher"), "data": sets,
                "stage3": {"losses": {"token": 1}},
                "evaluation": {"samples": 0, "held_out": sets},
            }
        )
    )  # fmt: skip
    first = run.measure_held_out(None, run.teacher)
    assert first["tokens"] == len("Number 1 is 1.") - 1
    assert Run(run.config).measure_held_out(None, run.teacher) == first
    (tmp_path / "t.txt").write_text("Number 2 is 4.")
    assert Run(run.config).measure_held_out(None, run.teacher) != first


def test_built_in_tasks_are_for_models_that_can_be_shown_them(folder, tmp_path):
    data = {"sets": {"t": {"format": "text", "files": [str(folder / "train.txt")]}}}
    values = {"output": str(tmp_path / "r"), "teacher": str(folder / "teacher"),
              "stage3": {"losses": {"token": 1}}}  # fmt: skip
    with pytest.raises(RunError, match=r"data.sets must be given: .* cannot be shown the built-in tasks"):
        distill(parse_config(values))
    with pytest.raises(RunError, match=r"evaluation\.samples must be 0: "):
        distill(parse_config({**values, "data": data}))


@pytest.mark.parametrize(
    "preset, student",
    [
        ("exact", {"text_window": 8, "kept_tokens": 4}),
        pytest.param("paper", {"branches": "flex", "reverse": False}, marks=pytest.mark.sweep),
    ],
)
def test_a_language_model_is_distilled(folder, tmp_path, preset, student):
    def sets(name):
        return {"max_tokens": 64, "sets": {"t": {"format": "text", "files": [str(folder / name)]}}}

    config = parse_config(
        {
            "preset": preset, "output": str(tmp_path / "r"), "teacher": str(folder / "teacher"),
            "student": student, "data": sets("train.txt"),
            "evaluation": {"samples": 0, "held_out": sets("held_out.txt"), "speed_lengths": [16]},
            "stage1": {"steps": 2}, "stage2": {"steps": 2},
            "stage3": {"steps": 2, "losses": {"token": 0.5, "supervised": 0.5}},
        }
    )  # fmt: skip
    report = distill(config).read_text()
    results = json.loads((config.folder / "held_out.json").read_text())
    alone = list(ALONE) if preset == "exact" else []
    assert list(results) == ["teacher", EQUAL_MEMORY, *alone, "initial", "stage 1", "stage 2", "stage 3"]
    assert results["teacher"]["kl"] == pytest.approx(0, abs=1e-6) and results["initial"]["kl"] > 0
    assert results["stage 1"] != results["stage 2"] != results["stage 3"]
    assert "| stage 3 | " in report and report.index("## How well it predicts") < report.index("## Use it")
    assert "model = AutoModelForCausalLM.from_pretrained" in report and "ImageTextToText" not in report
    assert AutoModelForCausalLM.from_pretrained(config.folder / "student").is_linear
