"""Two processes give the losses of one: DDP and FSDP2 over gloo."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import stand_ins
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from training import curve, in_processes

from linmu_distill import cli
from linmu_distill.checkpoint import CheckpointError, CheckpointStore
from linmu_distill.objective import TrainingError
from linmu_distill.parallel import ANOTHER_ENDED, from_first, sharing
from linmu_distill.student import own_state


def run_two(config, number, kill_at=0):
    """A stage in two processes, of which one dies without warning after step `kill_at`; their exit statuses."""

    def die(step):
        if step == kill_at and int(os.environ["RANK"]):
            last = step // config.checkpoint_every * config.checkpoint_every
            while not (config.folder / f"stage{number}/checkpoints/step-{last:09d}").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def work(rank):
        trainer = stand_ins.stage_trainer(config, number, on_step=die)
        assert trainer.accelerator.num_processes == 2
        trainer.run()
        if config.parallel == "fsdp":  # both models' layers
            for model in (trainer.student, trainer.teacher.model):
                weight = model.get_decoder().layers[0].mlp.up_proj.weight
                assert weight.to_local().numel() == weight.numel() // 2
        blocks = {i: layer.self_attn for i, layer in enumerate(trainer.student.get_decoder().layers)}
        torch.save(own_state(trainer.student, blocks), config.folder / f"state{rank}.pt")

    return in_processes(2, work)


ALONE = {"losses": {"block": 1.0}}


@pytest.mark.parametrize(
    "parallel, number, more",
    [("ddp", 1, {}), ("ddp", 2, ALONE), ("ddp", 3, {}), ("fsdp", 2, {}), ("fsdp", 2, ALONE), ("fsdp", 3, {})],
)
def test_two_processes_are_one(tmp_path, parallel, number, more):
    """Batches are of unequal size, so that a mean of the processes' means would be something else."""
    changes = {f"stage{number}": {"steps": 5, "learning_rate": 1e-2, **more}}
    one = stand_ins.stage_trainer(stand_ins.config_of(tmp_path / "one", gradient_accumulation=2, **changes), number)
    one.run()
    config = stand_ins.config_of(tmp_path / "two", parallel=parallel, **changes)
    assert run_two(config, number) == [0, 0]
    for ours, theirs in zip(curve(config.folder / f"stage{number}"), curve(one.folder), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    states = [torch.load(config.folder / f"state{rank}.pt") for rank in range(2)]
    blocks = {i: layer.self_attn for i, layer in enumerate(one.student.get_decoder().layers)}
    for name, tensor in own_state(one.student, blocks).items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_goes_on_from_its_checkpoint(tmp_path, parallel):
    changes = dict(parallel=parallel, stage2={"steps": 8, "learning_rate": 1e-2})
    whole = stand_ins.config_of(tmp_path / "whole", **changes)
    assert run_two(whole, 2) == [0, 0]
    config = stand_ins.config_of(tmp_path / "cut", **changes)
    assert run_two(config, 2) == [0, 0]
    store = CheckpointStore(config.folder / "stage2/checkpoints")
    (store.folder / "step-000000008/manifest.json").unlink()
    assert run_two(config, 2) == [0, 0]
    assert curve(config.folder / "stage2") == curve(whole.folder / "stage2")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_process_writes_what_it_holds(tmp_path, parallel):
    """Together they write every tensor once."""
    config = stand_ins.config_of(tmp_path, parallel=parallel, stage2={"steps": 2, "learning_rate": 1e-2})
    assert run_two(config, 2) == [0, 0]
    files = sorted((config.folder / "stage2/checkpoints/step-000000002").glob("*.safetensors"))
    assert len(files) == 2
    parts = [load_file(file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    trainer = stand_ins.stage_trainer(config, 2)
    weights = sum(parameter.nbytes for parameter in trainer.trainable.values())
    assert sum(sizes) == 3 * weights + 4 * len(trainer.trainable)
    assert min(sizes) > sum(sizes) // 3


@pytest.mark.parametrize("parallel, number, more", [("fsdp", 3, {}), ("ddp", 2, ALONE)])
def test_a_run_of_two_goes_on_in_one(tmp_path, parallel, number, more):
    """One of them was killed: what is left has the data, the steps and so the losses of both."""
    changes = {f"stage{number}": {"steps": 6, "learning_rate": 1e-2, **more}}
    whole = stand_ins.stage_trainer(stand_ins.config_of(tmp_path / "one", gradient_accumulation=2, **changes), number)
    whole.run()
    config = stand_ins.config_of(tmp_path / "two", parallel=parallel, **changes)
    statuses = run_two(config, number, kill_at=5)
    assert statuses[1] == -signal.SIGKILL and statuses[0]
    stand_ins.stage_trainer(config, number).run()
    ours = curve(config.folder / f"stage{number}")
    assert len(ours) == 6
    for one, other in zip(ours, curve(whole.folder), strict=True):
        assert one == pytest.approx(other, rel=2e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_one_goes_on_in_two(tmp_path, parallel):
    """Which divide its batches, and its weights."""
    config = stand_ins.config_of(
        tmp_path, parallel=parallel, gradient_accumulation=2, stage2={"steps": 6, "learning_rate": 1e-2}
    )
    trainer = stand_ins.stage_trainer(config, 2)
    trainer.run()
    whole = curve(trainer.folder)
    (trainer.store.folder / "step-000000006/manifest.json").unlink()
    assert run_two(config, 2) == [0, 0]
    ours = curve(trainer.folder)
    assert len(ours) == 6 and ours[:4] == whole[:4]
    for one, other in zip(ours, whole, strict=True):
        assert one == pytest.approx(other, rel=2e-4)


def again_and_again(wait):
    """A message or two may go to a process that is no more."""
    while True:
        wait()


@pytest.mark.parametrize("dead", [0, 1])
def test_the_end_of_a_process_is_one_line_of_the_others(tmp_path, dead):
    """Wherever they wait for it: for a sum, for all, for what the first has found, for a checkpoint."""

    def work(rank):
        torch.set_num_threads(1)
        accelerator = Accelerator(cpu=True)
        store = CheckpointStore(tmp_path / "c")
        store.load()
        if rank == dead:
            os.kill(os.getpid(), signal.SIGKILL)
        waits = [
            accelerator.wait_for_everyone, lambda: from_first(lambda: 1), lambda: gather_object([1]),
            lambda: accelerator.reduce(torch.ones(3)), lambda: torch.distributed.barrier(store._group),
        ]  # fmt: skip
        for wait in waits:
            with pytest.raises(cli.typer.Exit), cli._of_others("go on with --resume"):
                again_and_again(wait)
        store.save(1, {"n.pt": 1}, {"x": torch.zeros(4)})
        with pytest.raises(CheckpointError, match=f"could not be written .{ANOTHER_ENDED}.; there is none before it"):
            store.wait()

    statuses = in_processes(2, work)
    assert statuses[dead] == -signal.SIGKILL and statuses[1 - dead] == 0


def test_other_errors_are_not_laid_at_others_door():
    with pytest.raises(RuntimeError, match="gloo"), cli._of_others("go on"):
        raise RuntimeError("gloo: Connection closed by peer")  # One process has no other.


def test_a_run_of_one_does_not_go_on_in_two_without_a_batch_for_each(tmp_path):
    trainer = stand_ins.stage_trainer(stand_ins.config_of(tmp_path), 2)
    trainer._sharing = sharing(SimpleNamespace(num_processes=2, process_index=0), 1)
    with pytest.raises(TrainingError, match=r"was at work on 3 batches a step; go on in a number .*, got 2"):
        trainer._restore_place({"batches": 3, "data": None})
