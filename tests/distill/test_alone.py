"""What a student answers without its scan: rows of the report beside those of its stages."""

import json

import pytest
import torch
from small_run import run_values, save_teacher

from linmu_distill.config import parse_config
from linmu_distill.limited import EQUAL_MEMORY
from linmu_distill.run import Run
from linmu_distill.student import ALONE, exact_alone
from linmu_ops import ExactConfig, ExactMMATE

BLOCK = {"window": [1, 2, 2], "image_window": [1, 2, 2], "text_window": 4, "sink_tokens": 1}


def test_what_is_far_counts_for_nothing_and_kept_tokens_only_where_asked():
    torch.manual_seed(0)
    block = ExactMMATE(16, 2, config=ExactConfig(text_window=2, sink_tokens=0, kept_tokens=3)).double()
    block.share.bias.data.fill_(5.0)
    z = torch.randn(1, 16, 16, dtype=torch.float64)

    def read():
        """Which of the tokens the last one reads."""
        inputs = z.clone().requires_grad_()
        block.windows.v_proj.weight.grad = None
        out = block(inputs)[0, -1].sum()
        return (torch.autograd.grad(out, inputs)[0] != 0).any(-1)[0].nonzero()[:, 0].tolist()

    before = {name: value.clone() for name, value in block.state_dict().items()}
    assert read() == list(range(16))
    with exact_alone([block], kept=False):
        assert set(read()) <= set(range(13, 16))
    with exact_alone([block], kept=True):
        assert len(set(read()) - set(range(13, 16))) == 3
    assert read() == list(range(16))
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize(("kept", "rows"), [(4, list(ALONE)), (0, ["windows alone"])])
def test_rows(tmp_path, kept, rows):
    student = {**BLOCK, "kept_tokens": kept}
    values = run_values(
        tmp_path, save_teacher(tmp_path / "teacher"), preset="exact", student=student,
        evaluation={"samples": {"where": 2}, "speed_lengths": []},
    )  # fmt: skip
    run = Run(parse_config(values))
    run.prepare()
    run.evaluate_stage(0)
    table = json.loads((run.folder / "evaluation.json").read_text())
    assert list(table) == ["teacher", EQUAL_MEMORY, *rows, "initial"]
    assert all(table[label]["where"]["n"] == 2 for label in table)
    assert table[EQUAL_MEMORY]["where"]["tokens"] > 0
    assert len({table[label]["where"]["of"] for label in table}) == len(table)
