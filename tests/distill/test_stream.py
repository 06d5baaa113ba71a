"""Records to batches: counted, packed, split between processes, and gone on with to the last bit."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import media
import pytest
import record_sets
import torch
from accelerate.state import AcceleratorState
from record_sets import answers, config, reader, stop_at, stream
from training import curve, in_processes
from typer.testing import CliRunner

from linmu_distill.data.lanes import Lanes
from linmu_distill.data.records import JsonRecords, TextRecords
from linmu_distill.data.stream import DataError, Decoding, Packing, RecordStream, SetReader
from linmu_distill.handoff import stage_folder
from linmu_distill.objective import TrainingError
from linmu_distill.parallel import sharing
from linmu_distill.run import Run, distill
from linmu_distill.stages import STAGES
from linmu_distill.teacher import AnswerCache, Stream
from linmu_distill.train import Interrupted, StageTrainer, work_of
from linmu_models.chat import ChatProcessor
from linmu_models.cli import app
from linmu_models.media import UnreadableError
from linmu_ops import LinmuWarning


@pytest.fixture(scope="module", autouse=True)
def _small_windows():
    """Little data, read in several windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linmu_distill.sources.WINDOW", 8)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return record_sets.write(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def processor(folder):
    return ChatProcessor.load(folder / "teacher")


def test_what_is_broken_is_left_out_and_counted(folder, processor):
    """And never fatal: the rest is trained on."""
    data = stream(folder, processor)
    for i in range(40):
        assert data.samples(i)
    assert isinstance(data, Stream)
    pictures, videos = data.counts["pictures"], data.counts["videos"]
    assert set(pictures) == {"read", "used", "image corrupt", "special token in the text", "longer than max_tokens"}
    epochs = pictures["special token in the text"]
    assert abs(pictures["image corrupt"] - 2 * epochs) <= 2 and pictures["longer than max_tokens"] >= epochs - 1
    assert set(videos) == {"read", "used", "video truncated", "video missing", "empty answer"}
    assert abs(videos["used"] - videos["video missing"]) <= 1 < videos["video missing"]
    data.close()


def test_nothing_usable_is_an_error(folder, processor, tmp_path):
    media.onevision(tmp_path / "bad.parquet", {"a": b"noise", "b": b"more"})
    data = RecordStream(processor, [reader(tmp_path, processor, "bad")], [1], 0)
    with pytest.raises(DataError, match=r"data.sets.pictures: no record can be used \(2 read, 2 image corrupt\)"):
        data.samples(0)
    data = RecordStream(processor, [reader(tmp_path, processor, "bad", processes=2)], [1], 0)
    with pytest.raises(DataError, match="has 1 pieces, fewer than the 2 processes"):
        data.samples(0)


def test_nothing_that_can_be_decoded_is_an_error(folder, processor, monkeypatch):
    """Headers may be whole where the rest is not; then reading must not go on for ever."""

    def unreadable(self, record):
        raise UnreadableError("image corrupt")

    monkeypatch.setattr(Decoding, "__call__", unreadable)
    data = RecordStream(processor, [reader(folder, processor)], [1], 0)
    with pytest.raises(DataError, match=r"no record can be used \(\d+ read, \d+ image corrupt\)"):
        data.samples(0)
    data.close()


def test_pictures_for_a_language_model_are_counted(folder, tmp_path):
    tokens = media.tokenizer("")
    text_only = ChatProcessor(tokens, "llama")
    media.onevision(tmp_path / "both.parquet", {"a": media.png(0), "b": None})
    batches, counts = reader(tmp_path, text_only, "both").plan(0)
    assert counts == {"read": 2, "media for a text-only model": 1} and sum(map(len, batches)) == 1


def test_special_tokens_in_a_system_prompt_are_left_out(processor, tmp_path):
    talk = [{"from": "system", "value": "<|end|>"}, *media.talk("why?", "so")]
    media.write_json(tmp_path / "t.json", [{"conversations": talk}, {"conversations": media.talk("why?", "so")}])
    found = SetReader("t", JsonRecords([str(tmp_path / "t.json")], None), processor, Decoding(), Packing(window=2), 0)
    assert found.plan(0)[1] == {"read": 2, "special token in the text": 1}


def test_batches_are_full_and_of_like_lengths(folder, processor):
    found = reader(folder, processor, window=20)
    batches, counts = found.plan(0)
    assert counts == {"read": 20} and sum(map(len, batches)) == 20
    lengths = [[Decoding().tokens(record, processor) for record in batch] for batch in batches]
    assert all(len(batch) * max(batch) <= 400 for batch in lengths)
    spans = sorted((min(batch), max(batch)) for batch in lengths)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert 4 <= len(batches) < 10
    assert max(map(len, reader(folder, processor, max_samples=2).plan(0)[0])) == 2
    other = reader(folder, processor, seed=1, window=20).plan(0)[0]
    assert [answers(batch) for batch in batches] != [answers(batch) for batch in other]


