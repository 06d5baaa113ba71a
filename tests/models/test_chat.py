"""The ids of prompts and training rows are those of transformers' own `apply_chat_template(tokenize=True)`, for every
kind of template, tokenizer and processor."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from linmu_models.chat import IGNORE, SLOT, ChatProcessor, Conversation, adds_special_tokens, to_model
from linmu_models.media import Clip

from . import tiny

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<end>", "<image>", "<boi>", "<eoi>", "<break>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'video') %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TRIMMED = PARTS.replace("{{ c['text'] }}", "{{ c['text'] | trim }}").replace(
    "{{ m['content'] }}", "{{ m['content'] | trim }}"
)
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m['role'] }}: " + PARTS + " {% endfor %}{% if add_generation_prompt %}"
    "assistant:{% endif %}",
    "bos": "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: " + PARTS + "<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "trimmed": "{% for m in messages %}[{{ m['role'] }}]" + TRIMMED + "<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    # As those of models that think: what stands before a mark is left out of turns that are over.
    "thinking": "{% for m in messages %}<end>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{% for c in ([{'type': 'text', 'text': m['content']}] if m['content'] is string else m['content']) %}"
    "{{ c['text'].split('</think>')[-1].lstrip('\n') }}{% endfor %}{% else %}" + PARTS + "{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<end>assistant\n{% endif %}",
}  # fmt: skip
ADDED = {
    "none": None,
    "bos": "<bos> $A",
    "both": "<bos> $A <eos>",
    "end": "$A <eos>",
}


def tokenizer(added="none", pieces="characters"):
    """Of characters, of pieces that begin with a space (as Llama's), or of bytes (as Qwen's)."""
    words = [chr(i) for i in range(32, 127)] + [
        "\n",
        "▁",
        "▁a",
        "▁w",
        "wh",
        "an",
        "sw",
        "er",
        "ant",
        ": ",
        "▁yes",
        "es",
    ]
    vocab = {t: i for i, t in enumerate([*SPECIAL, *words])}
    if pieces == "characters":
        inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    elif pieces == "spaces":
        merges = [("w", "h"), ("a", "n"), ("s", "w"), ("e", "r"), ("an", "t"), ("▁", "a"), ("e", "s")]
        inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {t: i for i, t in enumerate([*SPECIAL, *alphabet, "wh", "an", "Ġa", "Ġw", "ant", "es"])}
        merges = [("w", "h"), ("a", "n"), ("Ġ", "a"), ("Ġ", "w"), ("an", "t"), ("e", "s")]
        inner = Tokenizer(models.BPE(vocab, merges))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if ADDED[added]:
        ids = [(t, vocab[t]) for t in ("<bos>", "<eos>") if t in ADDED[added]]
        inner.post_processor = processors.TemplateProcessing(single=ADDED[added], special_tokens=ids)
    inner.add_special_tokens(SPECIAL)
    named = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    extra = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=extra, clean_up_tokenization_spaces=False, **named
    )


class AddsNothing(hf.LlavaProcessor):
    """Never lets its tokenizer add special tokens, as LFM2-VL's, whose images need torchvision."""

    text_kwargs = {"add_special_tokens": False}  # noqa: RUF012  # as transformers declares it


def llava(tokens, template, kind=hf.LlavaProcessor):
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return kind(
        image_processor=images, tokenizer=tokens, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=template.replace("IMAGE", "<image>"),
    )  # fmt: skip


def llava_next(tokens, template):
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56], [56, 28]]
    )
    return hf.LlavaNextProcessor(
        image_processor=images, tokenizer=tokens, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=template.replace("IMAGE", "<image>"),
    )  # fmt: skip


def gemma3(tokens, template):
    images = hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return hf.Gemma3Processor(images, tokens, template.replace("IMAGE", "<boi>"), image_seq_length=3)


def pixtral(tokens, template):
    pytest.importorskip("torchvision")
    images = hf.PixtralImageProcessorPil(patch_size=14, size={"longest_edge": 56})
    return hf.PixtralProcessor(
        images, tokens, patch_size=14, spatial_merge_size=1, chat_template=template.replace("IMAGE", "<image>"),
        image_token="<image>", image_break_token="<break>", image_end_token="<eoi>",
    )  # fmt: skip


