"""Checkpoints are whole or not there."""

import os
import resource
import signal
import time

import pytest
import torch

from linmu_distill.checkpoint import (
    CheckpointError,
    CheckpointStore,
    random_states,
    set_random_states,
    write_atomically,
)


def test_round_trip_and_the_last_k(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    for step in (5, 10, 15):
        store.save(step, {"a.pt": {"x": torch.full((3,), step)}, "b.pt": [step]})
    assert store.steps() == [10, 15]
    step, files, passed_over = store.load()
    assert (step, files["b.pt"], passed_over) == (15, [15], [])
    assert torch.equal(files["a.pt"]["x"], torch.full((3,), 15))
    assert CheckpointStore(tmp_path / "none").load() == (0, {}, [])


@pytest.mark.parametrize("damage", ["cut", "flip", "missing file", "no manifest", "manifest cut", "empty manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, {"a.pt": torch.arange(1000)})
    folder = tmp_path / "step-000000002"
    if damage == "cut":
        os.truncate(folder / "a.pt", 700)
    elif damage == "flip":
        content = bytearray((folder / "a.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "a.pt").write_bytes(content)
    elif damage == "missing file":
        (folder / "a.pt").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "manifest cut":
        os.truncate(folder / "manifest.json", 20)
    else:
        (folder / "manifest.json").write_text("[]")
    step, files, passed_over = store.load()
    assert step == 1 and torch.equal(files["a.pt"], torch.arange(1000))
    assert len(passed_over) == 1 and "step-000000002" in passed_over[0]


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {"a.pt": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .* the last good one is at step 1"):
            store.save(2, {"a.pt": torch.zeros(10), "b.pt": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert store.load()[0] == 1
    assert [child.name for child in tmp_path.iterdir()] == ["step-000000001"]
    store.save(3, {"a.pt": torch.zeros(10)})
    assert store.load()[0] == 3


def _write_for_ever(folder, ready):
    store = CheckpointStore(folder, keep=2)
    os.write(ready, b".")
    for step in range(store.load()[0] + 1, 1_000_000):
        store.save(step, {"a.pt": torch.full((20_000,), float(step)), "b.pt": step})


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path):
    store, last = CheckpointStore(tmp_path), 0
    for delay in (0.02, 0.045, 0.07, 0.11, 0.16, 0.23, 0.3):
        ready, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                _write_for_ever(tmp_path, tell)
            finally:
                os._exit(1)
        os.read(ready, 1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step, files, _ = store.load()
        assert step >= last
        if step:
            assert files["b.pt"] == step and bool((files["a.pt"] == step).all())
        last = step
    assert last > 1


def test_random_states_come_back():
    states = random_states()
    first = torch.rand(3)
    set_random_states(states)
    assert torch.equal(first, torch.rand(3))


def test_small_files_are_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