def test_two_processes_see_disjoint_data_and_together_all_of_it(folder, processor):
    parts = [reader(folder, processor, rank=rank, processes=2) for rank in (0, 1)]
    one = reader(folder, processor)
    windows = one._windows
    assert windows == 4
    for epoch in range(2):
        seen = Counter()
        for window in range(epoch * windows, (epoch + 1) * windows):
            mine = [answer for batch in parts[window % 2].plan(window)[0] for answer in answers(batch)]
            seen.update(mine)
        assert len(seen) == 20 and set(seen.values()) == {1}
    orders = [[one._shards(window).tolist() for window in range(e * windows, (e + 1) * windows)] for e in range(4)]
    assert len({str(order) for order in orders}) > 1


def test_going_on_gives_what_would_have_come(folder, processor):
    whole, batches, states = stream(folder, processor), [], []
    for i in range(30):
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(processor(whole.samples(i)))
    for at in (0, 1, 7, 18):
        again = stream(folder, processor)
        again.load_state_dict(states[at])
        for i in range(at, at + 8):
            assert again.state_dict() == states[i]
            for name, tensor in processor(again.samples(i)).items():
                assert torch.equal(tensor, batches[i][name])
        again.close()
    whole.close()


def test_answers_are_cached_by_pixels(folder, processor, tmp_path):
    cache = AnswerCache(tmp_path / "a.sqlite", "t")
    data = stream(folder, processor, "whole")
    samples = [sample for i in range(6) for sample in data.samples(i)]
    keys = {cache.key(sample, 4) for sample in samples}
    assert len(keys) == len({(s.turns, s.media[0].frames.tobytes()) for s in samples}) > 5
    data.close()


def test_generate_sees_videos(folder):
    """`linmu generate` takes videos where there is no torchvision, and tells what it cannot read."""
    command = ["generate", str(folder / "teacher"), "--prompt", "what?", "--frames", "4", "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, [*command, "--video", str(folder / "good.mkv")])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*command, "--video", str(folder / "short.mkv")])
    assert done.exit_code == 1 and "short.mkv: video truncated" in done.stderr


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    speed = {"samples": 0, "speed_lengths": [16]}
    done = config(folder, tmp_path_factory.mktemp("whole"), evaluation=speed)
    distill(done)
    return done


def test_a_run_on_data_sets(whole):
    manifest = json.loads((stage_folder(whole.folder, 1) / "manifest.json").read_text())
    counts = manifest["data"]
    assert set(counts) == {"pictures", "videos"}
    assert counts["pictures"]["image corrupt"] > 0 and counts["pictures"]["used"] > 5
    # This teacher cannot be shown the built-in tasks' videos: its speed is that of text.
    speed = json.loads((whole.folder / "speed.json").read_text())
    assert [(row["model"], row["tokens"]) for row in speed] == [("teacher", 16), ("student", 16)]
    assert "A text of growing length" in (whole.folder / "report.md").read_text()


def beside_text(folder, output, **changes):
    (output / "t.txt").write_text("\n\n".join(f"Number {i} is {i * i}." for i in range(60)))
    sets = {
        "pictures": {"format": "onevision", "files": [str(folder / "flawed.parquet")]},
        "text": {"format": "text", "files": [str(output / "t.txt")]},
    }
    data = {"sets": sets, "max_tokens": 200}
    return config(folder, output, data=data, **{f"stage{i}": {"steps": 8} for i in (1, 2, 3)}, **changes)


@pytest.mark.parametrize(
    "preset, student",
    [
        ("exact", {"text_window": 4, "window": [1, 1, 1]}),
        pytest.param("paper", {}, marks=pytest.mark.sweep),
    ],
)
def test_text_beside_pictures(folder, tmp_path, preset, student):
    """Batches of text alone give nothing to what acts on visual tokens, and have no question for the teacher."""
    mixed = beside_text(folder, tmp_path, preset=preset, student=student)
    distill(mixed)
    for number in (1, 2, 3):
        counts = json.loads((stage_folder(mixed.folder, number) / "manifest.json").read_text())["data"]
        assert counts["pictures"]["used"] > 0 and counts["text"]["used"] > 0
    # No text asks anything, and no answer about a picture has an end in time: a mean of nothing is not told as 0.
    facts = json.loads((stage_folder(mixed.folder, 3) / "manifest.json").read_text())
    assert facts["unfinished_answers"] == facts["data"]["pictures"]["used"]
    assert not any("sequence" in told for told in (facts["means"], *curve(stage_folder(mixed.folder, 3))))


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.sweep), "fsdp"])
def test_a_process_may_have_text_where_the_other_has_pictures(folder, tmp_path, parallel):
    two = beside_text(folder, tmp_path, parallel=parallel)

    def work(rank):
        run = Run(two)
        run.prepare()
        for number in (1, 2, 3):
            run.train(number)

    assert in_processes(2, work) == [0, 0]
    assert len(curve(stage_folder(two.folder, 3))) == 8


