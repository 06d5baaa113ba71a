"""Two processes give the losses of one: DDP and FSDP2 over gloo."""

import pytest
import stand_ins
import torch
from training import curve, in_two

from linmu_distill.checkpoint import CheckpointStore
from linmu_distill.student import own_state


def run_two(config, number):
    """A stage in two processes; their exit statuses."""

    def work(rank):
        trainer = stand_ins.stage_trainer(config, number)
        assert trainer.accelerator.num_processes == 2
        trainer.run()
        blocks = {i: layer.self_attn for i, layer in enumerate(trainer.student.get_decoder().layers)}
        torch.save(own_state(trainer.student, blocks), config.folder / f"state{rank}.pt")

    return in_two(work)


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
