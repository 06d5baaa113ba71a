"""The loop of one stage on tiny models: what trains, what is refused, and that nothing is ever lost."""

import dataclasses
import json
import math
import os
import signal

import pytest
import stand_ins
import torch
from safetensors.torch import load_file
from training import curve

from linmu_distill.checkpoint import CheckpointStore
from linmu_distill.config import ConfigError
from linmu_distill.objective import Objective, TrainingError
from linmu_distill.stages import STAGES
from linmu_distill.student import add_lora, merge_lora, mixers, own_state, set_windows, trainable_parameters
from linmu_distill.teacher import (
    AnswerCache,
    own_answers,
    predicts_targets,
    prompts,
)
from linmu_distill.train import Interrupted, checksums, learning_rate
from linmu_models.hooks import attention_modules, record_outputs


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stage_trains_what_the_table_says(tmp_path, number):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path, **{f"stage{number}": {"steps": 3}}), number)
    before = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    trainer.run()
    changed = {name for name, p in trainer.student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainer.trainable)
    kinds = {"scan": ".scan", "windows": ".windows", "mix": ".mix", "lora": ".lora_", "norm": ".self_attn.norm."}
    seen = {kind for kind, mark in kinds.items() if any(mark in name for name in changed)}
    assert seen == [{"scan", "norm"}, {"scan", "norm", "windows", "mix"}, set(kinds)][number - 1]
    assert all("visual" not in name for name in changed)
    if number == 3:
        assert all(".mlp." in name for name in changed if ".lora_" in name)
    records = curve(tmp_path / "tiny" / f"stage{number}")
    assert [record["step"] for record in records] == [1, 2, 3]
    weights = trainer.stage.losses
    for record in records:
        assert record["loss"] == pytest.approx(sum(weights[name] * record[name] for name in weights), rel=1e-5)
        assert math.isfinite(record["gradient_norm"]) and record["gradient_norm"] > 0


def test_losses_fall(tmp_path):
    config = stand_ins.config_of(tmp_path, stage1={"steps": 60, "learning_rate": 1e-2})
    trainer = stand_ins.stage_trainer(config, 1)
    source = trainer.source
    source.samples = lambda step, samples=source.samples: samples(step % 2)
    trainer.run()
    records = curve(trainer.folder)
    for name in ("hidden", "token"):
        first, last = (sum(r[name] for r in part) / 10 for part in (records[:10], records[-10:]))
        assert last < 0.6 * first


def test_blocks_see_what_the_teachers_attention_saw(tmp_path):
    """Then a wrong block below changes nothing above it: each block learns by itself."""
    losses = []
    for wrong in (False, True):
        config = stand_ins.config_of(tmp_path, stage1={"steps": 1})
        trainer = stand_ins.stage_trainer(config, 1)
        trainer.stage = dataclasses.replace(trainer.stage, block_input="teacher")
        if wrong:
            trainer.student.get_decoder().layers[0].self_attn.norm.weight.data.mul_(-3.0)
        part = stand_ins.part_of(trainer, trainer.source.samples(0))
        objective = Objective(trainer.student, trainer.teacher, trainer.stage)
        modules = list(attention_modules(trainer.student).values())
        with record_outputs(modules) as outputs:
            loss = objective(part, part.counts)
        alone = [
            m(x["hidden_states"], part.batch["attention_mask"][:, None, None])[0]
            for m, x in zip(modules, part.inputs, strict=True)
        ]
        losses.append((float(loss["token"].detach()), [output.detach() for output in outputs]))
        for output, expected in zip(outputs, alone, strict=True):
            torch.testing.assert_close(output, expected)
    assert losses[0][0] != losses[1][0]
    assert not torch.equal(losses[0][1][0], losses[1][1][0])
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1][1:], losses[1][1][1:], strict=True))