KINDS = {
    "llava": llava,
    "adds_nothing": partial(llava, kind=AddsNothing),
    "llava_next": llava_next,
    "gemma3": gemma3,
    "mistral3": pixtral,
}


def picture(seed, height=40, width=60):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def messages(turns, pictures=(), system="", parts=True):
    """As a user of transformers writes them; each `SLOT` is the next picture."""
    pictures = iter(pictures)

    def content(text):
        if not parts:
            return text
        out = []
        for i, piece in enumerate(text.split(SLOT)):
            out += [{"type": "image", "image": Image.fromarray(next(pictures))}] if i else []
            out += [{"type": "text", "text": piece}] if piece else []
        return out

    rows = [{"role": "system", "content": content(system)}] if system else []
    for question, answer in turns:
        rows.append({"role": "user", "content": content(question)})
        if answer is not None:
            rows.append({"role": "assistant", "content": content(answer)})
    return rows


def theirs(speaker, rows, asks):
    found = speaker.apply_chat_template(rows, tokenize=True, return_dict=True, add_generation_prompt=asks)["input_ids"]
    return list(found[0] if isinstance(speaker, hf.ProcessorMixin) else found)


PROMPTS = {
    "text": ((("what?", None),), 0, ""),
    "image": (((f"{SLOT}what?", None),), 1, ""),
    "images": (((f"{SLOT} and {SLOT}what?", None),), 2, "be brief"),
    "turns": (((f"{SLOT}what?", "an answer"), ("and a what?", None)), 1, ""),
    "system": ((("what?", " an answer\n"), ("why?", "<t>x</think>\n\nyes"), ("who?", None)), 0, "say yes"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts(kind, template):
    for added, pieces, (turns, count, system) in itertools.product(
        ADDED, ("characters", "spaces", "bytes"), PROMPTS.values()
    ):
        pictures = [picture(i) for i in range(count)]
        want = theirs(
            KINDS[kind](tokenizer(added, pieces), TEMPLATES[template]), messages(turns, pictures, system), True
        )
        speaker = KINDS[kind](tokenizer(added, pieces), TEMPLATES[template])
        mine = ChatProcessor(speaker.tokenizer, kind, speaker, speaker.image_processor)
        conversation = Conversation(turns, tuple(Clip(p[None]) for p in pictures), system)
        assert mine.prompts([conversation])["input_ids"][0].tolist() == want, (added, pieces, turns)
        if kind != "gemma3":  # whose processor does not count the text that it puts around an image
            shown = sum(mine.media_tokens(None, *p.shape[:2]) - 1 for p in pictures)
            assert mine.text_tokens(conversation) == len(want) - shown
        if len(turns) == 1 and not system and turns[0][0].startswith(SLOT * count):
            asked = mine.ask(turns[0][0].replace(SLOT, ""), conversation.media)
            assert asked["input_ids"][0].tolist() == want


TRAINING = {
    "text": ((("what?", "an answer"),), 0, ""),
    "turns": (((f"{SLOT}what?", "yes"), ("and?", "what a\nanswer"), ("who?", "a")), 1, "be brief"),
    "spaces": ((("what?", " yes yes \n"), ("yes", "yes")), 0, ""),
    "thinks": ((("what?", "<t>a</think>\n\nyes"), ("why?", "<t>b</think>\n\nno")), 0, ""),
}


def spoken(tokens, labels, ends):
    """The texts of runs of labels, without the token that ends each."""
    runs = [list(run) for marked, run in itertools.groupby(labels, lambda x: x != IGNORE) if marked]
    assert all(run[-1] in ends for run in runs)
    return [tokens.decode(run[:-1]).strip() for run in runs]


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_training_rows(kind, template):
    """Labels are the answers, each with the token that ends it, which is put in where the template writes none."""
    for added, pieces, (turns, count, system) in itertools.product(
        ADDED, ("characters", "spaces", "bytes"), TRAINING.values()
    ):
        tokens = tokenizer(added, pieces)
        ends = frozenset(tokens.convert_tokens_to_ids(["<end>", "<eos>"]))
        if kind == "llama":
            turns = tuple((question.replace(SLOT, ""), answer) for question, answer in turns)
            tokens.chat_template, count, speaker = TEMPLATES[template], 0, None
            want = theirs(tokens, messages(turns, (), system, parts=False), False)
            mine = ChatProcessor(tokens, kind, ends=ends)
        else:
            rows = messages(turns, [picture(i) for i in range(count)], system)
            want = theirs(KINDS[kind](tokenizer(added, pieces), TEMPLATES[template]), rows, False)
            speaker = KINDS[kind](tokens, TEMPLATES[template])
            mine = ChatProcessor(speaker.tokenizer, kind, speaker, speaker.image_processor, ends)
        batch = mine([Conversation(turns, tuple(Clip(picture(i)[None]) for i in range(count)), system)])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        if template == "plain":
            eos = tokens.eos_token_id
            assert ids.count(eos) - want.count(eos) in (len(turns), len(turns) - (added in ("both", "end")))
            ids = [t for t, label in zip(ids, labels, strict=True) if label != eos or ids.count(eos) == want.count(eos)]
            want = [t for t in want if t != eos] + [eos] * want.count(eos)
            ids = [t for t in ids if t != eos] + [eos] * want.count(eos)
        assert ids == want, (added, pieces, turns)
        shown = [a.strip() for _, a in turns]
        if template == "thinking":
            shown = [a.split("</think>")[-1].strip() for a in shown[:-1]] + shown[-1:]
        said = spoken(tokens, labels, ends)
        if pieces == "spaces":  # their decoder puts no space before a text's first word
            said, shown = ([x.replace(" ", "") for x in texts] for texts in (said, shown))
        assert said == shown, (added, pieces, turns)


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_models(template):
    for added, pieces in itertools.product(ADDED, ("characters", "spaces", "bytes")):
        tokens = tokenizer(added, pieces)
        tokens.chat_template = TEMPLATES[template]
        want = theirs(tokens, messages((("what?", None),), parts=False), True)
        assert ChatProcessor(tokens, "llama").ask("what?")["input_ids"][0].tolist() == want


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_without_a_template_and_outside_of_one(kind):
    """What has no template, and plain text to train on, is as the tokenizer alone makes it."""
    for added, pieces in itertools.product(ADDED, ("characters", "spaces", "bytes")):
        tokens = tokenizer(added, pieces)
        speaker = llava(tokens, "x") if kind == "llava" else None
        if speaker is not None:
            speaker.chat_template = None
        mine = ChatProcessor(tokens, kind, speaker, speaker and speaker.image_processor)
        assert mine.ask("what an answer")["input_ids"][0].tolist() == tokens("what an answer")["input_ids"]
        batch = mine([Conversation((("", "what an answer"),))])
        assert batch["input_ids"][0].tolist() == tokens("what an answer")["input_ids"]
        said = [t for t in batch["labels"][0].tolist() if t != IGNORE]
        assert said == tokens("what an answer", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", ["plain", "bos", "trimmed"])
def test_grids_of_images_and_videos(template):
    """The Qwen2-VL kind, whose processor transformers has with torchvision only: the same text, tokenized alike."""
    text = TEMPLATES[template].replace("IMAGE", "{{ '<|video_pad|>' if c['type'] == 'video' else '<|image_pad|>' }}")
    frames = np.stack([picture(i, 56, 56) for i in range(3)])
    for added in ADDED:
        tokens = tokenizer(added)
        tokens.chat_template = text
        images = hf.Qwen2VLImageProcessorPil(patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
        mine = ChatProcessor(tokens, "qwen2_5_vl", image_processor=images)
        rows = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "what?"}]}]
        rendered = tokens.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        begins = rendered.startswith("<bos>")
        rendered = rendered.replace("<|image_pad|>", "<|image_pad|>" * 4).replace("<|video_pad|>", "<|video_pad|>" * 8)
        want = tokens(rendered, add_special_tokens=not begins)["input_ids"]
        got = mine.ask("what?", [Clip(frames[:1]), Clip(frames, 1.0)])
        assert got["input_ids"][0].tolist() == want
        assert (got["mm_token_type_ids"][0] == 1).sum() == 4 and (got["mm_token_type_ids"][0] == 2).sum() == 8


