"""The shipped teacher's training: with a tutor, and without one on many keys, chains of assignments and long pages."""

import json
from dataclasses import replace

import pytest
import torch

from tools import make_teacher
from tools.make_teacher import CURRICULA, FAR, Phase, Trainer

SHORT = {"needle_frames": (3, 5), "needle_batch": 2, "lines": 6}


def test_only_the_shipped_curriculum_has_a_tutor():
    assert {name: tutored for name, (_, tutored) in CURRICULA.items()} == {"shipped": True, "long": False}
    phases = [phase for phase in CURRICULA["long"][0] if phase.part == "mind"]
    assert {"needles", "tracking", "page"} < set(phases[-1].mixture)
    assert [phase.keys for phase in phases] == [1, 4, 16, 32] and phases[-1].lines * 8 > 256


@pytest.mark.parametrize("group", ["needles", "tracking", "page", "needle"])
def test_a_step_without_a_tutor_lowers_the_loss_of_its_batch(group, tmp_path, monkeypatch):
    phase = Phase("mind", 12, (1e-3, 1e-3), {group: 1.0}, keys=3, **SHORT)
    monkeypatch.setitem(CURRICULA, "long", ((phase,), False))
    monkeypatch.setattr(make_teacher, "WARMUP", 1)
    torch.manual_seed(0)
    trainer = Trainer(tmp_path, "mind", 0, "long")
    assert not any(p is q for p in trainer.tutor.parameters() for q in trainer.parameters)
    losses = [trainer.train_step(phase)[group] for _ in range(8)]  # of one batch: the step does not go on
    assert losses[-1] < losses[0]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    mixture = {name: 1.0 for name in FAR}
    phase = Phase("mind", 4, (1e-3, 1e-4), mixture, keys=2, **SHORT)
    monkeypatch.setitem(CURRICULA, "long", ((phase,), False))
    monkeypatch.setattr(make_teacher, "LOG_EVERY", 1)
    Trainer(tmp_path, "mind", 1, "long").run()
    monkeypatch.setitem(CURRICULA, "long", ((replace(phase, steps=6),), False))
    Trainer(tmp_path, "mind", 1, "long").run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert not any("misses" in name for record in records for name in record)
