"""`convert(..., calibration=batches)`: blocks of the size of what they replace."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import linmu_models
from linmu_distill.config import load_config
from linmu_distill.sources import build_source
from linmu_distill.teacher import load_teacher, model_inputs
from linmu_models.accumulated_attention import record_attention
from linmu_models.calibration import _looks_of_text
from linmu_models.hooks import attention_modules, record_outputs
from linmu_models.parts import read_parts
from linmu_ops.nn import MMATE, ExactConfig, MMATEConfig

from . import tiny

ROOT = Path(linmu_models.__file__).parents[1]


def attention_outputs(model, batches):
    found = []
    for batch in batches:
        with record_outputs(list(attention_modules(model).values())) as outputs, torch.no_grad():
            model(**batch)
        found.append([output[batch["attention_mask"].bool()] for output in outputs])
    return [torch.cat(layer) for layer in zip(*found, strict=True)]


@pytest.mark.parametrize("family", [f for f in tiny.BUILDERS if not f.startswith(("qwen3_5", "gemma4"))])
def test_blocks_take_the_size_of_attention(family):
    """In layer 0, whose input is the teacher's, to rounding."""
    teacher = tiny.teacher(family)
    kinds = ("text", "text") if tiny.example(family) is None else ("images", "image")
    batches = [tiny.left_padded([tiny.example(family, kind) for kind in kinds]), tiny.example(family, kinds[1])]
    options = dict(preset="paper", branches="flex")  # the scan's output is what is scaled
    student = linmu_models.convert(teacher, options, keep_attention=[1], calibration=iter(batches))
    ours, theirs = attention_outputs(student, batches)[0], attention_outputs(teacher, batches)[0]
    if (bias := read_parts(attention_modules(teacher)[0]).biases["o"]) is not None:
        ours, theirs = ours - bias, theirs - bias  # a copy, which is not scaled
    torch.testing.assert_close(ours.square().mean(), theirs.square().mean(), rtol=1e-3, atol=0)
    assert not any(module._forward_hooks for module in attention_modules(teacher).values())


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_recorded_attention_is_the_teachers(family):
    """Against transformers' own attention weights."""
    teacher = tiny.teacher(family)
    kinds = ("text", "text") if tiny.example(family) is None else ("images", "image")
    batch = tiny.left_padded([tiny.example(family, kind) for kind in kinds])
    real = batch["attention_mask"].bool()
    layout = linmu_models.convert(teacher).build_layout(batch)
    asking = real if layout is None else real & ~layout.visual_mask()
    attentions = list(attention_modules(teacher).values())
    before = teacher.get_decoder().config._attn_implementation
    with torch.no_grad(), record_attention(teacher, attentions[1:], asking) as received:
        getattr(teacher, "model", teacher)(**batch, use_cache=False)
    assert teacher.get_decoder().config._attn_implementation == before
    assert len(received) == len(attentions) - 1
    eager = copy.deepcopy(teacher)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = getattr(eager, "model", eager)(**batch, use_cache=False, output_attentions=True).attentions[1]
    expected = torch.stack([row[:, asks].sum(1) for row, asks in zip(weights, asking, strict=True)])
    torch.testing.assert_close(received[0].masked_fill(~real[:, None], 0), expected.masked_fill(~real[:, None], 0),
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_step_sizes_are_fitted_in_units_of_the_rows_mean():
    """Padding is left out, and a row with more text weighs no more than another."""
    teacher = tiny.teacher("qwen2_5_vl")
    batch = tiny.left_padded([tiny.example("qwen2_5_vl", kind) for kind in ("images", "image")])
    layout = linmu_models.convert(teacher).build_layout(batch)
    hidden = torch.randn(*batch["input_ids"].shape, 8)
    states, attention = _looks_of_text(teacher, batch, layout).at_layer(1, hidden)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(states) == len(attention) == sum(lengths)
    for part in attention.split(lengths):
        torch.testing.assert_close(part.mean(0), torch.ones(part.shape[1]))


def test_step_sizes_follow_attention():
    """Where log attention is linear in the hidden states, step sizes become proportional to it; their mean stays."""
    block = MMATE(16, 4, config=MMATEConfig(initial_decay=0.999)).scan
    z, direction = torch.randn(400, 16), torch.randn(16, 4) / 4
    attention = (z @ direction).exp()
    attention = attention / attention.mean(0)
    block.fit_step_sizes(z, attention)
    steps = torch.nn.functional.softplus(z @ block.dt_proj.weight.T + block.dt_bias)
    torch.testing.assert_close(steps.mean(0), torch.full((4,), 0.001), rtol=0.02, atol=0)
    torch.testing.assert_close(steps / steps.mean(0), attention, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("decay", [0.999, None])
def test_the_mean_step_stays_whatever_a_block_has_learnt(decay):
    """Also where its step sizes depend on the hidden states already."""
    scan = MMATE(16, 4, config=MMATEConfig(initial_decay=decay)).scan
    with torch.no_grad():
        scan.dt_proj.weight.normal_(0, 0.3)
        scan.dt_bias.sub_(4)  # steps are small, as the fit takes them to be
    z, direction = torch.randn(400, 16), torch.randn(16, 4) / 4
    attention = (z @ direction).exp()

    def mean():
        return torch.nn.functional.softplus(z @ scan.dt_proj.weight.T + scan.dt_bias).mean(0)

    before = mean()
    scan.fit_step_sizes(z, attention / attention.mean(0))
    torch.testing.assert_close(mean(), before, rtol=0.02, atol=0)


@pytest.mark.parametrize("options", [tiny.NARROW, {"preset": "paper"}], ids=["exact", "paper"])
def test_twice_is_once(options):
    teacher = tiny.teacher("qwen2")
    batches = [tiny.example("qwen2", "text")]
    student = linmu_models.convert(teacher, options)
    found = []
    for _ in range(2):
        linmu_models.calibrate(student, teacher, batches, step_sizes=True)
        found.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "qwen2"])
