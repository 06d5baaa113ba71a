"""A cache's content as a value: copied, put back, forked, kept in a file; and tokens that are taken back."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache

import linmu_models
import linmu_ops
from linmu_models import snapshot as snapshots
from linmu_models.cache import cache_bytes
from linmu_models.rewind import TAKEN_BACK

from . import tiny

STUDENTS = {
    "linear": ("qwen2_5_vl", ()),
    "some attention": ("qwen2_5_vl", (1,)),
    "some attention with a window": ("gemma3", (0,)),
    "delta rule": ("qwen3_5", ()),
    "short convolution": ("lfm2_vl", ()),
    "the paper's": ("qwen2_5_vl", (), "paper"),
}


@functools.cache
def student(family, keep=(), preset=None, dtype=torch.float32):
    options = tiny.NARROW if preset is None else {"preset": preset}
    return linmu_models.convert(copy.deepcopy(tiny.teacher(family)).to(dtype), options, keep_attention=keep)


def named(name, **more):
    return student(*STUDENTS[name], **more)


def padded_rows(model):
    family = model.config.model_type.removeprefix("linmu_")
    return tiny.left_padded([tiny.example(family, "images"), tiny.example(family, "image")])


def prefilled(model, cache=None, rows=None):
    """After a prompt with several images and a padded row."""
    rows = padded_rows(model) if rows is None else rows
    with torch.no_grad():
        out = model(**rows, use_cache=True, **({} if cache is None else {"past_key_values": cache}))
    return out.past_key_values


@torch.no_grad()
def read(model, cache, ids):
    """Logits of text that follows."""
    return model(input_ids=ids, past_key_values=cache, position_ids=positions(model, cache, ids)).logits


def positions(model, cache, ids):
    at = (int(cache.get_seq_length()) + torch.arange(ids.shape[1])).expand(len(ids), -1)
    return at[None].expand(3, -1, -1) if "qwen" in model.config.model_type and "vision_config" in model.config else at


def some_ids(rows, n, seed=3):
    return torch.tensor([tiny.text_ids(n, seed + row) for row in range(rows)])


@pytest.mark.parametrize("name", list(STUDENTS))
def test_a_snapshot_brings_the_cache_back(name, tmp_path):
    """Bit for bit, whatever was read since; into the same cache, another, a copy, and from a file."""
    model = named(name)
    cache = prefilled(model)
    taken = cache.snapshot()
    assert taken.tokens == cache.get_seq_length() and taken.bytes == cache_bytes(cache)
    cache.save(tmp_path / "state", model)
    ids = some_ids(2, 7)
    fork = copy.deepcopy(cache)
    expected = read(model, cache, ids)
    other = DynamicCache(config=model.config)
    prefilled(model, other, {k: v for k, v in tiny.example("qwen2", "text").items()})
    for again in (cache, other, fork, linmu_models.load_cache(tmp_path / "state", model)):
        if again is not fork and again.get_seq_length() != taken.tokens:
            again.restore(taken)
        assert torch.equal(read(model, again, ids), expected)
    cache.load(tmp_path / "state", model)
    assert torch.equal(read(model, cache, ids), expected)


def test_a_file_serves_the_saved_model(tmp_path):
    """One that was loaded from its folder, in a chat that goes on; the file does not grow with the prompt."""
    model = student("qwen2_5_vl")
    first = tiny.example("qwen2_5_vl", "images")
    cache = DynamicCache(config=model.config)
    out = model.generate(**first, max_new_tokens=3, do_sample=False, past_key_values=cache)
    cache.save(tmp_path / "state", model)
    turn = tiny.longer(first, torch.cat((out, some_ids(1, 5)), dim=1))
    greedy = dict(max_new_tokens=4, do_sample=False)
    expected = model.generate(**turn, **greedy)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    reopened = linmu_models.load_cache(tmp_path / "state", again)
    turn.pop("pixel_values")
    assert torch.equal(again.generate(**turn, **greedy, past_key_values=reopened), expected)
    longer = DynamicCache(config=model.config)
    read(model, longer, some_ids(1, 300))
    longer.save(tmp_path / "longer", model)
    assert abs((tmp_path / "longer").stat().st_size - (tmp_path / "state").stat().st_size) < 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longer", "model", "state"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state"
    prefilled(student("qwen2"), rows=tiny.example("qwen2", "text")).save(path, student("qwen2"))
    return path


def rewritten(path, to, change):
    """The file with another header, whose checksum is right."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[snapshots.FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    text = json.dumps(header, sort_keys=True)
    save_file(tensors, to, metadata={snapshots.FORMAT: text, "checksum": snapshots._header_sum(text)})


