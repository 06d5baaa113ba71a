"""One process reads weights and checks files; the others are sent their parts, and what it found."""

import gc
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_run import run_values, save_teacher
from torch.distributed.tensor import DTensor
from training import curve, in_processes
from transformers import LlamaConfig, LlamaForCausalLM

from linmu_distill import checkpoint, handoff, parallel
from linmu_distill.answers import decode_ahead
from linmu_distill.checkpoint import CheckpointError, CheckpointStore
from linmu_distill.config import parse_config
from linmu_distill.handoff import HandoffError
from linmu_distill.objective import Objective, Teacher
from linmu_distill.parallel import from_first, gathered, loaded_by_first, shard
from linmu_distill.run import Run, distill
from linmu_distill.student import add_lora, new_student, store_parameters, trainable_parameters
from linmu_distill.teacher import fingerprint
from linmu_models.generate import load_model

LAYERS = 6


def without_weights(folder, copy):
    """A copy of a model's folder that lacks its weights."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(copy)


def held_bytes():
    """Bytes of all tensors that live in this process, of DTensors its parts."""
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    local = [t for t in found if not isinstance(t, DTensor) and not t.is_meta]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())


def models_of(config, load):
    """A teacher and a student of stage 3, as a run makes them, and what it trains."""
    teacher = load()
    student, blocks, _ = new_student(teacher, config, lambda model: add_lora(model, 4, 0))
    trainable = trainable_parameters(student, blocks, config.stage(3))
    store_parameters(blocks.values(), trainable, teacher.dtype)
    for parameter in student.parameters():
        parameter.requires_grad_(any(parameter is p for p in trainable.values()))
    return teacher, student, list(blocks)


def named(*models):
    return [
        (name, tensor)
        for model in models
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_a_process_is_sent_its_part_a_layer_at_a_time(tmp_path, tied):
    """The second one's folder has no weights. Every value is right, of buffers that are not saved too."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(llama).to(torch.bfloat16).save_pretrained(tmp_path / "first")
    folders = str(tmp_path / "first"), without_weights(tmp_path / "first", tmp_path / "second")
    config = parse_config({"output": f"{tmp_path}/r", "teacher": "none", "parallel": "fsdp"})

    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        gc.collect()
        start, seen = held_bytes(), []
        teacher, student, layers = models_of(config, lambda: loaded_by_first(lambda: load(folders[rank])))
        begun = [name for name, tensor in named(teacher, student) if not tensor.is_meta]
        fully_shard = parallel.fully_shard

        def counted(*args, **kwargs):
            seen.append(held_bytes() - start)
            return fully_shard(*args, **kwargs)

        parallel.fully_shard = counted
        shard(Objective(student, Teacher(teacher, layers), config.stage(3)), student, teacher, accelerator)
        gc.collect()
        left = held_bytes() - start
        theirs, ours, _ = models_of(config, lambda: load(folders[0]))
        whole = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in named(theirs, ours)}
        layer = [t for model in (theirs, ours) for _, t in named(model.model.layers[0])]
        widest = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in layer}.values())
        if rank:
            assert begun == []
            assert max(seen) <= left + widest < 0.9 * sum(whole.values())
        for (name, mine), (other, wanted) in zip(named(teacher, student), named(theirs, ours), strict=True):
            assert (name, mine.dtype, mine.requires_grad) == (other, wanted.dtype, wanted.requires_grad)
            assert torch.equal(gathered(mine), wanted.detach()), name
        # One memory serves both models, and what the teacher ties.
        embeddings = {t.untyped_storage()._cdata for n, t in named(teacher, student) if "embed" in n or "lm_head" in n}
        assert len(embeddings) == (1 if tied else 2)

    def load(folder):
        return load_model(folder, "bfloat16").eval().requires_grad_(False)

    assert in_processes(2, work) == [0, 0]