def run_apart(folder, number, kill_at=0):
    """Train a stage in a process of its own, which dies without warning after step `kill_at`; its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            trainer = stand_ins.stage_trainer(stand_ins.config_of(folder), number)

            def die(step):
                if step == kill_at:
                    trainer.store.wait()
                    os.kill(os.getpid(), signal.SIGKILL)

            trainer.on_step = die
            trainer.run()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def last_tensors(stage):
    """Those of a stage's newest checkpoint."""
    step = CheckpointStore(stage / "checkpoints").load()[0]
    (path,) = stage.glob(f"checkpoints/step-{step:09d}/*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("number", [1, 3])
def test_a_killed_run_ends_with_the_same_curve(tmp_path, number):
    """To the last bit, on one thread; also when the newest checkpoint is cut short between two attempts."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_apart(whole, number) == 0
    stage = broken / "tiny" / f"stage{number}"
    assert run_apart(broken, number, kill_at=9) == -signal.SIGKILL
    assert CheckpointStore(stage / "checkpoints").steps() == [4, 8]
    (tensors,) = stage.glob("checkpoints/step-000000008/*.safetensors")
    os.truncate(tensors, 100)
    assert run_apart(broken, number, kill_at=6) == -signal.SIGKILL
    assert run_apart(broken, number) == 0
    assert curve(stage) == curve(whole / "tiny" / f"stage{number}")
    states = [last_tensors(folder / "tiny" / f"stage{number}") for folder in (whole, broken)]
    assert states[0] and states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_resuming_keeps_the_schedule_and_the_optimiser(tmp_path):
    """Weights alone are no checkpoint: the learning rate would start again."""
    config = stand_ins.config_of(tmp_path)

    class Stop(Exception):
        pass

    def stop(step):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        stand_ins.stage_trainer(config, 1, on_step=stop).run()
    trainer = stand_ins.stage_trainer(config, 1)
    trainer.run()
    records = curve(trainer.folder)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["learning_rate"] for r in records] == [learning_rate(config.stage(1), i) for i in range(10)]


def test_ctrl_c_saves_then_stops(tmp_path):
    config = stand_ins.config_of(tmp_path)
    trainer = stand_ins.stage_trainer(config, 1, on_step=lambda step: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped at step 3 of stage 1; all is saved, go on with --resume"):
        trainer.run()
    assert trainer.store.steps() == [3]
    whole = stand_ins.stage_trainer(stand_ins.config_of(tmp_path / "whole"), 1)
    whole.run()
    stand_ins.stage_trainer(config, 1).run()
    assert curve(trainer.folder) == curve(whole.folder)


def test_a_signal_that_comes_while_the_last_checkpoint_is_written_is_not_lost(tmp_path, monkeypatch):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 1)
    wait = trainer.store.wait

    def interrupted():
        wait()
        if trainer.store.steps()[-1:] == [10]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.store, "wait", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 10 of stage 1; all is saved, go on with --resume"):
        trainer.run()


def test_ctrl_c_in_the_last_step_stops_too(tmp_path):
    """And going on ends the stage as if nothing had been, with means over the last steps of all attempts."""
    config = stand_ins.config_of(tmp_path)
    trainer = stand_ins.stage_trainer(
        config, 1, on_step=lambda step: step == 10 and os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(Interrupted, match="stopped at step 10 of stage 1; all is saved, go on with --resume"):
        trainer.run()
    means = stand_ins.stage_trainer(config, 1).run()
    assert means == stand_ins.stage_trainer(stand_ins.config_of(tmp_path / "whole"), 1).run()
    records = curve(trainer.folder)
    assert len(records) == 10 and means["token"] == pytest.approx(sum(r["token"] for r in records) / 10)


def test_nan_stops_the_run_and_says_where(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 1)
    block = attention_modules(trainer.student)[1]

    def spoil(step):
        if step == 6:
            with torch.no_grad():
                block.scan.x_proj.weight[0, 0] = torch.nan

    trainer.on_step = spoil
    with pytest.raises(TrainingError, match=r"stage 1, step 7: the loss is not finite: hidden = nan.* is at step 4"):
        trainer.run()
    assert trainer.store.load()[0] == 4
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last_tensors(trainer.folder).values())
    assert len(curve(trainer.folder)) == 6


def test_nan_gradient_names_the_parameter(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 1)
    attention_modules(trainer.student)[0].scan.o_proj.bias.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(
        TrainingError, match=r"step 1: the gradient's norm is nan; it is not finite in .*layers.0.*o_proj.bias"
    ):
        trainer.run()


def test_a_parameter_without_gradient_is_an_error(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 1)
    trainer.trainable["ghost"] = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TrainingError, match="step 1: trainable, but no gradient reaches ghost"):
        trainer.run()


def test_a_stage_whose_branch_is_off_is_an_error(tmp_path):
    """Stage 2 with Local-Swin still off would train half of what it should, silently."""
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 2)
    set_windows(attention_modules(trainer.student).values(), False)
    with pytest.raises(TrainingError, match=r"no gradient reaches .*windows"):
        trainer.run()


def test_steps_in_which_student_and_teacher_are_equal_do_not_count(tmp_path):
    config = stand_ins.config_of(tmp_path, stage1={"steps": 14})
    trainer = stand_ins.stage_trainer(config, 1)
    for p in trainer.trainable.values():
        p.register_hook(lambda grad: grad * ((trainer.folder / "metrics.jsonl").read_text().count("\n") >= 12))
    trainer.run()
    norms = [json.loads(line)["gradient_norm"] for line in (trainer.folder / "metrics.jsonl").open()]
    assert norms[:12] == [0.0] * 12 and all(norms[12:])


def test_a_gradient_that_stays_zero_is_an_error(tmp_path):
    config = stand_ins.config_of(tmp_path, stage1={"steps": 12})
    trainer = stand_ins.stage_trainer(config, 1)
    attention_modules(trainer.student)[0].scan.o_proj.bias.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=r"step 10: the gradient has been 0 in every step for .*o_proj.bias"):
        trainer.run()


def test_a_stage_in_which_nothing_gets_a_gradient_does_not_run_to_its_end(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path, stage1={"steps": 1000}), 1)
    for p in trainer.trainable.values():
        p.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match="step 100: no step has given a gradient to anything"):
        trainer.run()


def test_a_stage_that_trains_nothing_is_an_error(tmp_path):
    teacher = stand_ins.teacher_model()
    student = stand_ins.student_model(teacher)
    stage = dataclasses.replace(STAGES[0], freeze=(".*",))
    with pytest.raises(ConfigError, match="stage1 trains nothing"):
        trainable_parameters(student, mixers(student, teacher), stage)


def test_a_frozen_parameter_that_changes_is_an_error(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 1)

    def spoil(step):
        if step == 2:
            with torch.no_grad():
                trainer.student.get_decoder().layers[0].mlp.up_proj.weight[3, 3] += 1e-6

    trainer.on_step = spoil
    with pytest.raises(TrainingError, match=r"frozen, but changed: .*layers.0.mlp.up_proj.weight"):
        trainer.run()
    assert trainer.store.steps() == []


def test_other_configuration_does_not_resume(tmp_path):
    stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 1).run()
    changed = stand_ins.config_of(tmp_path, stage1={"steps": 20})
    with pytest.raises(TrainingError, match="made with another configuration"):
        stand_ins.stage_trainer(changed, 1).run()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_teacher_inside_and_beside_give_the_same_losses(tmp_path, number):
    curves, sizes = [], []
    for inside in (True, False):
        config = stand_ins.config_of(tmp_path / str(inside), **{f"stage{number}": {"steps": 4, "learning_rate": 1e-2}})
        teacher = stand_ins.teacher_model()
        trainer = stand_ins.stage_trainer(config, number, teacher=teacher, inside=inside)
        trainer.run()
        curves.append(curve(trainer.folder))
        tensors = {p.data_ptr(): p.numel() for m in (teacher, trainer.student) for p in m.parameters()}
        sizes.append(sum(tensors.values()))
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    attention = sum(p.numel() for m in attention_modules(stand_ins.teacher_model()).values() for p in m.parameters())
    assert sizes[1] - sizes[0] == sum(p.numel() for p in stand_ins.teacher_model().parameters()) - attention


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_batches_are_one_mean(tmp_path, accumulation):
    """Micro-batches of unequal size: the mean is over the tokens of the step, not over the batches."""
    config = stand_ins.config_of(tmp_path, gradient_accumulation=accumulation, stage3={"steps": 1})
    trainer = stand_ins.stage_trainer(config, 3)
    together = stand_ins.stage_trainer(stand_ins.config_of(tmp_path / "one", stage3={"steps": 1}), 3)
    samples = together.source.samples
    together.source.samples = lambda step: [s for i in range(accumulation) for s in samples(step * accumulation + i)]
    trainer.run()
    together.run()
    ours, theirs = curve(trainer.folder)[0], curve(together.folder)[0]
    apart = {"tokens": 0, "padding": 0}  # shorter rows are padded to less
    assert {**ours, **apart} == pytest.approx({**theirs, **apart}, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    curves = []
    for on in (False, True):
        trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path / str(on), stage2={"steps": 3}), 2)
        if on:
            trainer.student.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.run()
        curves.append(curve(trainer.folder))
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_bfloat16_trains(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path, precision="bfloat16", stage2={"steps": 2}), 2)
    trainer.run()
    plain = stand_ins.stage_trainer(stand_ins.config_of(tmp_path / "plain", stage2={"steps": 2}), 2)
    plain.run()
    for ours, theirs in zip(curve(trainer.folder), curve(plain.folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
        assert ours["loss"] != theirs["loss"]
    assert all(p.dtype == torch.float32 for p in trainer.trainable.values())


def test_recorded_outputs_are_whole_batches_and_need_no_position(tmp_path):
    """`layer(...)[0]` of a module that returns a tensor would be batch item 0; the decoder passes keywords only."""

    class Plain(torch.nn.Module):
        def forward(self, *, hidden_states):
            return hidden_states * 2

    class Tuple(Plain):
        def forward(self, *, hidden_states):
            return hidden_states * 3, None

    modules, z = [Plain(), Tuple()], torch.randn(2, 4, 3)
    with record_outputs(modules) as outputs:
        for module in modules:
            module(hidden_states=z)
    assert torch.equal(outputs[0], z * 2) and torch.equal(outputs[1], z * 3)
    modules[0](hidden_states=z + 1)
    assert torch.equal(outputs[0], z * 2)


def test_hidden_loss_of_a_stage_by_hand(tmp_path):
    """Against the modules called one by one, with each stream its own."""
    config = stand_ins.config_of(tmp_path)
    trainer = stand_ins.stage_trainer(config, 1)
    samples = trainer.source.samples(0)
    part = stand_ins.part_of(trainer, samples)
    found = Objective(trainer.student, trainer.teacher, trainer.stage)(part, part.counts)
    batch = {k: v for k, v in part.batch.items() if k != "labels"}
    streams = []
    for model in (trainer.teacher.model, trainer.student):
        caught = []
        handles = [
            m.register_forward_hook(lambda m, a, o, caught=caught: caught.append(o[0]))
            for m in attention_modules(model).values()
        ]
        logits = model(**batch).logits
        for handle in handles:
            handle.remove()
        streams.append((caught, logits))
    mask = batch["attention_mask"].bool()
    wanted = sum(((a - b) ** 2).sum(-1)[mask].mean() for a, b in zip(streams[0][0], streams[1][0], strict=True))
    torch.testing.assert_close(found["hidden"], wanted / 2, rtol=1e-5, atol=1e-5)
    labels = part.batch["labels"][:, 1:]
    log_t, log_s = (s[1][:, :-1].log_softmax(-1)[labels != -100] for s in streams)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    torch.testing.assert_close(found["token"], kl, rtol=1e-4, atol=1e-5)


class TestOwnAnswers:
    """L_seq is on the teacher's own greedy answers."""

    @pytest.fixture
    def teacher(self):
        return stand_ins.teacher_model()

    def test_prompts_end_before_the_last_answer(self):
        source = stand_ins.Source()
        samples = source.samples(0)
        batch = source.processor(samples)
        cut = prompts(batch, stand_ins.PAD)
        assert cut["pixel_values"] is batch["pixel_values"]
        for i, sample in enumerate(samples):
            row = cut["input_ids"][i][cut["attention_mask"][i].bool()].tolist()
            whole = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
            last = [*stand_ins.Tokenizer().encode(sample.turns[-1][1]), stand_ins.EOS]
            assert row + last == whole
        assert bool(cut["attention_mask"][:, -1].all())

    def test_they_are_greedy_and_turn_by_turn(self, teacher):
        source, tokenizer = stand_ins.Source(), stand_ins.Tokenizer()
        samples = [s for step in range(4) for s in source.samples(step)]
        answers = own_answers(teacher, tokenizer, source, samples, 6)
        checked = 0
        for sample, given in zip(samples, answers, strict=True):
            history = []
            for (question, _), said in zip(sample.turns, given, strict=True):
                if said is None:
                    break
                alone = source.processor([stand_ins.Sample(sample.seed, (*history, (question, said)))])
                with torch.no_grad():
                    logits = teacher(**{k: v for k, v in alone.items() if k != "labels"}).logits
                labels = alone["labels"][0]
                start = len(labels) - len(tokenizer.encode(said)) - 1
                assert logits[0, start - 1 : -1].argmax(-1).tolist() == labels[start:].tolist()
                history.append((question, said))
                checked += 1
        assert checked > 5

    def test_equal_answers_are_found_without_decoding(self, teacher):
        source, tokenizer = stand_ins.Source(), stand_ins.Tokenizer()
        samples = [s for step in range(4) for s in source.samples(step)]
        answers = own_answers(teacher, tokenizer, source, samples, 6)
        ended = [(s, a) for s, a in zip(samples, answers, strict=True) if None not in a]
        own = [stand_ins.Sample(s.seed, tuple((q, x) for (q, _), x in zip(s.turns, a, strict=True))) for s, a in ended]
        mixed = [own[0], samples[0], own[1]]
        from linmu_distill.losses import kept_positions

        batch = source.processor(mixed)
        kept = kept_positions(batch["labels"])
        with torch.no_grad():
            states = teacher.model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
        same = predicts_targets(kept.select(states), teacher.lm_head, kept, 3, 2)
        expected = [True, answers[0] == [a for _, a in samples[0].turns], True]
        assert same.tolist() == expected

    def test_they_are_cached_on_disk(self, tmp_path, teacher):
        config = stand_ins.config_of(tmp_path, stage3={"steps": 3})
        first = stand_ins.stage_trainer(config, 3, teacher=teacher)
        samples = first.source.samples(0)
        wanted = first.transcripts(samples)
        assert len(first.transcripts.cache) == len(samples)
        second = stand_ins.stage_trainer(config, 3, teacher=teacher)
        second.transcripts.model = None
        assert second.transcripts(samples) == wanted
        assert second.transcripts.unfinished == first.transcripts.unfinished == wanted.count(None)
        other = AnswerCache(config.folder / "answers.sqlite", "another teacher")
        assert other.get(other.key(samples[0], 6)) is None


def test_lora_leaves_the_vision_tower_and_the_teacher_alone(tmp_path):
    teacher = stand_ins.teacher_model()
    before = checksums(dict(teacher.named_parameters()))
    student = stand_ins.student_model(teacher)
    config = stand_ins.config_of(tmp_path)
    handle = add_lora(student, config.lora_rank, seed=0)
    blocks = mixers(student, teacher)
    names = trainable_parameters(student, blocks, config.stage(3))
    lora = [name for name in names if ".lora_" in name]
    assert len(lora) == 2 * 3 * 2 and all("language_model" in name for name in lora)
    assert set(own_state(student, blocks)) == set(names)
    with torch.no_grad():
        for name in lora:
            names[name].normal_()
    batch = {k: v for k, v in stand_ins.Source().processor(stand_ins.Source().samples(0)).items() if k != "labels"}
    with torch.no_grad():
        wanted = student(**batch).logits
        merged = merge_lora(handle)
        torch.testing.assert_close(merged(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert checksums(dict(teacher.named_parameters())) == before
    with pytest.raises(ValueError, match="matches no linear layer"):
        add_lora(merged, config.lora_rank, 0, "nothing")


def test_a_checkpoint_of_an_older_release_is_refused(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 1)
    progress = {"fingerprint": trainer.config.fingerprint(1)}
    trainer.store.save(3, {"progress.pt": progress, "weights.pt": {}}, {})
    trainer.store.wait()
    with pytest.raises(TrainingError, match=r"stage 1 has a checkpoint of an older release, in .*checkpoints; finish"):
        trainer.run()
