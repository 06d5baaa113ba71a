"""Published formats, made up in miniature: what they become, and what is left out and why."""

import re

import media
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
from typer.testing import CliRunner

from linmu_distill.data.records import (
    ActivityNetRecords,
    DataError,
    JsonRecords,
    Medium,
    ParquetRecords,
    TextRecords,
    UnusableError,
    conversation,
)
from linmu_models.chat import SLOT, ChatProcessor, Conversation, end_tokens, grid_patches
from linmu_models.cli import app
from linmu_models.media import UnreadableError, fit, image_size, read_image, read_video, video_facts


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return ChatProcessor.load(media.qwen_folder(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return ChatProcessor.load(media.llava_folder(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return media.write_video(tmp_path_factory.mktemp("video") / "v_abc.mkv")


def every(records):
    return [records.parse(row) for shard in range(records.shards) for row in records.rows(shard)]


def test_onevision_parquet(tmp_path):
    images = {"a": media.png(1), "b": None, "c": media.png(2), "d": media.png(3)}
    records = ParquetRecords([media.onevision(tmp_path / "x.parquet", images, group=2)], None)
    assert (records.shards, records.rows_per_shard) == (2, 2)
    found = every(records)
    assert found[0].turns == ((f"{SLOT}\nwhat is a?", "it is a"),) and found[0].media == (Medium(images["a"], False),)
    assert found[1].turns == (("say b", "it is b"),) and not found[1].media
    assert every(records) == found and [r.media[0].source for r in found[2:]] == [images["c"], images["d"]]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        ParquetRecords([str(tmp_path / "*.nothing")], None)


def test_llava_video_json(tmp_path):
    """Its videos stand where `<image>` is written; ids are numbers in one file and text in another."""
    one = [{"id": 7, "conversations": media.talk("<image>\nwhat?", "this"), "video": "a/b.mp4", "data_source": "x"}]
    many = [{"id": "p", "image": ["1.png", "2.png"], "conversations": media.talk("<image> or <image>?", "both")}]
    files = [media.write_json(tmp_path / f"{i}.json", value) for i, value in enumerate((one, many))]
    first, second = every(JsonRecords(files, str(tmp_path / "files")))
    assert first.media == (Medium(tmp_path / "files/a/b.mp4", True),)
    assert first.turns == ((f"{SLOT}\nwhat?", "this"),)
    assert [m.source.name for m in second.media] == ["1.png", "2.png"]
    assert second.turns == ((f"{SLOT} or {SLOT}?", "both"),)


def test_activitynet_qa(tmp_path, video):
    questions = [
        {"video_name": "abc", "question": "is it dark", "question_id": "v_abc_0"},
        {"video_name": "gone", "question": "who is it", "question_id": "v_gone_0"},
        {"video_name": "abc", "question": "what for", "question_id": "v_abc_1"},
    ]
    answers = [{"answer": "yes", "type": 3, "question_id": "v_abc_0"}, {"answer": "", "question_id": "v_abc_1"}]
    files = [media.write_json(tmp_path / f"train_{k}.json", v) for k, v in (("q", questions), ("a", answers))]
    records = ActivityNetRecords(files, str(video.parent), "Answer briefly.")
    (row,) = records.rows(0)
    record = records.parse(row)
    assert record.turns == ((f"{SLOT}\nis it dark\nAnswer briefly.", "yes"),)
    assert record.media == (Medium(video, True),)
    for shard in (1, 2):
        with pytest.raises(UnusableError, match="empty answer"):
            records.parse(next(records.rows(shard)))


def test_text_is_cut_between_paragraphs(tmp_path, qwen):
    paragraphs = [("word " * n).strip() + "." for n in (3, 9, 2, 60, 5, 1)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    pieces = [r.turns[0][1] for r in every(TextRecords([str(tmp_path / "*.txt")], qwen.tokenizer, 80))]
    assert " ".join("".join(pieces).split()) == " ".join(" ".join(paragraphs).split())
    assert all(len(qwen.tokenizer.encode(piece)) <= 80 for piece in pieces)
    assert pieces[0].startswith(paragraphs[0]) and paragraphs[1] in pieces[0]


IMAGE = Medium(b"", False)


@pytest.mark.parametrize(
    "messages, given, reason",
    [
        (None, [], "record without a conversation"),
        (media.talk("why?", "  "), [], "empty answer"),
        (media.talk("why?", "so")[:1], [], "empty answer"),
        (media.talk("why?", "so")[1:], [], "speakers do not take turns"),
        ([{"from": "nobody", "value": "x"}], [], "unknown speaker"),
        (media.talk("<image> <image>", "so"), [IMAGE], "placeholders and media differ in number"),
        (media.talk("", "so"), [], "empty question"),
    ],
)
def test_what_is_no_conversation(messages, given, reason):
    with pytest.raises(UnusableError, match=reason):
        conversation(messages, given)


def test_media_come_first_where_the_text_names_none():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"},
                {"role": "assistant", "content": " so "}]  # fmt: skip
    record = conversation(messages, [IMAGE])
    assert record.turns == ((f"{SLOT}why?", "so"),) and record.system == "be brief"


def test_stray_slots_are_no_media():
    """Text that was copied from elsewhere has them."""
    messages = [{"role": "system", "content": f"be{SLOT} brief"}, *media.talk(f"why{SLOT}?", f"so{SLOT}")]
    record = conversation(messages, [])
    assert (record.turns, record.system) == ((("why?", "so"),), "be brief")
    with pytest.raises(UnusableError, match="empty answer"):
        conversation(media.talk("why?", SLOT), [])


def test_images_are_upright_small_enough_and_rgb(tmp_path):
    from PIL import Image as Pillow

    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, :40] = 255
    exif = Pillow.Exif()
    exif[0x0112] = 6
    Pillow.fromarray(pixels).save(tmp_path / "side.png", exif=exif)
    assert image_size(tmp_path / "side.png") == (80, 40)
    clip = read_image(tmp_path / "side.png", max_pixels=1800)
    assert clip.frames.shape == (1, *fit(80, 40, 1800), 3) == (1, 60, 30, 3)
    assert clip.frames[0, :25].mean() > 250 > 5 > clip.frames[0, 35:].mean()
    grey = Pillow.fromarray(np.full((30, 30, 2), (0, 0), dtype=np.uint8), "LA")
    grey.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").frames.min() == 255
    assert fit(10, 20, None) == (28, 56)


@pytest.mark.parametrize("content, reason", [(None, "missing"), (b"", "corrupt"), (b"nonsense", "corrupt")])
def test_unreadable_files(tmp_path, content, reason):
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    for kind, read in (("image", read_image), ("image", image_size), ("video", video_facts)):
        with pytest.raises(UnreadableError, match=f"^{kind} {reason}$"):
            read(path)


def test_cut_short(tmp_path, video):
    whole = media.png(0)
    assert image_size(whole[:200]) == (40, 60)
    with pytest.raises(UnreadableError, match=r"^image corrupt$"):
        read_image(whole[: len(whole) // 2])
    (tmp_path / "half.mkv").write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    assert video_facts(tmp_path / "half.mkv").seconds == 4.0
    with pytest.raises(UnreadableError, match=r"^video truncated$"):
        read_video(tmp_path / "half.mkv", 8, 2.0)
    with pytest.raises(UnreadableError, match=r"^too elongated$"):
        fit(10, 2000, None)


def test_frames_are_evenly_spaced(video):
    facts = video_facts(video)
    assert (facts.seconds, facts.height, facts.width, facts.frame_rate) == (4.0, 48, 64, 10.0)
    clip = read_video(video, 64, 2.0)
    assert clip.fps == 2.0 and clip.frames.shape == (8, 48, 64, 3)
    # Frame i is of grey 5 i, and there are ten in a second; the codec is a little off.
    wanted = 5 * np.floor((np.arange(8) + 0.5) * 0.5 * 10)
    assert np.abs(clip.frames.mean((1, 2, 3)) - wanted).max() < 6
    few = read_video(video, 3, 2.0, max_pixels=1200)
    assert few.frames.shape == (3, 30, 40, 3) and few.fps == 0.75
    assert len(read_video(video, 999, 999.0).frames) == 40


def test_labels_are_the_answers_and_each_ends(qwen, llava, video):
    turns = ((f"{SLOT}\nwhat?", "a b"), ("and?", "c"))
    for processor in (qwen, llava):
        for clip in (read_image(media.png(1)), read_video(video, 4, 1.0)):
            batch = processor([Conversation(turns, (clip,)), Conversation((("q", "longer"),))])
            assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
            labels = batch["labels"]
            said = [processor.tokenizer.decode(row[row >= 0]) for row in labels]
            assert said == ["a b<|end|>c<|end|>", "longer<|end|>"]
            assert bool((labels[labels >= 0] == batch["input_ids"][labels >= 0]).all())
            text = processor.tokenizer.decode(batch["input_ids"][1][batch["attention_mask"][1].bool()])
            assert text == "<|start|>user\nq<|end|>\n<|start|>assistant\nlonger<|end|>\n"


def test_plain_text_is_all_supervised(qwen):
    batch = qwen([Conversation((("", "some text"),)), Conversation((("", "so"),))])
    assert qwen.tokenizer.decode(batch["input_ids"][0]) == "some text"
    assert torch.equal(batch["labels"][0], batch["input_ids"][0])
    assert batch["labels"][1].tolist()[2:] == [-100] * 7


def test_an_answer_gets_an_end_where_the_template_has_none(qwen):
    import copy

    tokenizer = copy.copy(qwen.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    batch = ChatProcessor(tokenizer, "llama")([Conversation((("q", "a"), ("r", "b")))])
    assert tokenizer.decode(batch["input_ids"][0]) == "q a<|end|> r b<|end|> "
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatProcessor(tokenizer, "llama")([Conversation((("q", "a"),))])


def test_lengths_are_known_before_decoding(qwen, llava, video):
    from linmu_distill.data.records import Record
    from linmu_distill.data.stream import Decoding

    turns = ((f"{SLOT}\nwhat?", "a b"), ("and?", "c"))
    for processor in (qwen, llava):
        decoding = Decoding(frames=5, fps=1.0, image_pixels=2000, frame_pixels=1500)
        for medium in (Medium(media.png(1), False), Medium(video, True)):
            record = Record(turns, (medium,))
            batch = processor([decoding(record)])
            assert decoding.tokens(record, processor) == batch["input_ids"].shape[1]


def test_video_patches_are_those_of_its_frames(qwen, video):
    clip = read_video(video, 3, 1.0)
    patches, grid = grid_patches(qwen.image_processor, clip)
    assert grid.tolist()[0] == 2
    alone = qwen.image_processor(images=list(clip.frames), return_tensors="pt")["pixel_values"]
    alone = alone.reshape(3, -1, 3, 2, 7, 7)
    patches = patches.reshape(2, -1, 3, 2, 7, 7)
    for i, frame in enumerate((0, 1, 2, 2)):
        assert torch.equal(patches[i // 2, :, :, i % 2], alone[frame, :, :, 0])


def test_videos_are_images_to_a_model_without_them(llava, video):
    batch = llava([Conversation(((f"{SLOT}what?", "a"),), (read_video(video, 3, 1.0),))])
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert int((batch["input_ids"] == llava.tokenizer.convert_tokens_to_ids("<image>")).sum()) == 3 * 4


@pytest.mark.parametrize("content", ["[null, 3]", "[3]", "[]", "", '[{"conversations": [', "{'a': 1}"])
def test_files_that_are_no_records_are_named(tmp_path, content):
    """One of these takes the process with it where it reaches `datasets`."""
    (tmp_path / "a.json").write_text(content)
    for records in (JsonRecords, ActivityNetRecords):
        with pytest.raises(DataError, match=r"a\.json: "):
            records([str(tmp_path / "a.json")], None)
    (tmp_path / "a.parquet").write_text(content)
    with pytest.raises(DataError, match=r"a\.parquet: "):
        ParquetRecords([str(tmp_path / "a.parquet")], None)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"a\.txt: .*utf-8"):
        TextRecords([str(tmp_path / "a.txt")], None, 9)


def test_a_medium_that_is_none_is_counted(tmp_path):
    media.write_json(tmp_path / "a.json", [{"conversations": media.talk("why?", "so"), "image": 3}])
    records = JsonRecords([str(tmp_path / "a.json")], None)
    with pytest.raises(UnusableError, match="image missing"):
        every(records)


def test_an_answer_ends_as_the_chat_does():
    """Where the template ends a turn with a token that ends a generation, and the tokenizer's own end is another."""
    tokens = media.tokenizer("")
    tokens.eos_token = "<|vision_end|>"
    end, turn = (tokens.convert_tokens_to_ids(t) for t in ("<|vision_end|>", "<|end|>"))
    talk = [Conversation((("why?", "so"),))]
    for ends, last in ((frozenset(), end), (frozenset([turn]), turn)):
        batch = ChatProcessor(tokens, "llama", ends=ends)(talk)
        said = batch["labels"][batch["labels"] != -100].tolist()
        assert said == [*tokens.encode("so", add_special_tokens=False), last]
        assert batch["input_ids"][0].tolist().count(end) == (last == end)
    assert end_tokens(GenerationConfig(eos_token_id=[turn, 7]), tokens) == {end, turn, 7}
    assert end_tokens(GenerationConfig(), tokens) == {end}


def test_words_that_are_no_words(qwen):
    ids = [qwen.ask(question)["input_ids"].tolist() for question in ("why?", f"w{SLOT}h\ue000y?")]
    assert ids[0] == ids[1]
    with pytest.raises(ValueError, match=r"must not hold '<\|image_pad\|>', which stands for pixels"):
        qwen.ask("why <|image_pad|>?")


@pytest.mark.parametrize("make", ["qwen", "llava"])
def test_linmu_generate_answers_about_a_video_file(make, tmp_path, video):
    """From the command line; the frames of a model without videos are images."""
    folder = {"qwen": media.qwen_folder, "llava": media.llava_folder}[make](tmp_path / "teacher")
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    runner, student = CliRunner(), str(tmp_path / "student")
    assert runner.invoke(app, ["convert", str(folder), student]).exit_code == 0
    ask = ["generate", student, "--prompt", "what moves?", "--max-new-tokens", "4"]
    runs = [runner.invoke(app, [*ask, "--video", str(video), *more]) for more in ([], [], ["--frames", "1"])]
    assert [run.exit_code for run in runs] == [0, 0, 0], runs[0].output
    assert runs[0].stdout == runs[1].stdout
    whole, _, one = (int(re.search(r"(\d+) tokens in, \d+ out", run.stderr)[1]) for run in runs)
    assert whole > one > len("what moves?")
    missing = runner.invoke(app, [*ask, "--video", str(tmp_path / "none.mkv")])
    assert missing.exit_code == 1 and "none.mkv" in missing.stderr
