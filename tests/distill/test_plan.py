"""`linmu plan` says what training takes: held to the bytes that live while a stage trains."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode
from training import in_processes
from transformers import LlamaConfig, Qwen2_5_VLConfig
from typer.testing import CliRunner

import linmu_ops
from linmu_distill import cli, plan, plan_tower
from linmu_distill.config import parse_config
from linmu_distill.live import LiveBytes
from linmu_distill.objective import Teacher
from linmu_distill.student import new_student, set_windows, store_parameters, trainable_parameters
from linmu_distill.teacher import shared_vision_features
from linmu_distill.train import StageTrainer
from linmu_models.config import auto_class

PIECE = {"format": "text", "files": ["none"]}


@dataclass(frozen=True)
class Piece:
    turns: tuple = (("", "text"),)


class Text:
    """Pieces of text of one length."""

    def __init__(self, length):
        self.length = length

    def samples(self, step):
        return [Piece()]

    def processor(self, samples):
        ids = torch.arange(self.length)[None] % 200
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Video(Text):
    """Rows that are a video for the most part, as a plan takes them to be."""

    def __init__(self, config, number, teacher_config):
        self.work, self.video = plan._work(config, number, teacher_config), teacher_config.video_token_id
        super().__init__(self.work.length)

    def processor(self, samples):
        batch, where = super().processor(samples), torch.tensor(self.work.layout.positions).long()
        batch["labels"] = torch.full_like(batch["labels"], -100)
        batch["labels"][:, 1 : 1 + self.work.answers] = 7
        batch["input_ids"][:, where] = self.video
        kinds = torch.zeros_like(batch["labels"])
        kinds[:, where] = 2
        pixels = torch.rand(self.work.vision["pixel_values_videos"].shape)
        return {**batch, "mm_token_type_ids": kinds, **self.work.vision, "pixel_values_videos": pixels}


def qwen(layers, width, tower):
    """tower: the width of the vision tower."""
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        ),
        vision_config=dict(
            depth=3, hidden_size=tower, intermediate_size=2 * tower, num_heads=2, out_hidden_size=width, patch_size=8,
            spatial_merge_size=2, temporal_patch_size=1, window_size=64, fullatt_block_indexes=[1],
        ),
        image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253,
    )  # fmt: skip


def llama(layers, width):
    return LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, head_dim=32, pad_token_id=0,
    )  # fmt: skip


def config_of(folder, length, **changes):
    values = {
        "output": f"{folder}/r", "teacher": "none", "student": {"text_window": 64}, "checkpoint_every": 100,
        "data": {"sets": {"pieces": PIECE}, "max_tokens": length}, "stage2": {"steps": 0}, **changes,
    }  # fmt: skip
    return parse_config(values)


def measured(config, number, teacher_config, source):
    """The most bytes that live at one time in two steps of a stage."""
    torch.manual_seed(0)
    dtype = getattr(torch, config.precision)
    teacher = auto_class(teacher_config).from_config(teacher_config).to(dtype).eval().requires_grad_(False)
    stage = config.stage(number)
    lora = (lambda model: plan.add_lora(model, config.lora_rank, 0)) if config.has_lora(number) else None
    student, blocks, _ = new_student(teacher, config, lora)
    trainable = trainable_parameters(student, blocks, stage)
    store_parameters(blocks.values(), trainable, dtype)
    set_windows(blocks.values(), stage.windows)
    if config.gradient_checkpointing and stage.block_input == "student":
        student.gradient_checkpointing_enable({"use_reentrant": False})
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    trainer = StageTrainer(
        config, stage, student, Teacher(teacher, list(blocks)), source, trainable, config.folder, accelerator
    )
    known = [tensor for model in (teacher, student) for tensor in (*model.parameters(), *model.buffers())]
    # A plan is of GPUs, which have no kernel of `near_attention`: the calls in its place hold more.
    one_tower = shared_vision_features(teacher, student)
    with LiveBytes(known) as live, linmu_ops.use_impl("near_attention:reference"), one_tower:
        trainer.run()
    return live.peak


ANSWERS = {"losses": {"token": 0.5, "supervised": 0.5}}


@pytest.mark.filterwarnings("ignore::linmu_ops.LinmuWarning")
@pytest.mark.parametrize(
    "layers, width, length, number, more",
    [
        (3, 128, 512, 3, {"gradient_checkpointing": True}),
        pytest.param(5, 192, 768, 1, {}, marks=pytest.mark.sweep),
        (3, 128, 512, 1, {}),
        pytest.param(3, 128, 512, 3, {}, marks=pytest.mark.sweep),
        pytest.param(5, 192, 768, 3, {"gradient_checkpointing": True}, marks=pytest.mark.sweep),
    ],
)
def test_a_plan_is_what_training_takes(tmp_path, layers, width, length, number, more):
    """Blocks that learn one by one; the whole student; the same, each layer made again. Two micro-batches a step."""
    steps = {"stage1": {"steps": 2 * (number == 1)}, "stage3": {"steps": 2 * (number == 3), **ANSWERS}}
    config = config_of(tmp_path, length, gradient_accumulation=2, **steps, **more)
    teacher = llama(layers, width)
    (row,) = plan.plan(config, 1, teacher)
    found = measured(config, number, teacher, Text(length))
    assert row.total == pytest.approx(found, rel=0.1), f"planned {row}, found {found}"


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::linmu_ops.LinmuWarning")
@pytest.mark.parametrize("number, more", [(1, {}), (3, {"gradient_checkpointing": True})])
def test_a_plan_of_shared_rows_is_what_training_takes(tmp_path, number, more):
    """Two processes share each row."""
    steps = {"stage1": {"steps": 2 * (number == 1)}, "stage3": {"steps": 2 * (number == 3), **ANSWERS}}
    config = config_of(tmp_path, 1024, parallel=["ddp", 2], gradient_accumulation=2, **steps, **more)
    teacher = llama(3, 128)
    (row,) = plan.plan(config, 2, teacher)

    def work(rank):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / str(rank)).write_text(str(measured(config, number, teacher, Text(1024))))

    assert in_processes(2, work) == [0, 0]
    found = max(int((tmp_path / str(rank)).read_text()) for rank in range(2))
    buckets = 2 * plan._BUCKETS if number == 3 else 0  # DDP's, which so few gradients do not fill
    assert row.total - buckets == pytest.approx(found, rel=0.1), f"planned {row}, found {found}"


@pytest.mark.filterwarnings("ignore::linmu_ops.LinmuWarning")
@pytest.mark.parametrize(
    "processes, number, more, tower",
    [
        (2, 1, {}, 512),  # what the tower holds while it runs is the most
        pytest.param(2, 3, {"gradient_checkpointing": True}, 512, marks=pytest.mark.sweep),
        pytest.param(1, 3, {"gradient_checkpointing": True}, 512, marks=pytest.mark.sweep),
    ],
)
def test_a_plan_of_videos_is_what_training_takes(tmp_path, processes, number, more, tower):
    """Processes that share rows each run the vision tower on all of their pixels."""
    steps = {"stage1": {"steps": 2 * (number == 1)}, "stage3": {"steps": 2 * (number == 3), **ANSWERS}}
    data = {"sets": {"videos": {"format": "onevision", "files": ["none"]}}, "max_tokens": 768, "frame_pixels": 2**14}
    config = config_of(tmp_path, 0, parallel=["ddp", processes], data=data, **steps, **more)
    teacher = qwen(3, 128, tower)
    (row,) = plan.plan(config, processes, teacher)

    def work(rank):
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        found = measured(config, number, teacher, Video(config, number, teacher))
        (tmp_path / str(rank)).write_text(str(found))

    assert in_processes(processes, work) == [0] * processes
    found = max(int((tmp_path / str(rank)).read_text()) for rank in range(processes))
    buckets = 2 * plan._BUCKETS if number == 3 and processes > 1 else 0  # DDP's, which so few gradients do not fill
    assert row.total - buckets == pytest.approx(found, rel=0.1), f"planned {row}, found {found}"


@pytest.mark.parametrize("depth, far", [(4, [1, 3]), (1, []), (1, [0]), (3, [0, 1, 2, 7])])
def test_the_towers_products_are_counted(depth, far):
    """All layers', attention's too, of which only two run, on frames that windows do not divide."""
    config = qwen(2, 64, 32)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = depth, far
    config.vision_config._attn_implementation = "eager"
    work = plan.Work(1, 100, 1, None, plan_tower.video(3, 5, 6, config))
    model = auto_class(config).from_config(config).model
    pixels = torch.rand(work.vision["pixel_values_videos"].shape)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.get_video_features(pixels, work.vision["video_grid_thw"])
    once = plan._tower_flops(SimpleNamespace(losses={"token": 1.0}, block_input="student"), config, work)
    assert once == counted.get_total_flops() > 0


def test_hours_have_the_tower_in_them(tmp_path):
    """Each process that shares rows encodes all of their pixels; a batch with the teacher's answers behind it is
    encoded for the student alone, twice as long."""
    data = {"sets": {"videos": {"format": "onevision", "files": ["none"]}}, "max_tokens": 768, "frame_pixels": 2**14}
    steps = {"stage1": {"steps": 2}, "stage3": {"steps": 2}}
    config, small, wide = config_of(tmp_path, 0, data=data, **steps), qwen(2, 64, 32), qwen(2, 64, 320)
    one, three = ([row.step_flops for row in plan.plan(config, 1, teacher)] for teacher in (small, wide))
    for stage, times, less, more in zip((1, 3), (1, 3), one, three, strict=True):
        tower = [plan._tower_flops(config.stage(1), t, plan._work(config, stage, t)) for t in (small, wide)]
        assert more - less == pytest.approx(times * (tower[1] - tower[0]), rel=1e-6)
    shared = config_of(tmp_path, 0, data=data, parallel=["ddp", 2], **{**steps, "stage3": {"steps": 0}})
    less, more = (plan.plan(shared, 2, teacher)[0].step_flops for teacher in (small, wide))
    assert more - less == pytest.approx(2 * (three[0] - one[0]), rel=1e-6)


def test_a_plan_of_many(tmp_path):
    """Sharding divides what it should, and twice the tokens take the same weights."""
    rows = []
    spread = ((256, 1, "ddp"), (256, 8, "ddp"), (256, 8, "fsdp"), (512, 1, "ddp"), (512, 8, ["ddp", 2]))
    for length, gpus, parallel in spread:
        changes = {"stage1": {"steps": 2}, "stage3": {"steps": 0}}
        rows += plan.plan(config_of(tmp_path, length, parallel=parallel, **changes), gpus, llama(2, 64))
    one, ddp, fsdp, twice, shared = rows
    assert (ddp.weights, ddp.gradients, ddp.activations) == (one.weights, one.gradients, one.activations)
    assert (fsdp.gradients, fsdp.optimiser) == (one.gradients // 8, one.optimiser // 8)
    assert fsdp.weights < one.weights and fsdp.buffers > 0
    assert ddp.step_tokens == 8 * one.step_tokens
    # Two processes share each row of twice the tokens, the teacher's work too.
    assert one.activations < shared.activations < twice.activations
    assert shared.step_flops == pytest.approx(4 * twice.step_flops, rel=0.02)
    assert shared.weights == one.weights and shared.buffers > ddp.buffers
    assert shared.step_tokens == 4 * twice.step_tokens
    with pytest.raises(plan.PlanError, match=r"^gpus must be a multiple of the 2 that share a row, got 3$"):
        plan.plan(config_of(tmp_path, 64, parallel=["ddp", 2], **changes), 3, llama(2, 64))
    assert twice.weights == one.weights and 1.5 < twice.step_flops / one.step_flops < 4
    assert one.hours(1, 1, 0.5) == 2 * one.step_flops / 0.5e12 / 3600


def test_a_plan_of_a_teacher_that_cannot_be_shared(tmp_path):
    """Each of the two processes runs all of it."""
    changes = {"stage1": {"steps": 2}, "stage3": {"steps": 0}}
    config, rows = config_of(tmp_path, 512, parallel=["ddp", 2], **changes), []
    for kind in ("sdpa", "eager"):
        teacher = llama(2, 64)
        teacher._attn_implementation = kind
        rows += plan.plan(config, 2, teacher)
    shared, whole = rows
    student = plan.plan(config_of(tmp_path, 256, **changes), 1, llama(2, 64))[0]
    assert 1.2 * shared.step_flops < whole.step_flops < 2 * shared.step_flops
    assert whole.activations > shared.activations > student.activations


def test_the_command(tmp_path):
    llama(2, 128).save_pretrained(tmp_path / "teacher")
    path = tmp_path / "c.toml"
    path.write_text(
        f'output = "{tmp_path}/r"\nteacher = "{tmp_path}/teacher"\n[data]\nmax_tokens = 256\n[data.sets.a]\n'
        'format = "text"\nfiles = ["none"]\n[stage1]\nsteps = 2\n[stage2]\nsteps = 0\n[stage3]\nsteps = 2\n'
        "losses = {token = 1.0}\n"
    )
    app = cli.typer.Typer()
    app.command()(cli.plan)
    done = CliRunner().invoke(app, [str(path), "--memory", "1"])
    assert done.exit_code == 0 and "hours in all" in done.output and "does not fit" not in done.output, done.output
    done = CliRunner().invoke(app, [str(path), "--memory", "0.001"])
    assert done.exit_code == 1 and "stage 1 does not fit: it needs" in done.output
    path.write_text(path.read_text().replace(f"{tmp_path}/teacher", f"{tmp_path}/none"))
    done = CliRunner().invoke(app, [str(path)])
    assert done.exit_code == 1 and "has no configuration" in done.output
