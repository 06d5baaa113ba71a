"""Every family: where its visual tokens are found, that its blocks start as its attention, that it generates."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

import linmu_models
from linmu_models.hooks import attention_modules, rotary_pair
from linmu_ops import MMATE, ExactConfig

from . import tiny

TEXT = ("llama", "qwen2", "qwen3", "qwen3_5_text")
VISUAL = [f for f in tiny.BUILDERS if f not in TEXT]
# Some layers are linear in the teacher. The others have output gates, for which the paper's block has no place.
HYBRID = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text")
# The paper's block has no place for norms of values either.
EXACT_ONLY = (*HYBRID, "gemma4")


@functools.cache
def student(family):
    return linmu_models.convert(tiny.teacher(family))


def richest(family):
    return next(b for kind in ("video", "images", "image", "text") if (b := tiny.example(family, kind)) is not None)


BLOCKS = {
    "qwen2_vl": ([(1, 2, 3), (1, 3, 4)], [(3, 2, 3)]),
    "qwen2_5_vl": ([(1, 2, 3), (1, 3, 4)], [(1, 2, 2), (3, 2, 3)]),
    "qwen3_vl": ([(1, 2, 3), (1, 3, 4)], [(1, 2, 2), (3, 2, 3)]),
    "qwen3_5": ([(1, 2, 3), (1, 3, 4)], [(1, 2, 2), (3, 2, 3)]),
    "qwen3_5_moe": ([(1, 2, 3), (1, 3, 4)], [(1, 2, 2), (3, 2, 3)]),
    "qwen3_vl_moe": ([(1, 2, 3), (1, 3, 4)], [(1, 2, 2), (3, 2, 3)]),
    "lfm2_vl": ([(1, 2, 3), (1, 3, 4)], None),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe"), ([(1, 2, 3), (1, 3, 4)], [(3, 2, 3)])),
    "video_llama_3": ([(1, 2, 3), (1, 3, 4)], [(3, 2, 3)]),
    "llava": ([(1, 4, 4)] * 2, None),
    # 56 x 100 in 56 x 112 pixels leaves 4 x 8 patches; 112 x 90 in 112 x 112 leaves 8 x 6.
    "llava_next": ([(1, 4, 4), (1, 4, 8), (1, 4, 4), (1, 8, 6)], None),
    # At most 2 crops of 4 x 4: 8 x 6 shrinks by sqrt(48 / 32).
    "llava_onevision": ([(1, 4, 4), (1, 4, 8), (1, 4, 4), (1, 6, 4)], [(3, 2, 2)]),
    "internvl": ([(1, 2, 2)] * 3, None),
    "smolvlm": ([(1, 4, 6), (1, 2, 2)], None),
    "gemma3": ([(1, 2, 2)] * 2, None),
    "gemma4": ([(1, 2, 3), (1, 3, 4)], [(1, 2, 2), (3, 2, 3)]),
    "llama4": ([(1, 2, 2)] * 2, None),
    "paligemma": ([(1, 1, 38)], None),  # with the prompt, which they see
    "mistral3": ([(1, 2, 3), (1, 3, 4)], None),
}


@pytest.mark.parametrize("family", [*VISUAL, *tiny.TWINS])
def test_finds_its_visual_tokens(family):
    for kind, blocks in zip(("images", "video"), BLOCKS[family], strict=True):
        if blocks is None:
            assert tiny.example(family, kind) is None
            continue
        inputs = tiny.example(family, kind)
        layout = student(family).build_layout(inputs)
        assert [tuple(b[1:]) for b in layout.blocks.tolist()] == blocks
        placeholders = torch.isin(inputs["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
        newlines = 0
        if family in ("llava_next", "llava_onevision"):
            newlines = 1 if kind == "video" else sum(h for _, h, _ in blocks[1::2])
        if student(family).prompt_sees_itself:
            placeholders = inputs["token_type_ids"] == 0
        assert layout.num_visual == placeholders.sum() - newlines
        assert placeholders[0, layout.positions.tolist()].all()
    assert student(family).build_layout(tiny.example(family, "text")) is None


def test_other_ways_to_pass_images():
    # Several images of one row have no crops in LLaVA-OneVision: a base view and a newline each.
    ids = torch.tensor([[5, *[tiny.IMAGE] * 17, 6, *[tiny.IMAGE] * 17, 7]])
    given = dict(input_ids=ids, image_sizes=torch.tensor([[56, 100], [90, 60]]), batch_num_images=torch.tensor([2]))
    layout = student("llava_onevision").build_layout(given)
    assert layout.blocks[:, 1:].tolist() == [[1, 4, 4]] * 2 and layout.positions[16] == 19
    # LLaVA with a Pixtral tower has images of any size, and a break (text) after each row.
    ids = torch.tensor([[5, *([tiny.IMAGE] * 3 + [304]) * 2, 7]])
    layout = student("llava").build_layout(dict(input_ids=ids, image_sizes=torch.tensor([[28, 42]])))
    assert layout.blocks.tolist() == [[0, 1, 2, 3]] and layout.positions.tolist() == [1, 2, 3, 5, 6, 7]
    # Without ids, placeholders are found by their embedding.
    model, inputs = student("qwen2_5_vl"), tiny.example("qwen2_5_vl", "images")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    assert repr(model.build_layout({**rest, "inputs_embeds": embeds})) == repr(model.build_layout(inputs))


def attention_inputs(model, inputs, layer):
    """What layer `layer`'s attention is called with."""
    seen = {}
    attention = attention_modules(model)[layer]
    hook = attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen


