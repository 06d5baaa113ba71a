"""The shipped teacher, its student and what a run exports can be asked from the shell and through transformers."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_run import run_values, save_teacher
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from typer.testing import CliRunner

import linmu_models
from linmu_distill.config import parse_config
from linmu_distill.data import Processor, generate
from linmu_distill.evaluation import answer
from linmu_distill.run import distill
from linmu_models.chat import ChatProcessor
from linmu_models.cli import app

TEACHER = Path(__file__).parents[2] / "distill/teachers/tiny"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the shipped teacher and of its untrained student."""
    student = tmp_path_factory.mktemp("student")
    done = CliRunner().invoke(app, ["convert", str(TEACHER), str(student)])
    assert done.exit_code == 0, done.output
    return {"teacher": TEACHER, "student": student}


def asked(group, seed):
    (sample,) = generate(group, 1, seed, "val")
    return sample, sample.turns[0][0]


def message(picture, question):
    return [{"role": "user", "content": [{"type": "image", **picture}, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("group", ["read", "line", "where"])
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_what_is_asked_is_what_it_was_trained_on(models, name, group, tmp_path):
    """To the last bit, through `AutoProcessor` and through `linmu generate`'s own."""
    folder, (sample, question) = models[name], asked(group, 3)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trained = Processor.from_config(config, tokenizer)
    wanted = trained([sample], answers=False)
    picture = Image.fromarray(sample.frames[0])
    picture.save(tmp_path / "page.png")
    auto = AutoProcessor.from_pretrained(folder).apply_chat_template(
        message({"image": picture}, question), tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )  # fmt: skip
    ours = ChatProcessor.load(folder)
    asks = ours.ask(question, [linmu_models.media.read_image(tmp_path / "page.png")])
    for found in (auto, asks):
        assert set(wanted) - {"labels"} <= set(found) and set(found) <= set(wanted)
        for key, value in found.items():
            assert torch.equal(value, wanted[key]), key


def test_a_conversation_is_what_it_was_trained_on():
    """Turns, answers and their ends: a teacher of this kind can be trained on records as well."""
    (sample,) = generate("where", 1, 3, "train", 3)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    config = AutoConfig.from_pretrained(TEACHER)
    wanted = Processor.from_config(config, tokenizer)([sample])
    clip = linmu_models.media.Clip(sample.frames[..., None].repeat(3, -1))
    turns = ((f"{linmu_models.chat.SLOT}{sample.turns[0][0]}", sample.turns[0][1]), *sample.turns[1:])
    found = ChatProcessor.load(TEACHER)([linmu_models.chat.Conversation(turns, (clip,))])
    for key in ("input_ids", "labels", "pixel_values", "image_grid_thw"):
        assert torch.equal(found[key], wanted[key]), key


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_shell_answers_as_the_evaluation_does(models, name, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(models[name]).eval()
    processor = Processor.from_config(model.config, AutoTokenizer.from_pretrained(models[name]))
    said = []
    for group, seed in (("line", 1), ("read", 2), ("where", 4)):
        sample, question = asked(group, seed)
        path = tmp_path / f"{group}.png"
        Image.fromarray(sample.frames[0]).save(path)
        wanted = answer(model, processor, [sample], 64)[0]
        done = CliRunner().invoke(
            app, ["generate", str(models[name]), "--image", str(path), "--prompt", question, "--device", "cpu"]
        )
        assert done.exit_code == 0, done.output
        assert done.stdout.removesuffix("\n") == wanted
        said.append(wanted == sample.turns[0][1])
    assert sum(said) >= 2  # it knows its lesson
    pipe = pipeline("image-text-to-text", model=str(models[name]), device="cpu")
    told = pipe(text=message({"url": str(path)}, question), max_new_tokens=64, return_full_text=False)
    assert told[0]["generated_text"] == wanted


def test_a_report_ends_with_a_command_and_its_answer(tmp_path):
    config = parse_config(run_values(tmp_path, save_teacher(tmp_path / "teacher")))
    lines = distill(config).read_text().rstrip().splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("$ linmu generate "))
    assert lines[start - 1] == "```sh" and lines[-1] == "```"
    command = shlex.split(lines[start].removeprefix("$ linmu "))
    assert command[1] == f"{config.folder}/student" and re.fullmatch(r"where is .|how many .", command[-1])
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert done.stdout == "\n".join(lines[start + 1 : -1]) + "\n"


def test_a_report_says_that_the_files_are_lacking(tmp_path):
    teacher = tmp_path / "teacher"
    save_teacher(teacher)
    (teacher / "preprocessor_config.json").unlink()
    steps = {f"stage{i}": {"steps": 0} for i in (1, 2, 3)}
    text = distill(parse_config(run_values(tmp_path, str(teacher), **steps))).read_text()
    assert "From the shell it cannot be asked about pictures, as its teacher came without the files: " in text
