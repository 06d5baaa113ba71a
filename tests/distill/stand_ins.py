"""A random teacher, a stand-in for the M-MATE block and a seeded data source, all tiny."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from linmu_distill.config import Config, parse_config
from linmu_distill.objective import Teacher, assemble, read_batch
from linmu_distill.student import add_lora, mixers, set_windows, trainable_parameters
from linmu_distill.teacher import AnswerCache, Transcripts
from linmu_distill.train import StageTrainer
from linmu_models.layout import LinmuInputs

PAD, BOS, EOS, IMAGE, VIDEO, START, END, FIRST = range(8)


class Tokenizer:
    """One token a character, `a` to `p`."""

    pad_token_id, bos_token_id, eos_token_id = PAD, BOS, EOS

    def encode(self, text):
        return [FIRST + ord(c) - ord("a") for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + i - FIRST) for i in ids if i >= FIRST)


@dataclass(frozen=True)
class Sample:
    seed: int
    turns: tuple[tuple[str, str], ...]


class Source:
    """Batches of two to four samples of unequal length; batch `step` is a function of `step`."""

    def samples(self, step):
        rng = torch.Generator().manual_seed(1000 + step)

        def text(low, high):
            n = int(torch.randint(low, high, (), generator=rng))
            return "".join(chr(97 + int(i)) for i in torch.randint(16, (n,), generator=rng))

        count = int(torch.randint(2, 5, (), generator=rng))
        return [Sample(step * 10 + i, tuple((text(1, 4), text(1, 5)) for _ in range(1 + i % 2))) for i in range(count)]

    def processor(self, samples):
        tokenizer, rows, labels, pixels = Tokenizer(), [], [], []
        for sample in samples:
            ids = [BOS, START, *[IMAGE] * 4, END]
            target = [-100] * len(ids)
            for question, answer in sample.turns:
                asked, said = tokenizer.encode(question), [*tokenizer.encode(answer), EOS]
                ids, target = ids + asked + said, target + [-100] * len(asked) + said
            rows.append(ids)
            labels.append(target)
            pixels.append(torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(sample.seed)))
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
            "mm_token_type_ids": (ids == IMAGE).long(),
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * len(rows)),
        }


def teacher_model(seed=0):
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]},
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4,
            spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[0],
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
        # A random teacher should end its answers, and not say image or padding tokens.
        embedding = model.get_input_embeddings().weight
        embedding[EOS] *= 3
        embedding[[i for i in range(FIRST) if i != EOS]] = 0
    return model


class Scan(nn.Module):
    """Causal linear attention."""

    def __init__(self, attention):
        super().__init__()
        width = attention.q_proj.in_features
        self.c_proj, self.b_proj, self.x_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, z, mask):
        c, b, x = functional.softplus(self.c_proj(z)), functional.softplus(self.b_proj(z)), self.x_proj(z)
        scores = torch.einsum("bin,bjn->bij", c, b).tril() * mask[:, None]
        return self.o_proj(scores @ x / scores.sum(-1, keepdim=True).clamp(min=1e-3))


class Windows(nn.Module):
    """Something of each token's own."""

    def __init__(self, attention):
        super().__init__()
        width = attention.q_proj.in_features
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z):
        return self.o_proj(torch.tanh(self.v_proj(z)))


class StandIn(nn.Module):
    """Has the parts, the names and the switch of an M-MATE block."""

    def __init__(self, attention):
        super().__init__()
        self.scan, self.windows = Scan(attention), Windows(attention)
        self.mix = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(attention.q_proj.in_features)
        self.windows_enabled = True
        self.config = SimpleNamespace(text_window=1)

    def forward(self, hidden_states, attention_mask=None, linmu=None, **kwargs):
        mask = hidden_states.new_ones(hidden_states.shape[:2]) if attention_mask is None else attention_mask[:, 0, -1]
        if linmu is not None:
            mask = linmu.padding
        out = self.scan(hidden_states, mask.to(hidden_states.dtype))
        if self.windows_enabled:
            share = self.mix.sigmoid()
            out = share * out + (1 - share) * self.windows(hidden_states)
        return self.norm(out), None


def student_model(teacher, inside=True, seed=1):
    """The teacher with stand-ins; `inside`: over the teacher's own weights."""
    own = [] if not inside else [*teacher.parameters(), *teacher.buffers()]
    student = copy.deepcopy(teacher, {id(tensor): tensor for tensor in own})
    torch.manual_seed(seed)
    for layer in student.get_decoder().layers:
        layer.self_attn = StandIn(layer.self_attn)
    student.build_layout = lambda inputs: None
    student.block_inputs = lambda inputs, length: LinmuInputs(padding=inputs["attention_mask"])
    return student


def part_of(trainer, samples):
    """A micro-batch of these samples with all that its losses need, as a step makes it."""
    what = trainer.teacher, trainer.student, trainer.stage
    device = trainer.accelerator.device
    return assemble(read_batch(trainer.source, samples, *what, trainer.transcripts, device), *what, device)


def config_of(tmp_path, **changes) -> Config:
    values = {
        "output": f"{tmp_path}/tiny",
        "preset": "paper",
        "teacher": "none",
        "max_new_tokens": 6,
        "checkpoint_every": 4,
        "stage1": {"steps": 10, "learning_rate": 1e-2},
        "stage2": {"steps": 10, "learning_rate": 1e-2},
        "stage3": {"steps": 10, "learning_rate": 1e-2},
    }
    return parse_config({**values, **changes})


def stage_trainer(config, number, accelerator=None, *, teacher=None, student=None, on_step=None, inside=True):
    """A trainer of one stage on the tiny models."""
    if accelerator is None:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    teacher = teacher or teacher_model()
    student = student or student_model(teacher, inside)
    blocks = mixers(student, teacher)
    stage = config.stage(number)
    set_windows(blocks.values(), stage.windows)
    if "lora" in stage.trainable:
        add_lora(student, config.lora_rank, config.seed)
    trainable = trainable_parameters(student, blocks, stage)
    source = Source()
    cache = AnswerCache(config.folder / "answers.sqlite", "tiny")
    transcripts = Transcripts(teacher, Tokenizer(), source, cache, config.max_new_tokens)
    return StageTrainer(
        config, stage, student, Teacher(teacher, list(blocks)), source, trainable,
        config.folder / f"stage{number}", accelerator, transcripts, on_step,
    )  # fmt: skip
