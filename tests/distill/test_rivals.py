"""Recipes of other projects in tables of runs: scans with a convolution and without rotary, a temperature, frozen
parts."""

from itertools import pairwise

import pytest
import torch
from small_run import run_values, save_teacher

from bench.runs.rivals import ConvolvedScan, RivalRun
from bench.runs.table import Row
from linmu_distill import handoff, objective
from linmu_distill.config import parse_config
from linmu_distill.losses import answer_losses
from linmu_distill.run import Run
from linmu_ops import ssd_scan
from linmu_ops.nn import MMATE, MMATEConfig

CAUSAL = MMATEConfig(branches="flex", reverse=False, major_scan=False)


def _block(taps=4, kv_heads=1):
    torch.manual_seed(0)
    block = MMATE(24, 3, kv_heads, config=CAUSAL, qkv_bias=True).double().eval()
    block.scan = ConvolvedScan.of(block, taps).double()
    with torch.no_grad():
        for parameter in (block.scan.conv_weight, block.scan.conv_bias, block.scan.dt_proj.weight):
            parameter.add_(torch.randn_like(parameter) / 4)
    return block.requires_grad_(False)


def _by_definition(block, z):
    """Projections, a convolution by `torch.nn`, and the scan; no rotary embedding."""
    scan, length = block.scan, z.shape[1]
    inputs = torch.cat([scan.x_proj(z), scan.b_proj(z), scan.c_proj(z)], dim=2)
    channels, P = inputs.shape[2], block.shape.head_dim
    inputs[:, :, -3 * P :] *= scan.scale.repeat_interleave(P) * block.shape.scale
    conv = torch.nn.functional.conv1d(
        inputs.mT, scan.conv_weight[:, None], scan.conv_bias, padding=scan.conv_weight.shape[1] - 1, groups=channels
    )
    x, B, C = conv[..., :length].mT.unflatten(2, (-1, P)).split(scan.sizes, dim=2)
    y = ssd_scan(x, scan.dt_proj(z), -scan.A_log.exp(), B, C, dt_bias=scan.dt_bias, dt_softplus=True)
    return block.scan_o_proj(y.flatten(2))


@pytest.mark.parametrize("taps, kv_heads", [(4, 1), (2, 3), (8, 3)])
def test_a_convolved_scan_is_its_definition(taps, kv_heads):
    block, z = _block(taps, kv_heads), torch.randn(2, 19, 24, dtype=torch.float64)
    rotary = tuple(torch.randn(2, 19, 8, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(block(z, position_embeddings=rotary), _by_definition(block, z), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_convolved_scan_goes_on_from_its_state():
    block, z = _block(), torch.randn(2, 11, 24, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = False  # a row that is padded on the left
    whole = block(z, attention_mask=mask)
    torch.testing.assert_close(whole[0, 4:], block(z[:1, 4:])[0], rtol=1e-10, atol=1e-12)
    state = block.init_state(2)
    parts = []
    for start, stop in ((0, 2), (2, 7), (7, 8), (8, 9), (9, 11)):
        out, state = block(z[:, start:stop], attention_mask=mask[:, start:stop], state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], rtol=1e-10, atol=1e-12)


def test_a_rivals_run_trains_what_its_row_says(tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher")
    values = run_values(
        tmp_path, teacher, evaluation={"samples": 0, "speed_lengths": []},
        student={"branches": "flex", "reverse": False, "major_scan": False},
        stage1={"steps": 2, "losses": {"block": 1}}, stage2={"steps": 2, "losses": {"block": 1}},
        stage3={"steps": 2, "learning_rate": 1e-2, "losses": {"token": 1}},
    )  # fmt: skip
    row = Row(
        name="rival", convolution=2, temperature=2.0, freeze={"stage1": [r"scan\.[cbx]_proj"], "stage3": ["lora_"]}
    )
    run = RivalRun(parse_config(values), row)
    temperatures = set()

    def noted(*args, temperature, **options):
        temperatures.add(temperature)
        return answer_losses(*args, temperature=temperature, **options)

    monkeypatch.setattr(objective, "answer_losses", noted)
    run.check_stages()
    run.prepare()
    states = []
    for number in range(4):
        if number:
            run.train(number)
        states.append(handoff.load_result(run.folder, number, run.teacher_hash, run.config)[0])

    def changed(before, after):
        return {name for name in after if name not in before or not torch.equal(before[name], after[name])}

    assert temperatures == {2.0} and Run.objective.temperature == 1.0
    first, second, third = (changed(a, b) for a, b in pairwise(states))
    assert any(name.endswith("scan.conv_weight") for name in first)
    assert not any("c_proj" in name for name in first) and any("c_proj" in name for name in second)
    assert any("c_proj" in name for name in third)
    updates = [tensor for name, tensor in states[3].items() if "lora_B" in name]
    assert updates and not any(tensor.any() for tensor in updates)
    with torch.no_grad():
        student = run.student_after(3).model
        ids = torch.arange(20, 30)[None]
        steps = student.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        again = student.generate(input_ids=ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(steps, again)


def test_a_convolution_goes_with_a_causal_scan_alone():
    with pytest.raises(ValueError, match="convolution must go with a scan without reverse"):
        ConvolvedScan.of(MMATE(24, 3, 1), 4)