def test_a_stopped_run_has_the_same_curve(whole, folder, tmp_path, monkeypatch):
    """The data goes on where it was, in stage 3 with the teacher's own answers too; the last bit is the same."""
    broken = config(folder, tmp_path)
    for stage, stop in ((1, 3), (3, 5)):
        stop_at(monkeypatch, stage, stop)
        with pytest.raises(Interrupted, match=f"step {stop} of stage {stage}"):
            distill(broken, resume=True)
    stop_at(monkeypatch, 0, 0)
    distill(broken, resume=True)
    for number in (1, 2, 3):
        assert curve(stage_folder(broken.folder, number)) == curve(stage_folder(whole.folder, number))
        facts = [json.loads((stage_folder(c.folder, number) / "manifest.json").read_text()) for c in (broken, whole)]
        assert facts[0]["data"] == facts[1]["data"]


def reads(folder, processor, rank):
    """What one of two processes reads."""
    return RecordStream(processor, [reader(folder, processor, rank=rank, processes=2)], [1], 0)


def read_by_two(folder, processor, batches):
    """What two processes have read so many batches of in turns, and where each is."""
    both = [reads(folder, processor, rank) for rank in range(2)]
    for index in range(batches):
        both[index % 2].samples(index)
    return both, [stream.state_dict() for stream in both]


def test_one_process_reads_on_for_several(folder, processor):
    """Batch by batch what each of them would have read, from wherever it was; and is gone on with like any stream."""
    alone, states = read_by_two(folder, processor, 5)
    lanes = Lanes(reads(folder, processor, 0), states, 0, 1)
    assert isinstance(lanes, Stream) and lanes.state_dict() == {"lanes": states}
    first = [answers(lanes.samples(index)) for index in range(5, 9)]
    middle = lanes.state_dict()
    rest = [answers(lanes.samples(index)) for index in range(9, 14)]
    assert first + rest == [answers(alone[index % 2].samples(index)) for index in range(5, 14)]
    again = Lanes(reads(folder, processor, 1), middle["lanes"], 0, 1)
    assert [answers(again.samples(index)) for index in range(9, 14)] == rest
    assert again.counts["pictures"] == alone[0].counts["pictures"] + alone[1].counts["pictures"]
    for data in (*alone, lanes, again):
        data.close()


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_more_processes_read_on_for_few(folder, processor, processes):
    """Each batch is read by one of them, and is what it would have been; the state is that of the few, in which they
    go on again; and nothing is counted twice."""
    few, states = read_by_two(folder, processor, 8)
    many = [Lanes(reads(folder, processor, 0), states, rank, processes) for rank in range(processes)]
    found = [answers(many[index % processes].samples(index)) for index in range(8, 24)]
    assert found == [answers(few[index % 2].samples(index)) for index in range(8, 24)]

    def kept(rank):
        trainer = SimpleNamespace(
            source=many[rank], _of_all_data=lambda _: [data.state_dict()["lanes"] for data in many]
        )
        return StageTrainer._lanes(trainer)

    ends = [stream.state_dict() for stream in few]
    assert all(kept(rank) == ends for rank in range(processes))
    both = few[0].counts["pictures"] + few[1].counts["pictures"]
    assert sum((data.counts["pictures"] for data in many), Counter()) == both
    for data in (*few, *many):
        data.close()


def test_more_processes_than_pieces_read_on_for_few(folder, processor, tmp_path):
    """Each has a lane of those that began, of which there are no more than pieces."""
    media.onevision(tmp_path / "one.parquet", {"a": media.png(1), "b": media.png(2)})
    alone = RecordStream(processor, [reader(tmp_path, processor, "one")], [1], 0)
    mine = RecordStream(processor, [reader(tmp_path, processor, "one", processes=2)], [1], 0)
    many = [Lanes(mine, [None], rank, 2) for rank in range(2)]
    assert [answers(many[i % 2].samples(i)) for i in range(6)] == [answers(alone.samples(i)) for i in range(6)]
    for data in (alone, *many):
        data.close()


