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


def write(store, step, files, tensors):
    store.save(step, files, tensors)
    store.wait()


def read(store):
    """The newest checkpoint's step, its number and its tensor of 1,000 numbers."""
    step, files, passed_over = store.load()
    tensor = torch.full((1000,), float("nan"))
    if step:
        store.fill(step, {"x": tensor})
    return step, files.get("n.pt"), tensor, passed_over


def test_round_trip_and_the_last_k(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    kinds = {
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), "half": torch.randn(5).bfloat16(),
        "strided": torch.randn(4, 6).t(), "long": torch.arange(7), "a.b": torch.randn(2, 1, 3),
    }  # fmt: skip
    for step in (5, 10, 15):
        tensors = {name: value + step for name, value in kinds.items()}
        store.save(step, {"a.pt": {"x": torch.full((3,), step)}, "b.pt": [step]}, tensors)
        for value in tensors.values():
            value.zero_()  # Training goes on while they are written.
    store.wait()
    assert store.steps() == [10, 15]
    step, files, passed_over = store.load()
    assert (step, files["b.pt"], passed_over) == (15, [15], [])
    assert torch.equal(files["a.pt"]["x"], torch.full((3,), step))
    found = {name: torch.zeros_like(value) for name, value in kinds.items()}
    store.fill(step, found)
    for name, value in kinds.items():
        assert torch.equal(found[name], value + 15), name
    assert CheckpointStore(tmp_path / "none").load() == (0, {}, [])


@pytest.mark.parametrize(
    "asked, line", [({"y": (3,)}, "Missing key in checkpoint state_dict: y"), ({"x": (4,)}, "[Ss]ize")]
)
def test_tensors_that_a_checkpoint_has_not_are_refused(tmp_path, asked, line):
    store = CheckpointStore(tmp_path)
    write(store, 1, {}, {"x": torch.ones(3)})
    with pytest.raises(CheckpointError, match=rf"^[^\n]*step-000000001 cannot be read: [^\n]*{line}[^\n]*$"):
        store.fill(1, {name: torch.zeros(shape) for name, shape in asked.items()})


@pytest.mark.parametrize("damage", ["cut", "flip", "missing file", "no manifest", "manifest cut", "empty manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        write(store, step, {"n.pt": step}, {"x": torch.full((1000,), float(step))})
    folder = tmp_path / "step-000000002"
    (weights,) = folder.glob("*.safetensors")
    if damage == "cut":
        os.truncate(weights, 700)
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "missing file":
        weights.unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "manifest cut":
        os.truncate(folder / "manifest.json", 20)
    else:
        (folder / "manifest.json").write_text("[]")
    step, number, tensor, passed_over = read(store)
    assert step == number == 1 and bool((tensor == 1).all())
    assert len(passed_over) == 1 and "step-000000002" in passed_over[0]


@pytest.mark.parametrize("large", ["file", "tensor"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path, large):
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1, {"a.pt": torch.zeros(10)}, {"x": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    much, little = torch.zeros(100_000), torch.zeros(10)
    files, tensors = ({"a.pt": much}, {"x": little}) if large == "file" else ({"a.pt": little}, {"x": much})
    line = r"step 2 could not be written .*; the last good one is at step 1"
    try:
        store.save(2, files, tensors)
        with pytest.raises(CheckpointError, match=line):  # at the next one
            store.save(3, {}, {})
        with pytest.raises(CheckpointError, match=line), store.settled():
            store.save(2, files, tensors)
        store.save(2, files, tensors)
        with pytest.raises(KeyError), store.settled():  # What went wrong first is told.
            raise KeyError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert store.load()[0] == 1
    assert [child.name for child in tmp_path.iterdir()] == ["step-000000001"]
    write(store, 3, {"a.pt": torch.zeros(10)}, {})
    assert store.load()[0] == 3


def _write_for_ever(folder, ready):
    store = CheckpointStore(folder, keep=2)
    os.write(ready, b".")
    for step in range(store.load()[0] + 1, 1_000_000):
        store.save(step, {"n.pt": step}, {"x": torch.full((1000,), float(step))})


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
        step, number, tensor, _ = read(store)
        assert step >= last
        if step:
            assert number == step and bool((tensor == step).all())
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


def _saved_where_the_first_cannot(group, folder):
    store = CheckpointStore(folder / ("cannot" if group.rank() == 0 else "can") / "c")
    store.save(3, {"n.pt": 3}, {"x": torch.zeros(4)})
    with pytest.raises(CheckpointError) as caught:
        store.wait()
    return str(caught.value)


def test_what_the_first_process_cannot_begin_is_told_to_all(gang, tmp_path):
    """The others would wait for it, until it comes to ask how its own writing went."""
    (tmp_path / "cannot").write_text("a file")
    lines = gang(4, _saved_where_the_first_cannot, tmp_path)
    assert len(set(lines)) == 1 and "the checkpoint at step 3 could not be written" in lines[0]
    assert "Not a directory" in lines[0] or "File exists" in lines[0]
    assert not list((tmp_path / "can").rglob("*"))


def test_what_outlives_a_killed_run_writes_elsewhere_than_the_next(tmp_path):
    stores = [CheckpointStore(tmp_path / "c") for _ in range(2)]
    old, new = [store._begin(3, {"n.pt": 3}) for store in stores]
    assert old != new and not old.exists() and [path.name for path in new.iterdir()] == ["n.pt"]