def other_shape(header, tensors):
    tensors["0.ssm"] = tensors["0.ssm"][:, :2].contiguous()
    header["layers"][0]["tensors"]["ssm"] = snapshots._checksum(tensors["0.ssm"])


def other_dtype(header, tensors):
    tensors["0.keys"] = tensors["0.keys"].bfloat16()
    header["layers"][0]["tensors"]["keys"] = snapshots._checksum(tensors["0.keys"])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda header, tensors: header.update(version=2), "must be of version 1 of the format, got 2"),
        (lambda header, tensors: header["layers"].pop(), "is damaged: its header does not name "),
        (lambda header, tensors: tensors.pop("0.ssm"), "is damaged: ssm of layer 0 is not what was saved"),
        (lambda header, tensors: tensors["1.keys"].add_(1), "is damaged: keys of layer 1 is not what was saved"),
        (lambda header, tensors: header["layers"][1].update(kind="keys"), "kinds of layers, got 'keys' at 1"),
        (other_shape, r"ssm of layer 0 must be \(\(1, 4, "),
        (other_dtype, r"keys of layer 0 must be .*torch.float32\), got .*torch.bfloat16\)"),
    ],
)
def test_what_a_file_must_be(saved, tmp_path, change, said):
    rewritten(saved, tmp_path / "state", change)
    with pytest.raises(ValueError, match=f"load: .*state.* {said}" if "of layer 0 must" not in said else said) as error:
        linmu_models.load_cache(tmp_path / "state", student("qwen2"))
    assert "\n" not in str(error.value)


def test_a_full_disk_is_an_os_error_and_keeps_the_old_file(saved, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""
    model, old = student("qwen2"), saved.read_bytes()
    value = linmu_models.CacheSnapshot.load(saved, model)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(snapshots, "save_file", full)
    before = sorted(saved.parent.iterdir())
    with pytest.raises(OSError, match="could not be written: I/O error: No space left"):
        value.save(saved, model)
    assert saved.read_bytes() == old and sorted(saved.parent.iterdir()) == before


def test_a_damaged_file_is_refused(saved, tmp_path):
    """Cut anywhere, or with any byte changed."""
    whole, path = saved.read_bytes(), tmp_path / "state"
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"load: .*state must be a whole file of a cache, got a damaged one"):
            linmu_models.load_cache(path, student("qwen2"))
    for place in range(0, len(whole), len(whole) // 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"load: .*state .*(damaged|must be)"):
            linmu_models.load_cache(path, student("qwen2"))
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"must be a file that cache\.save wrote, got other safetensors"):
        linmu_models.load_cache(path, student("qwen2"))
    with pytest.raises(OSError, match="nothing"):
        linmu_models.load_cache(tmp_path / "nothing", student("qwen2"))


def test_another_model_is_refused(saved):
    def but(change):
        model = copy.deepcopy(student("qwen2"))
        change(model)
        return model

    def moved(model):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.01)

    others = {
        "weights": but(moved),
        "configuration": but(lambda model: setattr(model.config, "rope_parameters", {"rope_theta": 5.0})),
        "dtype must be torch.bfloat16, got torch.float32": but(lambda model: model.to(torch.bfloat16)),
        "class": student("qwen2_5_vl"),
    }
    for what, other in others.items():
        with pytest.raises(ValueError, match=f"must be of the same model: its {what}"):
            linmu_models.load_cache(saved, other)
    fewer_sinks = linmu_models.convert(tiny.teacher("qwen2"), {**tiny.NARROW, "sink_tokens": 1})
    with pytest.raises(ValueError, match="configuration must be the model's own"):
        linmu_models.load_cache(saved, fewer_sinks)
    with pytest.raises(TypeError, match="load: model must be a LinMU model, got Qwen2ForCausalLM"):
        linmu_models.load_cache(saved, tiny.teacher("qwen2"))