def test_a_batch_of_prompts_is_padded_on_the_left():
    speaker = llava(tokenizer("bos"), TEMPLATES["plain"])
    mine = ChatProcessor(speaker.tokenizer, "llava", speaker, speaker.image_processor)
    long, short = Conversation((("what a day", None),)), Conversation((("no", None),))
    batch = mine.prompts([long, short])
    row = mine.prompts([short])["input_ids"][0]
    assert torch.equal(batch["input_ids"][1, -len(row) :], row) and batch["attention_mask"][1].sum() == len(row)
    assert batch["input_ids"][1, 0] == speaker.tokenizer.pad_token_id
    assert mine([long, short])["attention_mask"][1, -1] == 1 or mine([short, long])["attention_mask"][0, -1] == 0


def test_a_slow_tokenizer():
    class Slow:
        """No offsets."""

        is_fast = False

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

    for added in ADDED:
        rows = []
        for wrap in (lambda t: t, Slow):
            tokens = wrap(tokenizer(added, "bytes"))
            tokens.inner if wrap is Slow else tokens  # noqa: B018
            getattr(tokens, "inner", tokens).chat_template = TEMPLATES["bos"]
            ends = frozenset([tokens.convert_tokens_to_ids("<end>")])
            rows.append(ChatProcessor(tokens, "llama", ends=ends)([Conversation((("what?", "an answer"), ("a", "b")))]))
        assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])