def test_text_of_one_token_is_left_out(processor, tmp_path):
    """Nothing predicts it: a batch of it alone would end the training."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("some words, of which most are predicted")
    readers = [SetReader(
        "text", TextRecords([str(tmp_path / "?.txt")], processor.tokenizer, 100), processor, Decoding(), Packing(100), 0
    )]  # fmt: skip
    data = RecordStream(processor, readers, [1], 0)
    assert {data.samples(i)[0].turns[0][1][:4] for i in range(4)} == {"some"}
    assert data.counts["text"]["a single token, which nothing predicts"] >= 3
    data.close()


def test_a_stage_keeps_the_batches_of_the_one_before(folder, tmp_path):
    """Where others go on in its processes' place, and nobody wants it otherwise."""
    options = config(folder, tmp_path, gradient_accumulation=2)
    facts = {"processes": 4, "gradient_accumulation": 2}
    assert [work_of(facts, options, n) for n in (1, 2, 4, 8)] == [4, 4, 4, 4]
    assert work_of({}, options, 3) == 3
    assert work_of(facts, options.model_copy(update={"gradient_accumulation": 4}), 2) == 2
    with pytest.warns(LinmuWarning, match="the step's batches were 8, which 3 processes cannot share; they are now 6"):
        assert work_of(facts, options, 3) == 3
    with pytest.warns(LinmuWarning, match="were 8, which 16 processes cannot share; they are now 32"):
        assert work_of(facts, options, 16) == 16


@pytest.mark.sweep
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_the_next_stage_is_of_another_number_of_processes(folder, tmp_path, first, then):
    """The run is that of the first number: a step keeps its batches, and they are of the same records."""
    # Of the videos one can be used: too few for two.
    pictures = {"pictures": {"format": "onevision", "files": [str(folder / "flawed.parquet")]}}
    data = {"data": {"sets": pictures, "max_tokens": 200}}
    more = {"stage2": {"steps": 0}, "checkpoint_every": 3, "gradient_accumulation": 2 // first, **data}
    for name in ("whole", "moved"):
        (tmp_path / name).mkdir()
    whole, moved = (config(folder, tmp_path / name, **more) for name in ("whole", "moved"))

    def trains(options, *numbers):
        def work(rank):
            torch.set_num_threads(1)
            AcceleratorState._reset_state(True)
            run = Run(options)
            run.prepare()
            for number in numbers:
                run.train(number)

        return work

    assert not any(in_processes(first, trains(whole, 1, 2, 3)))
    assert not any(in_processes(first, trains(moved, 1, 2)))
    assert not any(in_processes(then, trains(moved, 3)))
    for number in (1, 3):
        for ours, theirs in zip(*(curve(stage_folder(c.folder, number)) for c in (moved, whole)), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
        facts = [json.loads((stage_folder(c.folder, number) / "manifest.json").read_text()) for c in (moved, whole)]
        assert facts[0]["data"] == facts[1]["data"] and facts[0]["processes"] == facts[1]["processes"] == first


@pytest.mark.sweep
def test_a_run_of_one_process_goes_on_in_two(folder, tmp_path, monkeypatch):
    """And then in one again: the same losses, to rounding, and the same counts."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken = (config(folder, tmp_path / name, gradient_accumulation=2) for name in ("whole", "broken"))

    def first_stage(run):
        run.prepare()
        run.train(1)

    def work(rank):
        torch.set_num_threads(1)
        AcceleratorState._reset_state(True)
        stop_at(monkeypatch, 1, 4)
        with pytest.raises(Interrupted):
            first_stage(Run(broken))

    first_stage(Run(whole))
    stop_at(monkeypatch, 1, 2)
    with pytest.raises(Interrupted):
        first_stage(Run(broken))
    assert in_processes(2, work) == [0, 0]
    stop_at(monkeypatch, 0, 0)
    first_stage(Run(broken))
    for ours, theirs in zip(*(curve(stage_folder(c.folder, 1)) for c in (broken, whole)), strict=True):
        assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    facts = [json.loads((stage_folder(c.folder, 1) / "manifest.json").read_text()) for c in (broken, whole)]
    assert facts[0]["data"] == facts[1]["data"]


def test_data_of_three_processes_are_not_shared_by_two(folder, processor):
    data = RecordStream(processor, [reader(folder, processor)], [1], 0)
    trainer = SimpleNamespace(
        _sharing=sharing(SimpleNamespace(num_processes=2, process_index=0), 1), stage=STAGES[0], _batches=1,
        source=data, config=SimpleNamespace(gradient_accumulation=2),
    )  # fmt: skip
    progress = {"batches": 6, "data": [data.state_dict()] * 3}
    with pytest.raises(TrainingError, match="was at work in 3 processes, each with a part of the data"):
        StageTrainer._restore_place(trainer, progress)