def test_a_file_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_bytes(b"before")

    def fails(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(snapshots, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        prefilled(student("qwen2"), rows=tiny.example("qwen2", "text")).save(path, student("qwen2"))
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_copied_is_refused_by_name():
    model = student("qwen2")
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    cache = model(some_ids(1, 6), **packed, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="snapshot: a cache must not hold rows of several sequences"):
        cache.snapshot()
    taken = prefilled(student("qwen2_5_vl")).snapshot()
    deep = prefilled(student("qwen2_5_vl", (1,)))
    before = deep.snapshot()
    with pytest.raises(ValueError, match="layer 1 of the snapshot must be of kind 'keys', got 'block'"):
        deep.restore(taken)
    for one, other in zip(deep.snapshot().layers, before.layers, strict=True):
        assert all(torch.equal(other.tensors[name], t) for name, t in one.tensors.items())
    with pytest.raises(TypeError, match="restore: snapshot must be a CacheSnapshot, got dict"):
        deep.restore({})
    with pytest.raises(ValueError, match="restore: snapshot must have 4 layers, got 2"):
        prefilled(student("qwen3_5")).restore(snapshots.CacheSnapshot(taken.layers[:2]))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["linear", "some attention", "delta rule"])
def test_rows_are_chosen_and_repeated(name, recorded):
    """Also of what is kept to take tokens back."""
    model = named(name)
    cache = DynamicCache(config=model.config)
    prefilled(model, cache)
    ids, more = some_ids(2, 3), some_ids(1, 4, 9).expand(4, -1)
    if recorded:
        cache.activate_past_recording()
        read(model, cache, torch.cat((ids, some_ids(2, 2, 7)), dim=1))
        cache.crop(-2)
    else:
        read(model, cache, ids)
    one, expected = copy.deepcopy(cache), read(model, copy.deepcopy(cache), more[:2])
    cache.batch_repeat_interleave(2)
    assert_close(read(model, copy.deepcopy(cache), more), expected.repeat_interleave(2, dim=0))
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert_close(read(model, copy.deepcopy(cache), more), expected[[1, 0, 0, 1]])
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert_close(read(model, cache, more[:2]), expected[[1, 0]])
    assert_close(read(model, one, more[:2]), expected)


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(STUDENTS))
def test_tokens_are_taken_back(name):
    """As if they had never been read, whatever the calls were; and again and again."""
    model = named(name, dtype=torch.float64)
    start, ids, after = prefilled(model).snapshot(), some_ids(2, 11), some_ids(2, 2, 8)
    for calls, back in (((11,), 3), ((5, 1, 1, 4), 5), ((9, 2), 0)):
        total = sum(calls)
        fresh, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
        prefilled(model, fresh)
        fresh.restore(start)
        prefilled(model, cache)
        cache.restore(start)
        cache.activate_past_recording()
        at = 0
        for n in calls:
            read(model, cache, ids[:, at : at + n])
            at += n
        assert cache.tokens_to_take_back == total and cache.is_croppable
        cache.crop(-back)
        assert cache.get_seq_length() == start.tokens + total - back
        if total > back:
            read(model, fresh, ids[:, : total - back])
        moved = DynamicCache(config=model.config)
        prefilled(model, moved)
        moved.restore(cache.snapshot())
        expected = read(model, fresh, after)
        for taken in (cache, moved):
            torch.testing.assert_close(read(model, taken, after), expected, rtol=1e-9, atol=1e-9)
        assert cache.tokens_to_take_back == 2
        cache.crop(-1)
        fresh.restore(start)
        read(model, fresh, torch.cat((ids[:, : total - back], after[:, :1]), dim=1))
        ids_after = some_ids(2, 1, 5)
        torch.testing.assert_close(read(model, cache, ids_after), read(model, fresh, ids_after), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(STUDENTS))
def test_no_tokens_are_taken_back_of_none(name):
    """Before anything is recorded, and where all that was recorded has been taken back."""
    model = named(name)
    cache, ids = prefilled(model), some_ids(2, 3)
    expected = read(model, copy.deepcopy(cache), ids)
    cache.activate_past_recording()
    cache.crop(0)
    assert torch.equal(read(model, cache, ids), expected)
    cache.crop(-3)
    cache.crop(0)
    assert torch.equal(read(model, cache, ids), expected)


