"""`convert(..., calibration=batches)`: blocks of the size of what they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import linmu_models
from distill.config import load_config
from distill.sources import build_source
from distill.teacher import attention_modules, load_teacher, record_outputs
from distill.train import model_inputs

from . import tiny

ROOT = Path(linmu_models.__file__).parents[1]


def attention_outputs(model, batches):
    found = []
    for batch in batches:
        with record_outputs(attention_modules(model)) as outputs, torch.no_grad():
            model(**batch)
        found.append([output[batch["attention_mask"].bool()] for output in outputs])
    return [torch.cat(layer) for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_blocks_take_the_size_of_attention(family, norm):
    """In layer 0, whose input is the teacher's, to rounding."""
    teacher = tiny.teacher(family)
    kinds = ("text", "text") if tiny.example(family) is None else ("images", "image")
    batches = [tiny.left_padded([tiny.example(family, kind) for kind in kinds]), tiny.example(family, kinds[1])]
    options = dict(norm=norm, swin=norm != "none")  # Without a norm, only y_flex is scaled.
    student = linmu_models.convert(teacher, options, keep_attention=[1], calibration=iter(batches))
    ours, theirs = attention_outputs(student, batches)[0], attention_outputs(teacher, batches)[0]
    if norm == "none" and (bias := attention_modules(teacher)[0].o_proj.bias) is not None:
        ours, theirs = ours - bias, theirs - bias  # a copy, which is not scaled
    torch.testing.assert_close(ours.square().mean(), theirs.square().mean(), rtol=1e-3, atol=0)
    assert not any(module._forward_hooks for module in attention_modules(teacher))


def test_starts_nearer_to_the_teacher():
    """Relative L_hid before any training: the experiment in distill/README.md, small."""
    config = load_config(ROOT / "distill" / "configs" / "demo.toml")
    folder = ROOT / "distill" / "teachers" / "tiny"
    teacher, tokenizer = load_teacher(str(folder), "float32")
    source = build_source(config.data, str(folder), teacher, tokenizer, 7)
    *batches, test = [model_inputs(source.processor(source.samples(i))) for i in range(3)]
    expected = attention_outputs(teacher, [test])

    def loss(**options):
        found = attention_outputs(linmu_models.convert(teacher, config.student, **options), [test])
        pairs = zip(found, expected, strict=True)
        return sum(((ours - theirs).square().sum() / theirs.square().sum()).item() for ours, theirs in pairs)

    assert loss(calibration=batches) < 0.6 * loss()


def test_half_precision_and_errors():
    teacher = tiny.BUILDERS["qwen2"]().to(torch.bfloat16)
    batch = tiny.example("qwen2", "text")
    student = linmu_models.convert(teacher, {"swin": False}, calibration=[{**batch, "labels": batch["input_ids"]}])
    with torch.no_grad():
        assert torch.isfinite(student(**batch).logits).all()
    with torch.device("meta"):
        teacher = tiny.BUILDERS["qwen2"]()
    with pytest.raises(ValueError, match="calibration needs a teacher with values, got one on the meta device"):
        linmu_models.convert(teacher, calibration=[batch])