class TwoWords(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


def test_all_processes_have_what_the_first_finds_or_its_error(tmp_path):
    """A damaged checkpoint is passed over by both, one that holds code is refused by both; the first alone hashes."""
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, {"n.pt": step}, {"x": torch.full((100,), float(step))})
    store.wait()
    (weights,) = (tmp_path / "step-000000002").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")

    def never(path):
        raise AssertionError("hashed on the second process")

    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)
        Accelerator(cpu=True)
        if rank:
            checkpoint.sha256 = never
        step, files, passed_over = CheckpointStore(tmp_path).load()
        assert (step, files) == (1, {"n.pt": 1}) and len(passed_over) == 1
        assert from_first(lambda: rank) == 0
        for error in (ValueError("no such thing"), TwoWords("no such", "thing"), OSError(2, "no such thing", "here")):

            def fail(error=error):
                raise error if not rank else AssertionError("asked of the second process")

            with pytest.raises(Exception, match="no such thing"):
                from_first(fail)
        if not rank:
            torch.save(TwoWords, tmp_path / "step-000000001/n.pt")
            manifest = tmp_path / "step-000000001/manifest.json"
            path = tmp_path / "step-000000001/n.pt"
            facts = json.loads(manifest.read_text())
            facts["files"]["n.pt"] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
            manifest.write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match=r"^[^\n]*n.pt holds [^\n]*nothing is run$"):
            CheckpointStore(tmp_path).load()

    assert in_processes(2, work) == [0, 0]


def test_a_sharded_run_resumes_and_one_process_reads(tmp_path):
    """The second one has no weights of the teacher, and hashes nothing, nor reads what a stage left."""
    folders = save_teacher(tmp_path / "teacher"), without_weights(tmp_path / "teacher", tmp_path / "second")
    steps = {"stage1": {"steps": 2}, "stage2": {"steps": 2, "learning_rate": 1e-2}}
    near = {"window": [1, 2, 2], "text_window": 16, "kept_tokens": 4}
    changes = dict(preset="exact", student=near, evaluation={"samples": 0, "speed_lengths": []}, **steps)

    def trained(stage):
        def work(rank):
            if rank:
                handoff.sha256 = checkpoint.sha256 = handoff.load_file = None
            AcceleratorState._reset_state(reset_partial_state=True)
            values = run_values(tmp_path / "two", folders[rank], parallel="fsdp", **changes)
            distill(parse_config(values), stage=stage, resume=True)

        return work

    def refused(rank):
        with pytest.raises(HandoffError, match=r"^[^\n]*stage1/weights\.safetensors is damaged[^\n]*$"):
            trained(2)(rank)

    one = parse_config(run_values(tmp_path / "one", folders[0], gradient_accumulation=2, **changes))
    for stage in (1, 2):
        distill(one, stage=stage)
        assert in_processes(2, trained(stage)) == [0, 0]
        ours, theirs = (curve(tmp_path / name / f"r/stage{stage}") for name in ("two", "one"))
        for mine, its in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(its, rel=1e-3)
    weights = tmp_path / "two/r/stage1/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert in_processes(2, refused) == [0, 0]


def test_one_process_reads_what_each_holds_whole(tmp_path):
    """Where nothing is divided, and to decode answers: the second one's folder has no weights."""
    folders = save_teacher(tmp_path / "teacher"), without_weights(tmp_path / "teacher", tmp_path / "second")
    steps = {f"stage{number}": {"steps": 0} for number in (1, 2)} | {"stage3": {"steps": 2}}
    changes = dict(evaluation={"samples": 0, "speed_lengths": []}, **steps)

    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)
        for kind in ("ddp", "fsdp"):
            config = parse_config(run_values(tmp_path / kind, folders[rank], parallel=kind, **changes))
            run = Run(config, whole=True)
            assert not any(t.is_meta for _, t in named(run.teacher))
            assert fingerprint(run.teacher) == run.teacher_hash
        line = decode_ahead(config, processes=1)
        assert line.startswith("2 of 2 batches of stage 3 in 1 processes have their answers")

    assert in_processes(2, work) == [0, 0]
