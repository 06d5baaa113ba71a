"""A bad record among good ones is counted and left out, whatever is wrong with it; none ends a run."""

import json
from collections import Counter

import media
import pytest

from linmu_distill.data.records import ActivityNetRecords, JsonRecords, ParquetRecords, UnusableError
from linmu_distill.data.stream import Decoding
from linmu_models.chat import ChatProcessor
from linmu_models.media import UnreadableError

SHOWN = media.talk("<image>\nwhat?", "x")
FILMED = media.talk("<video>\nwhat?", "x")
NO_OBJECTS = [None, "text", 3, True, [], [1]]
BAD = [
    *NO_OBJECTS,
    {},
    *({"conversations": talk, "image": "a.png"} for talk in ("x", 3, {}, [None], ["x"])),
    *(
        {"conversations": [message, {"from": "gpt", "value": "x"}], "image": "a.png"}
        for message in (
            {"from": ["human"], "value": "x"},
            {"from": {}, "value": 3},
            {"from": "human", "value": ["x"]},
            {"from": "human", "value": "<image>\ud800"},
        )
    ),
    {"conversations": [SHOWN[0], {"from": "gpt", "value": {}}], "image": "a.png"},
    {"conversations": [SHOWN[0], {"from": "gpt", "value": 4}], "image": "a.png"},
    *(
        {"conversations": SHOWN, "image": image}
        for image in (3, 1.5, True, {}, {"bytes": 3}, {"bytes": "abc"}, {"path": ["a"]}, [None], [[1]], ".", "a\0b",
                      "x" * 5000, "\ud800.png")
    ),
    *({"conversations": FILMED, "video": video} for video in ("a\0b.mp4", "\ud800", {"path": 3}, "", ".", 7)),
]  # fmt: skip


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return ChatProcessor.load(media.qwen_folder(tmp_path_factory.mktemp("qwen")))


def counted(records, processor):
    """How many records are good, and how many are not, by reason, as a stream reads them."""
    found, decode = Counter(), Decoding(4, 2.0)
    for shard in range(records.shards):
        for row in records.rows(shard):
            try:
                record = records.parse(row)
                decode.tokens(record, processor)
                decode(record)
            except (UnusableError, UnreadableError) as error:
                found[str(error)] += 1
            else:
                found["good"] += 1
    return found


@pytest.fixture
def good(tmp_path):
    (tmp_path / "a.png").write_bytes(media.png(1))
    return {"conversations": SHOWN, "image": "a.png"}


@pytest.mark.parametrize("lines", [False, True], ids=["a list", "lines"])
def test_every_kind_among_good_records(lines, tmp_path, processor, good):
    rows = [good, *BAD, good]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path / "a.json").write_text(text)
    found = counted(JsonRecords([str(tmp_path / "a.json")], str(tmp_path)), processor)
    assert (found["good"], found["record that is no object"], found.total()) == (2, len(NO_OBJECTS), len(rows))


@pytest.mark.parametrize("bad", [None, "text", [], BAD[7], BAD[13], {"conversations": SHOWN, "image": 3}], ids=str)
@pytest.mark.parametrize("lines", [False, True], ids=["a list", "lines"])
def test_one_that_comes_first(lines, bad, tmp_path, processor, good):
    rows = [bad, good, good]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    found = counted(JsonRecords([str(tmp_path / "a.json")], str(tmp_path)), processor)
    assert (found["good"], found.total()) == (2, 3)


def test_a_line_that_is_cut(tmp_path, processor, good):
    line = json.dumps(good)
    (tmp_path / "a.json").write_text(f"{line}\n{line[:40]}\n{line}\n")
    found = counted(JsonRecords([str(tmp_path / "a.json")], str(tmp_path)), processor)
    assert found == {"good": 2, "record that is no object": 1}


@pytest.mark.parametrize(
    "bad",
    [
        *NO_OBJECTS,
        {"question": 3, "question_id": "a", "video_name": "v"},
        {"question": ["x"], "question_id": ["a"], "video_name": "v"},
        {"question": "q\ud800", "question_id": "a", "video_name": "v"},
        *({"question": "q", "question_id": "a", "video_name": name} for name in (3, ["v"], "v\0", None)),
        {"question": "q", "question_id": "b", "video_name": "v"},
    ],
    ids=str,
)
def test_activitynet(bad, tmp_path, processor):
    media.write_video(tmp_path / "v.mkv")
    question = {"question": "why", "question_id": "a", "video_name": "v"}
    answers = [{"question_id": "a", "answer": 7}, {"question_id": "b", "answer": ["x"]}, {"question_id": ["c"]}]
    media.write_json(tmp_path / "a.json", [bad, question, *answers])
    found = counted(ActivityNetRecords([str(tmp_path / "a.json")], str(tmp_path)), processor)
    assert (found["good"], found.total()) == (1, 2)


@pytest.mark.parametrize(
    "columns",
    [
        {"conversations": ["x", None], "image": [b"", None]},
        {"conversations": [3, 4], "image": [1, 2]},
        {"conversations": [SHOWN, None], "image": [3, 4]},
        {"conversations": [[None], [{"from": "human", "value": None}]], "image": ["a", "b"]},
        {"conversations": [[["human", "x"]], []], "image": [[b"x"], []]},
        {"other": [1, 2]},
    ],
    ids=str,
)
def test_columns_of_other_types(columns, tmp_path, processor):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    found = counted(ParquetRecords([str(tmp_path / "a.parquet")], None), processor)
    assert (found["good"], found.total()) == (0, 2)