def test_how_many_tokens_can_be_taken_back():
    """The last ones of a long prompt or of many calls; of a prompt with images, those after the last one."""
    model = student("qwen2")
    with pytest.raises(ValueError, match=r"crop must be from 0 to 0, as .* before cache.activate_past_recording\(\)"):
        prefilled(model, rows=tiny.example("qwen2", "text")).crop(-1)
    ids = some_ids(1, 4 * TAKEN_BACK)
    for size in (4 * TAKEN_BACK, 150, 7):
        cache, fresh = prefilled(model, rows=tiny.example("qwen2", "text")), DynamicCache(config=model.config)
        cache.activate_past_recording()
        for part in ids.split(size, dim=1):
            read(model, cache, part)
        known = cache.tokens_to_take_back
        assert TAKEN_BACK <= known <= 2 * TAKEN_BACK
        assert sum(t.shape[1] for t in cache.layers[0].record.tensors() if t.shape[-1] == 48) <= 2 * TAKEN_BACK
        with pytest.raises(ValueError, match=f"crop must be from -{known} to 0, .*, got -{known + 1}; cache.restore"):
            cache.crop(-known - 1)
        with pytest.raises(ValueError, match=f"crop must be from -{known} to 0, .*, got 3"):
            cache.crop(3)
        cache.crop(-known)
        prompt = tiny.example("qwen2", "text")["input_ids"]
        read(model, fresh, torch.cat((prompt, ids[:, :-known]), dim=1))
        assert_close(read(model, cache, some_ids(1, 3, 8)), read(model, fresh, some_ids(1, 3, 8)))
    seen = student("qwen2_5_vl")
    inputs = tiny.example("qwen2_5_vl", "images")
    cache = DynamicCache(config=seen.config)
    prefilled(seen, cache)
    cache.reset()
    cache.activate_past_recording()
    prefilled(seen, cache, inputs)
    kinds = inputs["mm_token_type_ids"][0]
    assert cache.tokens_to_take_back == len(kinds) - 1 - int(kinds.nonzero().max())


@pytest.mark.parametrize("name", list(STUDENTS))
def test_guessed_tokens_give_the_greedy_answer(name):
    """Prompt lookup and an assistant that is often wrong; and a student as the assistant of its teacher."""
    model = named(name)
    family = model.config.model_type.removeprefix("linmu_")
    inputs = tiny.example(family, "images")
    greedy = dict(max_new_tokens=14, do_sample=False)
    expected = model.generate(**inputs, **greedy)
    assert torch.equal(model.generate(**inputs, **greedy, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(**inputs, **greedy, assistant_model=tiny.teacher(family)), expected)


def going_on(name):
    """A model, a cache that has seen a prompt but for its last tokens, and what `generate` takes to go on from it."""
    model = named(name)
    whole = tiny.example(model.config.model_type.removeprefix("linmu_"), "images")
    ids = torch.cat((whole["input_ids"], torch.tensor([tiny.text_ids(24, 7)])), dim=1)
    whole, cache = tiny.longer(whole, ids), DynamicCache(config=model.config)
    model.generate(**tiny.longer(whole, ids[:, :-9]), max_new_tokens=1, do_sample=False, cache=cache)
    return model, cache, whole, {k: v for k, v in whole.items() if "pixel" not in k}


@pytest.mark.parametrize("name", list(STUDENTS))
def test_guessed_tokens_go_on_from_what_a_cache_has_seen(name):
    """transformers' own decoding reads a prompt again, after the tokens of it that the cache has seen."""
    model, cache, whole, turn = going_on(name)
    family = model.config.model_type.removeprefix("linmu_")
    greedy, read = dict(max_new_tokens=14, do_sample=False), cache.snapshot()
    expected = model.generate(**whole, **greedy)
    for guesses in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=tiny.teacher(family)), {}):
        cache.restore(read)
        assert torch.equal(model.generate(**turn, **greedy, **guesses, cache=cache), expected), guesses
        assert cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("guesses", [{}, dict(prompt_lookup_num_tokens=3), dict(prefill_chunk_size=4)])
def test_a_prompt_that_the_cache_has_seen_is_refused(guesses):
    """transformers would read it again from its start, as if it came after itself."""
    model, cache, _, _ = going_on("linear")
    seen = cache.get_seq_length()
    for length in (seen, seen - 3):
        said = (
            f"input_ids must be of all tokens that the cache has seen, {seen}, and of one more at least, got {length}"
        )
        with pytest.raises(ValueError, match=said):
            model.generate(torch.ones(1, length, dtype=torch.long), cache=cache, max_new_tokens=3, **guesses)


def test_a_cache_is_taken_by_both_names():
    """transformers 5.23 calls it `past_key_values`, and 5.24 `cache`."""
    model, ids = student("qwen2"), torch.tensor([tiny.text_ids(40)])
    outs = []
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for part in ids.split((30, 6, 4), dim=1):
                out = model(input_ids=part, **{name: cache}).logits
        outs.append(
            (out, model.generate(torch.cat((ids, ids), dim=1), **{name: cache}, max_new_tokens=4, do_sample=False))
        )
    assert all(map(torch.equal, *outs))
    assert torch.equal(outs[0][1], model.generate(torch.cat((ids, ids), dim=1), max_new_tokens=4, do_sample=False))