@pytest.mark.parametrize("family", [f for f in VISUAL if f not in EXACT_ONLY])
def test_windows_start_as_attention_inside_windows(family):
    teacher, inputs = tiny.teacher(family), richest(family)
    options = linmu_models.MMATEConfig(window=(2, 2, 2), image_window=(1, 2, 2))
    linear = linmu_models.convert(teacher, options)
    layout = linear.build_layout(inputs)
    length = inputs["input_ids"].shape[1]
    for layer in (0, 1):
        seen = attention_inputs(teacher, inputs, layer)
        window = torch.full((length,), -1)
        image = (1, 1, 16 + 4) if linear.prompt_sees_itself else (1, 2, 2)
        table = layout.window_table((2, 2, 2), (1, 1, 1) if layer else (0, 0, 0), image_window=image,
                                    image_shift=tuple(n // 2 for n in image) if layer else (0, 0, 0))  # fmt: skip
        for i, (a, b) in enumerate(zip(table.offsets[:-1], table.offsets[1:], strict=True)):
            window[table.tokens[a:b].long()] = i
        allowed = (window[:, None] == window) | torch.eye(length, dtype=torch.bool)
        attention = copy.deepcopy(attention_modules(teacher)[layer])
        attention.config._attn_implementation_internal = "sdpa"
        with torch.no_grad():
            without = {k: v for k, v in seen.items() if k not in ("cache", "past_key_values")}
            expected, _ = attention(**{**without, "attention_mask": allowed[None, None]})
            block = attention_modules(linear)[layer]
            block.scan_enabled = False
            got = MMATE.forward(
                block,
                seen["hidden_states"],
                layout=layout,
                position_embeddings=rotary_pair(seen["position_embeddings"]) if block.rotates else None,
            )
        at = layout.positions.tolist()
        torch.testing.assert_close(got[:, at], expected[:, at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", list(tiny.EVERY))
def test_cached_is_uncached(family):
    model, inputs = student(family), richest(family)
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    cached = model.generate(**inputs, **options)
    uncached = model.generate(**inputs, **options, use_cache=False)
    kinds = [isinstance(layer, linmu_models.LinmuCacheLayer) for layer in cached.past_key_values.layers]
    attention = attention_modules(model)
    assert kinds == [i in attention for i in range(len(kinds))]
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_every_way_of_decoding(family):
    """Sampling, beams, several images, text alone, a chat that keeps its cache: cached is uncached. No assistants."""
    model, text = student(family), tiny.example(family, "text")
    rows = text if family not in VISUAL else tiny.left_padded([tiny.example(family, k) for k in ("images", "image")])
    greedy = dict(max_new_tokens=3, do_sample=False)
    # transformers mixes up a row's several images when it repeats them for GLM4V's beams, and repeats none for Llama
    # 4's: the teacher's, too.
    beamed = {"glm4v": tiny.example("glm4v", "image"), "llama4": text}.get(family, rows)
    ways = [(rows, dict(max_new_tokens=3, do_sample=True)), (beamed, dict(greedy, num_beams=2)), (text, greedy)]
    for inputs, how in ways:
        outs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            outs.append(model.generate(**inputs, **how, use_cache=use_cache))
        assert torch.equal(*outs), how
    # After a video, transformers' own positions of a second turn are off by one in Qwen2.5-VL: the teacher's, too.
    cache, first = DynamicCache(config=model.config), tiny.example(family, "images" if family in VISUAL else "text")
    said = model.generate(**first, **greedy, past_key_values=cache)
    whole = tiny.longer(first, torch.cat((said, torch.tensor([tiny.text_ids(5, 7)])), dim=1))
    turn = {k: v for k, v in whole.items() if "pixel" not in k}  # in the cache already; the grids may stay
    assert torch.equal(model.generate(**turn, **greedy, past_key_values=cache), model.generate(**whole, **greedy))
    assert torch.equal(model.generate(**first, **greedy, prompt_lookup_num_tokens=2), said)


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_left_padded_rows_are_each_alone(family):
    """Of text as well, where transformers counts padding as positions: what is far from a token must count."""
    model = linmu_models.convert(tiny.teacher(family), ExactConfig(**tiny.NARROW))
    text = [tiny.batch(tiny.text_ids(n)) for n in (40, 24)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scan." in name or "share." in name:
                parameter.add_(torch.randn_like(parameter) + 4 * name.endswith("share.bias"))
        for rows in (text, *([[tiny.example(family, kind) for kind in ("images", "image")]] * (family in VISUAL))):
            alone = [model(**row).logits[0] for row in rows]
            together = model(**tiny.left_padded(rows)).logits
            for row, logits in zip(together, alone, strict=True):
                torch.testing.assert_close(row[-len(logits) :], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", list(tiny.BUILDERS))
def test_text_sees_no_later_token(family):
    model, inputs = student(family), richest(family)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, -2] = 7
    with torch.no_grad():
        before, after = model(**inputs).logits, model(**changed).logits
    assert torch.equal(before[:, :-2], after[:, :-2])
    assert not torch.equal(before[:, -2:], after[:, -2:])


@pytest.mark.parametrize("family", list(tiny.EVERY))
def test_saves_and_loads_bit_for_bit(family, tmp_path):
    model, inputs = student(family), richest(family)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    auto = getattr(tiny.hf, model.auto_class)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    loaded = tiny.aligned(loaded)
    assert type(loaded) is type(model)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        half = tiny.aligned(auto.from_pretrained(tmp_path, dtype=torch.bfloat16))
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        half.save_pretrained(tmp_path / "half")
        again = tiny.aligned(auto.from_pretrained(tmp_path / "half"))
        assert torch.equal(again(**inputs).logits, half(**inputs).logits)
