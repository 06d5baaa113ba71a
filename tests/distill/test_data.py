"""The task groups: splits, determinism, honesty of the answers, and the tensors made of them."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from linmu_distill.data import CLASSES, GROUPS, SPLITS, TASKS, Processor, TaskStream, build_tokenizer, generate
from linmu_distill.evaluation import wilson_interval
from tools import lessons
from tools.make_teacher import build_model

SMALL = {"needle": {"frames": (3, 5)}, "needles": {"frames": (3, 5)}, "tracking": {"frames": (3, 5)}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(build_tokenizer()).eval()


@pytest.fixture(scope="module")
def processor(model):
    return Processor.from_config(model.config, build_tokenizer())


@pytest.mark.parametrize("group", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_generation_is_a_function_of_its_arguments(group, split):
    options = SMALL.get(group, {})
    first, again = (generate(group, 4, (7, 3), split, turns=3, **options) for _ in range(2))
    other = generate(group, 4, (7, 4), split, turns=3, **options)
    assert [s.turns for s in first] == [s.turns for s in again]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first, again, strict=True))
    assert not all(
        a.frames.shape == b.frames.shape and np.array_equal(a.frames, b.frames)
        for a, b in zip(first, other, strict=True)
    )


def _page(sample):
    return ["".join(CLASSES[c] for c in row) for row in sample.cells[0]]


def test_answers_follow_from_what_is_drawn():
    for sample in generate("read", 50, 0):
        assert sample.turns == (("read", "\n".join(f"{k + 1} {text}" for k, text in enumerate(_page(sample)))),)
    for sample in generate("line", 50, 0, turns=4):
        assert len(sample.turns) == len(_page(sample))
        for question, answer in sample.turns:
            assert answer == _page(sample)[int(question[5]) - 1]
    for sample in generate("where", 100, 0, turns=4):
        for question, answer in sample.turns:
            symbol = question[-1]
            if question.startswith("how many"):
                assert answer == symbol + str("".join(_page(sample)).count(symbol))
            else:
                row, column = map(int, answer[1:])
                assert _page(sample)[row - 1][column - 1] == symbol
                assert "".join(_page(sample)).count(symbol) == 1
    for sample in generate("video", 50, 0, turns=9):
        for question, answer in sample.turns:
            if question.startswith("track"):
                where = [np.argwhere(frame == CLASSES.index(question[6])) + 1 for frame in sample.cells]
                assert answer == f"{question[6]} " + " ".join(f"{place[0][0]}{place[0][1]}" for place in where)
            else:
                digit, start, end, _, steps = answer.split()
                (first, *_), (last, *_) = (np.argwhere(sample.cells[t] == CLASSES.index(digit)) for t in (0, -1))
                assert (start, end) == (f"{first[0] + 1}{first[1] + 1}", f"{last[0] + 1}{last[1] + 1}")
                assert abs(last - first).sum() == int(steps) > 0
    for sample in generate("needle", 20, 0, turns=2, frames=(4, 9)):
        for _, answer in sample.turns:
            frames = [frame for frame in sample.cells if set(answer) <= {CLASSES[c] for c in frame.flat}]
            assert len(frames) == 1 and answer in "\n".join("".join(CLASSES[c] for c in row) for row in frames[0])


@pytest.mark.parametrize("group", GROUPS)
def test_pointers_point_at_what_answers_are_read_off(group):
    for sample in generate(group, 30, 0, turns=4, **SMALL.get(group, {})):
        facts = lessons.cell_facts(sample)
        assert facts.shape == (sample.cells.size, len(lessons.FACTS))
        assert (facts < list(lessons.FACTS.values())).all()
        frame, row, column = (axis.flatten() for axis in np.indices(sample.cells.shape))
        shown = sample.cells.flatten()
        text = "".join(answer + "$" for _, answer in sample.turns)
        for pointer in lessons.answer_pointers(sample):
            said, cells = text[pointer.token], list(pointer.cells)
            assert 0 <= pointer.share * len(cells) <= 1
            if "how many" in sample.turns[text[: pointer.token].count("$")][0]:
                assert len(cells) == int(said)
            elif said != CLASSES[shown[cells[0]]]:
                assert int(said) - 1 in (row[cells[0]], column[cells[0]])
            if "frame" in pointer.facts and "track" in sample.turns[text[: pointer.token].count("$")][0]:
                turn = text[: pointer.token].rpartition("$")[2]
                assert frame[cells[0]] == turn.count(" ") - 1
        for cell, back in lessons.cell_pointers(sample):
            assert (max(back) <= cell and {int(shown[b]) for b in back} == {int(shown[cell])}) or group == "needle"
            assert group == "video" or facts[cell, list(lessons.FACTS).index("letter")] == len(back) - 1


def test_needle_is_long():
    (sample,) = generate("needle", 1, 0, "val")
    assert len(sample.frames) >= 64 and sample.cells.size >= 2000


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="group"):
        generate("rea", 1, 0)
    with pytest.raises(ValueError, match="split"):
        generate("read", 1, 0, "valid")
    with pytest.raises(ValueError, match="turns"):
        generate("read", 1, 0, turns=0)


def test_patches_are_in_the_order_of_the_image_processor(processor):
    frames = np.random.default_rng(0).integers(0, 255, size=(1, 32, 48, 3), dtype=np.uint8)
    patches, grid = processor.patchify(frames)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    reference = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=1,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 16, "longest_edge": 10**6},
    )(images=[frames[0]], return_tensors="pt")
    assert reference["image_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(reference["pixel_values"], patches, atol=1e-5, rtol=0)


def test_frames_are_paired_when_the_model_asks_for_it(processor):
    from dataclasses import replace

    patches, grid = replace(processor, temporal_patch_size=2).patchify(np.zeros((3, 32, 32), dtype=np.uint8))
    assert grid == (2, 4, 4) and patches.shape == (32, 3 * 2 * 64)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_gives_the_answers_losses_of_single_samples(model, processor, side):
    samples = [s for g in TASKS for s in generate(g, 2, 0, turns=2, **SMALL.get(g, {}))]
    batch = processor(samples, padding_side=side)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["mm_token_type_ids"].shape
    with torch.no_grad():
        logits = model(**batch).logits
        for i, sample in enumerate(samples):
            single = processor([sample])
            keep = batch["attention_mask"][i].bool()
            assert torch.equal(batch["input_ids"][i, keep], single["input_ids"][0])
            assert torch.equal(batch["labels"][i, keep], single["labels"][0])
            torch.testing.assert_close(logits[i, keep], model(**single).logits[0], atol=2e-4, rtol=1e-3)


def test_labels_hold_the_answers_and_the_prompt_ends_before_the_first(processor):
    (sample,) = generate("line", 1, 0, turns=3)
    batch = processor([sample])
    labels = batch["labels"][0]
    said = processor.tokenizer.decode(labels[labels >= 0])
    assert said == "".join(answer + processor.tokenizer.eos_token for _, answer in sample.turns)
    prompt = processor([sample], answers=False)["input_ids"][0]
    assert (labels[: len(prompt)] < 0).all() and labels[len(prompt)] >= 0
    assert processor.tokenizer.decode(prompt).endswith(sample.turns[0][0] + "\n")


def test_tokenizer_survives_a_round_trip(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "where is x?\n25 - abcdefghijklmnopqrstuvwyz 0134679"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    special = "<|bos|><|vision_start|><|image_pad|><|video_pad|><|vision_end|>a<|eos|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(special, add_special_tokens=False)) == [
        "<|bos|>",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_end|>",
        "a",
        "<|eos|>",
    ]


def test_videos_of_a_batch_can_have_one_length(processor):
    options = {"needle": {"frames": (4, 8), "batch_frames": 20}}
    stream = TaskStream(processor, {"needle": 1}, 4, seed=1, options=options)
    lengths = set()
    for step in range(12):
        frames = [len(sample.frames) for sample in stream.samples(step)]
        assert set(frames) == {frames[0]} and len(frames) == min(4, round(20 / frames[0]))
        assert bool((stream[step]["attention_mask"].sum(1) > stream[step]["attention_mask"].shape[1] - 10).all())
        lengths.add(frames[0])
    assert len(lengths) > 2


def test_stream_gives_the_same_batch_whenever_asked(processor):
    stream = TaskStream(processor, {"read": 1, "video": 2, "needle": 1}, 2, seed=3, options=SMALL)
    batches = [stream[i] for i in range(6)]
    for i in (4, 0, 5):
        assert all(torch.equal(stream[i][name], value) for name, value in batches[i].items())
    assert {stream.group(i) for i in range(60)} == {"read", "video", "needle"}


def test_wilson_interval():
    low, high = wilson_interval(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-3) and high == pytest.approx(0.9448, abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert all(wilson_interval(n, n)[1] == 1.0 for n in range(1, 300))
