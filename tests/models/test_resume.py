"""A conversation that goes on in another process: `linmu generate --save-state` and `--load-state`."""

from __future__ import annotations

import pytest
import torch

from linmu_models.chat import ChatProcessor
from linmu_models.generate import convert_folder, generate_text, load, to_model
from linmu_models.media import read_image
from linmu_models.resume import reopen_conversation

from . import tiny
from .folders import run, tokenizer

CHAT = (
    "{% for m in messages %}{{ '<t100>' + m['role'] + ':' }}{{ m['content'] }}{{ '<eos>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<t100>assistant:' }}{% endif %}"
)


def test_a_conversation_goes_on(folders, tmp_path):
    """As if all of it were read again, picture and answers; twice, and into the same file."""
    convert_folder(folders / "teacher", folders / "kept", tiny.NARROW)
    picture, state = folders / "picture.png", tmp_path / "talk"
    words = ("generate", folders / "kept", "--max-new-tokens", 4, "--prompt")
    said = run(*words, "what?", "--image", picture, "--save-state", state).stdout.strip("\n")
    asked = ["and then?", "why?"]
    answers = [run(*words, q, "--load-state", state, "--save-state", state).stdout.strip("\n") for q in asked]
    model, processor = load(folders / "kept", "cpu")
    inputs, turns = reopen_conversation(state, model, processor, "x")
    assert [turn[0] for turn in turns] == ["what?", *asked]
    assert [turn[1].strip("\n") for turn in turns] == [said, *answers]
    assert not any("pixel" in name for name in inputs)
    whole = to_model(processor.ask("what?", [read_image(picture)]), model)
    greedy = dict(max_new_tokens=4, do_sample=False)
    ids = model.generate(**whole, **greedy)
    for question, answer in zip(asked, answers, strict=True):
        ids = torch.cat((ids, torch.tensor([processor.tokenizer(question)["input_ids"]])), dim=1)
        start = ids.shape[1]
        ids = model.generate(**tiny.longer(whole, ids), **greedy)
        assert processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip("\n") == answer


def test_turns_are_written_as_the_template_writes_them():
    """Between two answers stands what ends the first, the question, and what begins the second."""
    speaker = tokenizer()
    speaker.chat_template = CHAT
    processor = ChatProcessor(speaker, "qwen2")
    turns = [("a?", "b."), ("c?", "d.")]
    said = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    whole = speaker.apply_chat_template(
        [*said, {"role": "user", "content": "e?"}], tokenize=False, add_generation_prompt=True
    )
    following = "<eos>\n<t100>user:e?<eos>\n<t100>assistant:"
    assert whole.endswith(f"d.{following}")
    assert processor.following(turns, "e?") == speaker(following, add_special_tokens=False)["input_ids"]
    speaker.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="chat template: it must write answers as they are, to go on after them"):
        processor.following(turns, "e?")


def test_what_a_conversation_must_be(folders, tmp_path):
    convert_folder(folders / "teacher", folders / "other")
    words = ("generate", folders / "other", "--prompt", "what?", "--max-new-tokens", 2)
    state = tmp_path / "talk"
    run(*words, "--save-state", state)
    wrong = run(*words, "--load-state", state, "--image", folders / "picture.png", status=1)
    said = "linmu: generate: images and videos must be left out with load_state, whose conversation has its own"
    assert wrong.stderr.splitlines()[-1] == said
    wrong = run("generate", folders / "teacher", "--prompt", "what?", "--save-state", state, status=1)
    assert "save_state must be left out for other models than LinMU's" in wrong.stderr
    wrong = run(*words, "--load-state", state, "--dtype", "bfloat16", status=1)
    assert "must be of the same model: its dtype must be torch.bfloat16, got torch.float32" in wrong.stderr
    state.write_bytes(state.read_bytes()[:-9])
    wrong = run(*words, "--load-state", state, status=1)
    assert "talk must be a whole file of a cache, got a damaged one" in wrong.stderr.splitlines()[-1]
    wrong = run(*words, "--load-state", tmp_path / "none", status=1)
    assert "none" in wrong.stderr.splitlines()[-1]
    model, processor = load(folders / "other", "cpu")
    with torch.no_grad():
        model(**tiny.batch(tiny.text_ids(5)), use_cache=True).past_key_values.save(state, model)
    with pytest.raises(ValueError, match="talk must hold a conversation, got a cache without its ids"):
        generate_text(model, processor, "what?", load_state=state)


@pytest.mark.parametrize("place", ["no/such/talk", "", "/proc/talk"])
def test_a_file_that_cannot_be_made_is_told_before_the_answer(folders, tmp_path, place):
    convert_folder(folders / "teacher", tmp_path / "student")
    model, processor = load(tmp_path / "student", "cpu")
    said, path = [], tmp_path / place
    with pytest.raises((OSError, ValueError)):
        generate_text(model, processor, "what?", stream=said.append, save_state=path, max_new_tokens=2, do_sample=False)
    assert not said and [made.name for made in tmp_path.iterdir()] == ["student"]


def test_a_later_question_stands_for_no_pixels():
    class Sees:
        image_token, video_token, tokenizer = "<image>", None, None

    processor = ChatProcessor(tokenizer(), "llava", Sees())
    for ask in (processor.ask, lambda words: processor.following([], words)):
        for words in ("and <image>?", "<im\ue000age>", "<\ufffcimage>"):
            with pytest.raises(ValueError, match="the words must not hold '<image>', which stands for pixels"):
                ask(words)
