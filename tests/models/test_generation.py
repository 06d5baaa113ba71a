"""`generate` on a linear model: every way of decoding, chats that keep the cache, constant memory and cost."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo.testing
from transformers import DynamicCache

import linmu_models
import linmu_ops

from . import tiny

FAMILIES = ["qwen2_5_vl", "gemma3", "smolvlm"]
# So that every part of the state is in use.
OPTIONS = tiny.NARROW


@functools.cache
def student(family, keep=(), options=True):
    return linmu_models.convert(tiny.teacher(family), OPTIONS if options else linmu_models.EXACT, keep_attention=keep)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("keep", [(), (1,)], ids=["linear", "hybrid"])
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "sampling", "beams"],
)
def test_cached_is_uncached(family, keep, how):
    model = student(family, keep)
    rows = tiny.left_padded([tiny.example(family, "images"), tiny.example(family, "image")])
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(model.generate(**rows, max_new_tokens=5, use_cache=use_cache, **how))
    assert torch.equal(*outs)


@pytest.mark.parametrize("example", ["image", "images", "video"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_the_first_token_is_that_of_a_plain_forward_pass(family, example):
    """`generate` may encode pixels before the prefill: the prefill must still know where the visual tokens are."""
    if family == "gemma3" and example == "video":
        pytest.skip("takes no video")
    model = student(family)
    inputs = tiny.example(family, example)
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        torch.testing.assert_close(out.logits[0], model(**inputs).logits[:, -1].float())


@pytest.mark.parametrize("keep", [(0,), (0, 1)])
def test_layers_with_a_window_of_keys_may_stay(keep):
    model = student("gemma3", keep)  # layer 0 attends to 8 tokens back, layer 1 to all
    rows = tiny.left_padded([tiny.example("gemma3", "images"), tiny.example("gemma3", "image")])
    greedy = dict(max_new_tokens=8, do_sample=False)
    expected = model.generate(**rows, **greedy, use_cache=False)
    assert torch.equal(model.generate(**rows, **greedy), expected)
    assert torch.equal(model.generate(**rows, **greedy, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache(family):
    for keep in ((), (1,)):
        model = student(family, keep)
        rows = tiny.left_padded([tiny.example(family, "images"), tiny.example(family, "image")])
        dynamic = model.generate(**rows, max_new_tokens=4, do_sample=False)
        assert torch.equal(
            dynamic, model.generate(**rows, max_new_tokens=4, do_sample=False, cache_implementation="static")
        )


@pytest.mark.parametrize("keep", [(), (0,)], ids=["linear", "hybrid"])
def test_a_chat_keeps_its_cache(keep):
    model = student("qwen2_5_vl", keep)
    first = tiny.thw_batch([(2, 3)], [], 14, False)
    cache = DynamicCache(config=model.config)
    out = model.generate(**first, max_new_tokens=3, do_sample=False, past_key_values=cache)
    more = torch.tensor([tiny.text_ids(5, 7)])
    ids = torch.cat((out, more), dim=1)
    whole = tiny.longer(first, ids)
    fresh = model.generate(**whole, max_new_tokens=4, do_sample=False)
    # The second turn has no new image: pixels stay away, the grid may stay.
    turn = {k: v for k, v in whole.items() if k != "pixel_values"}
    assert torch.equal(model.generate(**turn, max_new_tokens=4, do_sample=False, past_key_values=cache), fresh)


def test_a_chat_may_bring_a_second_image():
    model = student("smolvlm")
    first, second = tiny.smolvlm_batch(2, 3), tiny.smolvlm_batch(0, 0)
    ids = torch.cat((first["input_ids"], second["input_ids"]), dim=1)
    with torch.no_grad():
        both = torch.cat((first["pixel_values"], second["pixel_values"]), dim=1)
        whole = model(input_ids=ids, pixel_values=both).logits
        cache = DynamicCache(config=model.config)
        model(**first, past_key_values=cache, use_cache=True)
        second = {**second, "attention_mask": torch.ones_like(ids)}
        rest = model(**second, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, -rest.shape[1] :], rtol=1e-4, atol=1e-4)


def test_prefill_in_chunks():
    """As transformers offers it."""
    model = student("qwen2_5_vl")
    ids = torch.tensor([tiny.text_ids(11)])
    greedy = dict(max_new_tokens=4, do_sample=False)
    whole = model.generate(ids, **greedy)
    for how in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **greedy, **how, prefill_chunk_size=3), whole)


def test_a_prompt_that_was_read_in_inference_mode():
    model = student("qwen2")
    first = tiny.example("qwen2", "text")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(**first, past_key_values=cache, use_cache=True)
    ids = torch.cat((first["input_ids"], torch.tensor([tiny.text_ids(3)])), dim=1)
    greedy = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, **greedy, past_key_values=cache), model.generate(ids, **greedy))


def test_an_image_in_two_calls_is_an_error():
    inputs = tiny.thw_batch([(2, 3)], [], 14, False)
    part = {**inputs, "input_ids": inputs["input_ids"][:, :7]}
    with pytest.raises(ValueError, match=r"must be those of whole images and videos of \[6\] tokens, got 3"):
        student("qwen2_5_vl").build_layout(part)


def state_bytes(cache):
    states = [layer.state for layer in cache.layers]
    return sum(t.numel() * t.element_size() for s in states for t in s if t is not None)


def test_state_is_of_constant_size():
    small = tiny.hf.Qwen2ForCausalLM(tiny.hf.Qwen2Config(**{**tiny.SIZES, "num_hidden_layers": 1}))
    model = linmu_models.convert(small.eval(), OPTIONS)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[5]])
    sizes = {}
    with torch.no_grad():
        model(input_ids=torch.tensor([tiny.text_ids(6)]), past_key_values=cache, use_cache=True)
        for step in range(1200):
            position = torch.tensor([[6 + step]])
            ids = model(input_ids=ids, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)
            sizes[step] = state_bytes(cache)
    assert sizes[10] == sizes[1199] and cache.get_seq_length() == 1206
    layer = cache.layers[0].state
    assert (
        layer.ssm.shape == (1, 4, 13, 12)
        and layer.keys.shape[2] == model.model.layers[0].self_attn.windows.state_tokens
    )


def test_the_step_does_not_depend_on_the_position():
    """Not the time, which is noise on a busy machine: the same ops on the same shapes after a prefix that has filled
    the window and one that is 100 000 tokens longer, whose state differs from it by its counts."""
    model = student("qwen2_5_vl", (), False)
    config = linmu_models.EXACT
    windows = model.linmu_layers()[0].self_attn.windows
    sizes = windows.sizes
    filled = config.text_window + config.sink_tokens + config.kept_tokens + sizes.leave
    shapes = []
    for more in (0, 100_000 // sizes.ring * sizes.ring):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([tiny.text_ids(filled + 20)]), past_key_values=cache, use_cache=True)
            for layer in cache.layers:
                layer.cumulative_length += more
                layer.state.seen.add_(more)
            ids = torch.full((3, 1, 1), cache.get_seq_length())
            # In plain PyTorch, whose shapes show what is read.
            with linmu_ops.use_impl("exact_step:reference"), Shapes() as seen:
                model(input_ids=torch.tensor([[5]]), past_key_values=cache, position_ids=ids)
        shapes.append(seen.calls)
    assert shapes[0] == shapes[1]
    assert any(windows.state_tokens in shape for _, made in shapes[0] for shape in made)


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Every op that ran and the shapes of what it made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.calls.append((str(func), made))
        return out


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_nothing_is_quadratic(family):
    """No op makes a tensor of L x L elements, with padding in the batch, in prefill and in a step after it."""
    model = student(family, (), False)
    length = 16384
    image = tiny.example(family, "image") or tiny.example(family, "text")
    fill = tiny.batch(tiny.text_ids(length - image["input_ids"].shape[1] - 8))
    rest = {k: v for k, v in image.items() if k not in ("input_ids", "attention_mask")}
    ids = torch.cat((torch.zeros(1, 8, dtype=torch.long), image["input_ids"], fill["input_ids"]), dim=1)
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in rest:
            rest[key] = torch.nn.functional.pad(rest[key], (8, length - 8 - rest[key].shape[1]))
    mask = torch.ones_like(ids)
    mask[:, :8] = 0
    with torch.no_grad(), Shapes() as seen:
        model.generate(input_ids=ids, attention_mask=mask, **rest, max_new_tokens=3, do_sample=False)
    largest = max((torch.Size(s).numel(), name, s) for name, shapes in seen.calls for s in shapes)
    # A head meets 644 keys at most: of the window, of what leaves with it, sinks, and what is kept after either of two
    # steps. A tiny model has 4 heads.
    assert largest[0] <= length * 4 * 644 < length * length / 6, largest
    assert not [s for _, shapes in seen.calls for s in shapes if sum(n >= length for n in s) > 1]


def test_the_step_compiles_once():
    model = linmu_models.convert(tiny.teacher("qwen2"), OPTIONS)
    counter = torch._dynamo.testing.CompileCounter()
    cache = tiny.hf.StaticCache(config=model.config, max_cache_len=64)
    plain = DynamicCache(config=model.config)
    prompt, steps = (
        torch.tensor([tiny.text_ids(6)]),
        [(torch.tensor([[20 + i]]), torch.tensor([[6 + i]])) for i in range(5)],
    )
    torch._dynamo.reset()
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=plain)
        expected = [model(input_ids=i, past_key_values=plain, position_ids=p).logits for i, p in steps]
        model(input_ids=prompt, past_key_values=cache)
        step = torch.compile(model, backend=counter, fullgraph=True)
        for (ids, position), logits in zip(steps, expected, strict=True):
            compiled = step(input_ids=ids, past_key_values=cache, position_ids=position).logits
            torch.testing.assert_close(compiled, logits, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    assert cache.get_seq_length() == 11


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family, keep", [("qwen2_5_vl", ()), ("gemma3", ()), ("smolvlm", ()), ("qwen2_5_vl", (1,))])
def test_fast_decode_gives_the_same_tokens_from_one_graph(family, keep):
    """Padded rows; a second, longer prompt reuses the graph of a linear model."""
    torch._dynamo.reset()
    model = linmu_models.convert(tiny.teacher(family), OPTIONS, keep_attention=keep)
    fast = linmu_models.fast_decode(backend="aot_eager", mode=None, fullgraph=True)
    first = graphs()
    rows = tiny.left_padded([tiny.example(family, "images"), tiny.example(family, "image")])
    for more in (0, 3):
        rows = tiny.longer(rows, torch.nn.functional.pad(rows["input_ids"], (0, more), value=9))
        expected = model.generate(**rows, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(**rows, max_new_tokens=6, do_sample=False, **fast), expected)
        # The keys of layers with attention are as long as prompt and answer.
        assert graphs() == first + (2 if keep and more else 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_masks_of_a_step_look_the_same_at_every_length(batch):
    """A step is compiled for the strides of what it is given, too."""
    seen = set()
    for length in (9, 10):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[:, 0] = 0
        for keep in ((), (1,)):
            made = student("qwen2_5_vl", keep).prepare_inputs_for_generation(
                torch.full((batch, length), 5), attention_mask=mask, next_sequence_length=1,
                past_key_values=tiny.hf.StaticCache(config=student("qwen2_5_vl", keep).config, max_cache_len=12),
            )  # fmt: skip
            given = made.get("linmu_padding", made["attention_mask"])
            seen.add((tuple(given.shape), given.stride()))
    assert seen == {((batch, 1), (1, 1))}


def test_fast_decode_with_beams():
    torch._dynamo.reset()
    model, inputs = student("qwen2_5_vl"), tiny.example("qwen2_5_vl", "images")
    beams = dict(max_new_tokens=5, do_sample=False, num_beams=2)
    fast = linmu_models.fast_decode(backend="eager", mode=None)
    assert torch.equal(model.generate(**inputs, **beams, **fast), model.generate(**inputs, **beams))


def test_fast_decode_with_the_default_compiler():
    torch._dynamo.reset()
    small = tiny.hf.Qwen2ForCausalLM(tiny.hf.Qwen2Config(**{**tiny.SIZES, "num_hidden_layers": 1}))
    model, inputs = linmu_models.convert(small.eval()), tiny.example("qwen2", "text")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    before = graphs()
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=6, do_sample=False, **linmu_models.fast_decode()), expected
    )
    assert graphs() == before + 1