def test_fitted_step_sizes_are_part_of_calibration(family):
    teacher = tiny.teacher(family)
    batch = tiny.left_padded([tiny.example(family, "text")] * 2)
    student = linmu_models.convert(teacher)
    linmu_models.calibrate(student, teacher, [batch], step_sizes=True)
    for layer in student.linmu_layers():
        assert layer.self_attn.scan.dt_proj.weight.count_nonzero() > 0
    with torch.no_grad():
        assert torch.isfinite(student(**batch).logits).all()


def test_starts_nearer_to_the_teacher():
    """Relative L_hid before any training: the experiment in distill/README.md, small."""
    config = load_config(ROOT / "bench" / "runs" / "tables" / "base.toml")
    folder = ROOT / "distill" / "teachers" / "tiny"
    teacher, tokenizer = load_teacher(str(folder), "float32")
    source = build_source(config.data, str(folder), teacher, tokenizer, 7)
    batches = [model_inputs(source.processor(source.samples(i))) for i in range(8)]
    batches, tests = batches[:4], batches[4:]
    expected = attention_outputs(teacher, tests)

    def loss(**options):
        # Without the demo's norm of heads, which gives a block some size of output from the start.
        plain = {"preset": "paper", **{name: config.student[name] for name in ("initial_decay", "window")}}
        found = attention_outputs(linmu_models.convert(teacher, plain, **options), tests)
        pairs = zip(found, expected, strict=True)
        return sum(((ours - theirs).square().sum() / theirs.square().sum()).item() for ours, theirs in pairs)

    assert loss(calibration=batches) < 0.6 * loss()


def test_half_precision_and_errors():
    teacher = tiny.BUILDERS["qwen2"]().to(torch.bfloat16)
    batch = tiny.example("qwen2", "text")
    options, batches = {"preset": "paper", "branches": "flex"}, [{**batch, "labels": batch["input_ids"]}]
    student = linmu_models.convert(teacher, options, calibration=batches)
    with torch.no_grad():
        assert torch.isfinite(student(**batch).logits).all()
    with torch.device("meta"):
        teacher = tiny.BUILDERS["qwen2"]()
    with pytest.raises(ValueError, match="calibration needs a teacher with values, got one on the meta device"):
        linmu_models.convert(teacher, calibration=[batch])


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "qwen2_5_vl", "paligemma"])
def test_the_side_of_padding_changes_no_fit(family):
    rows = [tiny.batch(tiny.text_ids(n)) for n in (60, 41)]
    left = tiny.left_padded(rows)
    right = {name: torch.stack([t[0], t[1].roll(41 - 60)]) for name, t in left.items()}
    teacher, shares = tiny.teacher(family), []
    for batch in (left, right):
        torch.manual_seed(0)
        student = linmu_models.convert(teacher, ExactConfig(**tiny.NARROW), calibration=[batch])
        shares.append({n: t for n, t in student.named_parameters() if "share." in n or "dt_" in n})
    assert shares[0] and not any(module._forward_pre_hooks for module in teacher.modules())
    for name, found in shares[0].items():
        torch.testing.assert_close(found, shares[1][name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