def test_a_student_may_guess():
    teacher, inputs = tiny.teacher("qwen2_5_vl"), tiny.example("qwen2_5_vl", "images")
    greedy = dict(max_new_tokens=14, do_sample=False)
    expected = teacher.generate(**inputs, **greedy)
    assert torch.equal(teacher.generate(**inputs, **greedy, assistant_model=student("qwen2_5_vl")), expected)


def test_guesses_need_a_dynamic_cache():
    # transformers 5.23 refuses it before us.
    ours, theirs = "cache must be a dynamic one for decoding that takes tokens back", "not supported with Static cache"
    with pytest.raises(ValueError, match=f"{ours}|{theirs}"):
        student("qwen2").generate(
            **tiny.example("qwen2", "text"), max_new_tokens=3, prompt_lookup_num_tokens=2, cache_implementation="static"
        )


@pytest.mark.parametrize("name", ["linear", "some attention", "delta rule"])
def test_a_static_cache_keeps_its_addresses(name):
    model = named(name)
    cache, dynamic = StaticCache(config=model.config, max_cache_len=40), prefilled(model)
    prefilled(model, cache)

    def addresses():
        values = [getattr(layer, "state", None) or getattr(layer, "keys", None) for layer in cache.layers]
        mixers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
        values += [tuple(held.values()) for layer in mixers for held in (layer.conv_states, layer.recurrent_states)]
        return [t.data_ptr() for value in values if value is not None for t in value if t is not None]

    before, taken, ids = addresses(), cache.snapshot(), some_ids(2, 1)
    expected = read(model, cache, ids)
    read(model, cache, ids)
    for value in (taken, dynamic.snapshot()):
        cache.restore(value)
        assert cache.get_seq_length() == taken.tokens
        torch.testing.assert_close(read(model, cache, ids), expected)
    assert addresses() == before and len(before) >= len(cache.layers)
    with pytest.raises(ValueError, match=r"of layer \d must be as in the static cache, \(2, "):
        cache.restore(prefilled(model, rows=tiny.example(STUDENTS[name][0], "image")).snapshot())


def test_fast_decode_goes_on_from_a_snapshot():
    """By the graph that was there before."""
    torch._dynamo.reset()
    model = student("qwen2")
    compiled = linmu_models.fast_decode(backend="aot_eager", mode=None, fullgraph=True)
    fast = {**compiled, "max_new_tokens": 5, "do_sample": False}
    inputs, cache = tiny.example("qwen2", "text"), StaticCache(config=model.config, max_cache_len=40)
    fast.pop("cache_implementation")
    out = model.generate(**inputs, **fast, past_key_values=cache)
    taken = cache.snapshot()
    turn = tiny.longer(inputs, torch.cat((out, some_ids(1, 4)), dim=1))
    expected = model.generate(**turn, max_new_tokens=5, do_sample=False)
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert torch.equal(model.generate(**turn, **fast, past_key_values=cache), expected)
        cache.restore(taken)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count


@torch.no_grad()
def test_a_video_may_be_cut_where_a_snapshot_is_taken(tmp_path):
    """It goes on from there; the text after it can be taken back."""
    model = student("qwen2_5_vl")
    decoder, layout = model.get_decoder(), linmu_ops.TokenLayout([(0, 4, 2, 3)], range(3, 27), 1, 40)
    embeddings = torch.randn(1, 40, decoder.config.hidden_size)

    def call(cache, first, last):
        part = linmu_models.LinmuInputs(layout.part(first, last))
        at = torch.arange(first, last)[None, None].expand(3, 1, -1)
        return decoder(inputs_embeds=embeddings[:, first:last], position_ids=at, cache=cache, linmu=part)[0]

    cache, whole = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = call(whole, 0, 40)
    call(cache, 0, 17)
    taken = cache.snapshot()
    assert any(name.startswith("slab_") for name in taken.layers[0].tensors)
    cache.save(tmp_path / "state", model)
    first = call(cache, 17, 40)
    assert_close(first, expected[:, 17:])
    cache.restore(taken)
    for again in (cache, linmu_models.load_cache(tmp_path / "state", model)):
        again.activate_past_recording()
        assert_close(call(again, 17, 40), first)
        assert again.tokens_to_take_back == 13
        again.crop(-6)
        assert_close(call(again, 34, 40), expected[:, 34:])
