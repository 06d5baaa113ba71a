"""Processes that share rows share the teacher: what it says of their slabs is what it says of whole rows."""

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from small_run import run_values, save_teacher
from stand_ins import config_of, stage_trainer, teacher_model

from linmu_distill import train
from linmu_distill.config import parse_config
from linmu_distill.losses import kept_positions
from linmu_distill.objective import Objective, Teacher, assemble, read_batch
from linmu_distill.parallel import Sharing
from linmu_distill.sources import build_source
from linmu_distill.student import new_student, set_windows, trainable_parameters
from linmu_distill.teacher import load_teacher
from linmu_ops import LinmuWarning

NEAR = {"window": [1, 2, 2], "text_window": 8, "kept_tokens": 4}
EVERY = {"losses": dict.fromkeys(("hidden", "token", "sequence", "supervised"), 0.5)}


class Own:
    """What the teacher is said to answer: each true answer, twice."""

    def known(self, samples):
        return [None] * len(samples)

    def __call__(self, others):
        return [dataclasses.replace(s, turns=tuple((q, f"{a} {a}") for q, a in s.turns)) for s in others]


def derived(group, folder, preset, number, more, packing, kind="sdpa"):
    """What the teacher says of a slab; losses and gradients. The parts of answers by their place in whole rows."""
    student_options = NEAR if preset == "exact" else {"window": [1, 2, 2]}
    values = run_values(folder, f"{folder}/teacher", preset=preset, student=student_options)
    config = parse_config({**values, f"stage{number}": {"steps": 2, **more}})
    teacher, tokenizer = load_teacher(config.teacher, "float32")
    stage, where = config.stage(number), torch.device("cpu")
    source = build_source(config.stage_data(number), config.teacher, teacher, tokenizer, 0)
    samples = source.samples(0)
    teacher.double()
    teacher.set_attn_implementation(kind)
    student, blocks, _ = new_student(teacher, config)
    student.double()
    chosen = {id(p) for p in trainable_parameters(student, blocks, stage).values()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    set_windows(blocks.values(), stage.windows)
    asked = Teacher(teacher, list(blocks))
    source = SimpleNamespace(processor=source.processor, packing=packing)
    own = Own() if "sequence" in stage.losses else None
    micro = read_batch(source, samples, asked, student, stage, own, where)
    runs = []
    handle = teacher.get_decoder().layers[0].mlp.register_forward_hook(lambda *a: runs.append(a[1][0].shape[1]))
    part = assemble(micro, asked, student, stage, where, group)
    handle.remove()
    kept = kept_positions(micro.asked["labels"], micro.asked.get("seq_idx"))
    places = kept.within(*part.slab).nonzero().flatten()
    said = {f"hidden {i}": t for i, t in enumerate(part.hidden)}
    said |= {f"input {i} {name}": t for i, given in enumerate(part.inputs) for name, t in given.items()
             if name == "hidden_states"}  # fmt: skip
    for kind, weights in part.kinds.items():
        each = [weights] if isinstance(weights, torch.Tensor) else weights
        said |= {f"{kind} {i}": w for i, w in enumerate(each)}
    states = part.states
    losses = Objective(student, asked, stage)(part, micro.counts)
    sum(stage.losses.get(name, 0) * value for name, value in losses.items()).backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return {
        "length": micro.asked["input_ids"].shape[1], "longer": micro.batch["input_ids"].shape[1], "runs": runs,
        "said": said, "states": states, "places": places,
        "derived": {n: v.detach() for n, v in losses.items()} | gradients,
    }  # fmt: skip


@pytest.mark.parametrize(
    "preset, number, more, packing, n",
    [
        ("exact", 1, {}, True, 2),
        ("exact", 3, EVERY, True, 3),
        ("paper", 3, EVERY, False, 2),
        pytest.param("exact", 1, {}, False, 3, marks=pytest.mark.sweep),
        pytest.param("exact", 2, {}, True, 4, marks=pytest.mark.sweep),
        pytest.param("exact", 3, EVERY, False, 4, marks=pytest.mark.sweep),
        pytest.param("paper", 2, {}, False, 4, marks=pytest.mark.sweep),
    ],
)
def test_a_shared_teacher_says_the_same(gang, tmp_path, preset, number, more, packing, n):
    """Rows that the teacher's own answers make longer are cut elsewhere. Its two heads are fewer than three."""
    save_teacher(tmp_path / "teacher")
    want = derived(None, tmp_path, preset, number, more, packing)
    found = gang(n, derived, tmp_path, preset, number, more, packing)
    assert sum(sum(each["runs"]) for each in found) == want["length"] == sum(want["runs"])
    assert max(each["runs"][0] for each in found) == -(-want["length"] // n)
    assert not packing or number < 3 or want["longer"] > want["length"]
    assert want["said"]
    for name, whole in want["said"].items():
        together = torch.cat([each["said"][name] for each in found], dim=1)
        assert together.shape == whole.shape, name
        rounding = 1e-12 if whole.dtype == torch.float64 else 1e-6
        assert (together.double() - whole.double()).abs().max() <= rounding * max(1, whole.double().abs().max()), name
    states = torch.empty_like(want["states"])
    for each in found:
        states[each["places"]] = each["states"]
    assert (states - want["states"]).abs().max() <= 1e-12 * max(1, want["states"].abs().max())
    for name, whole in want["derived"].items():
        total = sum(each["derived"][name] for each in found)
        # Losses are float32.
        assert (total - whole).abs().max() <= 1e-5 * max(1e-3, whole.abs().max()), name


def test_a_teacher_that_cannot_be_shared_runs_whole(gang, tmp_path):
    """And says the same."""
    save_teacher(tmp_path / "teacher")
    what = tmp_path, "paper", 1, {}, False, "eager"
    want, found = derived(None, *what), gang(2, derived, *what)
    assert [each["runs"] for each in found] == [want["runs"]] * 2
    for name, whole in want["said"].items():
        together = torch.cat([each["said"][name] for each in found], dim=1)
        torch.testing.assert_close(together, whole, rtol=1e-12, atol=1e-12, msg=name)


def test_a_teacher_that_cannot_be_shared_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sharing", lambda *_: Sharing(None, 2, 0, 0, 1))
    teacher = teacher_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LinmuWarning)
        stage_trainer(config_of(tmp_path), 1, teacher=teacher)
    teacher.set_attn_implementation("eager")
    with pytest.warns(LinmuWarning, match=r"^stage 1: each process that shares rows .*: its attention is eager, not s"):
        stage_trainer(config_of(tmp_path), 1, teacher=teacher)