def test_a_tokenizer_speaks_for_itself():
    tokens = tokenizer("bos")
    assert not adds_special_tokens(tokens, "what?")
    speaker = llava(tokens, TEMPLATES["plain"])
    assert adds_special_tokens(speaker, "what?") and not adds_special_tokens(speaker, "<bos>what?")


def test_only_pixels_take_the_dtype_of_the_model():
    class Model:
        device, dtype = torch.device("cpu"), torch.bfloat16

    seconds = torch.tensor([2 / 1.9])
    inputs = {
        "input_ids": torch.tensor([[1]]), "pixel_values": torch.ones(1, 3), "pixel_values_videos": torch.ones(1, 3),
        "second_per_grid_ts": seconds, "image_sizes": torch.tensor([[3, 4]]),
        "pixel_attention_mask": torch.ones(1).bool(),
    }  # fmt: skip
    out = to_model(inputs, Model())
    kinds = {name: value.dtype for name, value in out.items()}
    assert kinds["pixel_values"] == kinds["pixel_values_videos"] == torch.bfloat16
    assert torch.equal(out["second_per_grid_ts"], seconds) and kinds["input_ids"] == torch.int64
    assert kinds["pixel_attention_mask"] == torch.bool


def test_a_folder_asks_as_transformers_does(tmp_path):
    """From a saved model: LLaVA-1.5's kind, whose template has no BOS and whose tokenizer adds one."""
    tiny.teacher("llava").save_pretrained(tmp_path)
    llava(tokenizer("bos"), TEMPLATES["plain"]).save_pretrained(tmp_path)
    rows = messages((("what?", None),))
    want = theirs(hf.AutoProcessor.from_pretrained(tmp_path), rows, True)
    assert want[0] == 1
    assert ChatProcessor.load(tmp_path).ask("what?")["input_ids"][0].tolist() == want


def test_answers_do_not_belong_to_a_prompt_that_sees_itself():
    tokens = tokenizer()
    tokens.chat_template = TEMPLATES["plain"]
    chat = ChatProcessor(tokens, "paligemma")
    batch = chat([Conversation((("what?", "an answer"),)), Conversation((("a", "b"), ("c", "d")))])
    for kinds, labels in zip(batch["token_type_ids"], batch["labels"], strict=True):
        first = int((labels != IGNORE).nonzero()[0])
        assert not kinds[:first].any() and kinds[first:].all()
    assert not chat.ask("what?")["token_type_ids"].any()
    assert "token_type_ids" not in ChatProcessor(tokens, "llama").ask("what?")
