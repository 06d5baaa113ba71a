"""Makes a model's inputs and labels from conversations, by the chat template of its processor.

Most processors need torchvision to take videos. Where one cannot, the tensors of the Qwen2-VL kind are made here, and
for other models the frames are passed as images.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, GenerationConfig, ProcessorMixin

from .config import sees_images
from .loading import told
from .media import Clip

IGNORE = -100
SLOT = "\ufffc"
"""In the text of a turn: the next image or video stands here."""

# Marks the ends of answers in rendered text; of no meaning to any tokenizer, as it is taken out before.
_MARK = "\ue000"
# Families whose pixels are a list of patches with (t, h, w) grids; their videos need no video processor.
_GRIDS = ("qwen2_vl", "qwen2_5_vl")
_SEE_PROMPTS = ("paligemma",)  # all tokens of type 0 see each other, an answer among them


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, and the images and videos that they are about."""

    turns: tuple[tuple[str, str | None], ...]
    """(question, answer) pairs; None as the last answer asks for it. The `SLOT`s in the questions stand for the media,
    in order. One turn whose question is empty and that has no media is plain text, outside any chat template: every
    token of it is supervised."""
    media: tuple[Clip, ...] = ()
    system: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether this is plain text rather than a conversation."""
        return len(self.turns) == 1 and not self.turns[0][0] and not self.media


def end_tokens(generation_config: GenerationConfig | None, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: of a chat often others than the tokenizer's end of sequence."""
    named = getattr(generation_config, "eos_token_id", None)
    return frozenset([tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]) - {None}


def to_model(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A processor's tensors on the model's device, pixels in its dtype. Other numbers keep theirs: bfloat16 has no
    room for the seconds that position ids are made of."""
    return {
        name: value.to(model.device, model.dtype)
        if name.startswith("pixel_values") and value.is_floating_point()
        else value.to(model.device)
        for name, value in inputs.items()
    }


def adds_special_tokens(speaker: Any, text: str) -> bool:
    """Whether transformers' `apply_chat_template(tokenize=True)` lets the tokenizer add its special tokens to `text`,
    which `speaker`, a processor or a tokenizer, has rendered: a processor does, unless its template begins with one, or
    it never does."""
    if not isinstance(speaker, ProcessorMixin):
        return False
    begin = speaker.tokenizer.bos_token
    if begin is not None and text.startswith(begin):
        return False
    kinds: Any = speaker.valid_processor_kwargs
    by_itself = speaker._merge_kwargs(kinds, tokenizer_init_kwargs=speaker.tokenizer.init_kwargs)  # LFM2-VL's: no
    return bool(by_itself["text_kwargs"].get("add_special_tokens", True))


class _Segments:
    """A tokenizer for marked text: the ids are those of the text without marks, and what stands in marks is labelled.

    It takes a tokenizer's place inside a processor, which expands its image tokens and knows nothing of this.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self.labels: list[list[int]] = []
        self.rows: list[dict[str, bool]] | None = None
        """For each text of the next call, arguments of `encode_row`; None: the defaults."""
        self.padding_side = "right"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_row(self, text: str, special: bool = True, close: bool = True) -> tuple[list[int], list[int]]:
        """Ids and labels of one marked text; `special`: the tokenizer adds its special tokens. Each answer ends with
        what the template writes after it, where that ends a generation, else, if `close`, with an end of sequence."""
        parts = text.split(_MARK)
        bounds = list(itertools.accumulate(map(len, parts), initial=0))
        spans = list(itertools.pairwise(bounds))[1::2]
        ids, places = self._encode("".join(parts), special, spans)
        labels, added = [IGNORE] * len(ids), []
        for i, (first, end) in enumerate(places):
            labels[first:end] = ids[first:end]
            if 2 * i + 2 == len(parts):  # plain text, which goes on
                continue
            if end < len(ids) and ids[end] in self._ends:
                labels[end] = ids[end]
            elif close:
                added.append(end)
        for end in reversed(added):
            ids.insert(end, self._tokenizer.eos_token_id)
            labels.insert(end, self._tokenizer.eos_token_id)
        return ids, labels

    def _encode(
        self, text: str, special: bool, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each span of characters the first token that has any of them, and the first one after it."""
        if not self._tokenizer.is_fast:
            ids = list(self._tokenizer.encode(text, add_special_tokens=special))

            def tokens_of(at: int) -> int:
                begun = self._tokenizer.encode(text[:at], add_special_tokens=special)
                return sum(
                    1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(begun, ids, strict=False))
                )

            return ids, [(tokens_of(a), tokens_of(b)) for a, b in spans]
        found = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        last = len(ids)  # what the tokenizer adds at the end is of no text
        while special and last and tuple(offsets[last - 1]) == (0, 0):
            last -= 1
        places, at = [], 0
        for begin, stop in spans:
            first = at = next((t for t in range(at, last) if offsets[t][1] > begin), last)
            at = next((t for t in range(at, last) if offsets[t][0] >= stop), last)
            places.append((first, at))
        return ids, places

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, list[list[int]]]:
        rows, self.labels = [], []
        texts = [text] if isinstance(text, str) else text
        for one, options in zip(texts, self.rows or [{}] * len(texts), strict=True):
            ids, labels = self.encode_row(
                one, **{**options, "special": add_special_tokens and options.get("special", True)}
            )
            rows.append(ids)
            self.labels.append(labels)
        return self.pad(rows)

    def pad(self, rows: list[list[int]]) -> dict[str, list[list[int]]]:
        """Rows, and the labels of the last call, padded to one length."""
        longest = max(map(len, rows))

        def padded(row: list[int], fill: int) -> list[int]:
            more = [fill] * (longest - len(row))
            return more + row if self.padding_side == "left" else row + more

        self.labels = [padded(row, IGNORE) for row in self.labels]
        return {
            "input_ids": [padded(row, self._tokenizer.pad_token_id) for row in rows],
            "attention_mask": [padded([1] * len(row), 0) for row in rows],
        }


def _marked(answer: str) -> str:
    return f"{_MARK}{answer}{_MARK}"


def _marked_within(answer: str) -> str:
    """White space at its ends, which a template may cut, stays outside."""
    core = answer.strip()
    start = answer.find(core)
    return f"{answer[:start]}{_MARK}{core}{_MARK}{answer[start + len(core) :]}"


def _marked_end(answer: str) -> str:
    end = len(answer.rstrip())
    return f"{answer[:end]}{_MARK}{answer[end:]}"


@dataclass
class ChatProcessor:
    """What a model takes, from conversations. Make one with `ChatProcessor.load`."""

    tokenizer: Any
    model_type: str
    processor: Any = None
    """The teacher's own processor; None for text-only models and those whose tensors are made here."""
    image_processor: Any = None
    ends: frozenset[int] = frozenset()
    """Tokens that end a generation, beside the tokenizer's end of sequence."""
    _segments: _Segments = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._segments = _Segments(self.tokenizer, self.ends | {self.tokenizer.eos_token_id})
        if self.processor is not None:
            self.processor.tokenizer = self._segments
        self._image_tokens = functools.lru_cache(maxsize=4096)(self._count_image_tokens)

    @classmethod
    def load(cls, folder: Any) -> ChatProcessor:
        """The processor of a model's folder, or of a model on the hub."""
        with told(os.fspath(folder)):
            return cls._read(folder)

    @classmethod
    def _read(cls, folder: Any) -> ChatProcessor:
        config = AutoConfig.from_pretrained(folder)
        kind = config.model_type.removeprefix("linmu_")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        try:
            generation = GenerationConfig.from_pretrained(folder)
        except OSError:  # it has none
            generation = None
        named = getattr(generation, "eos_token_id", None)
        if not all(e is None or type(e) is int for e in (named if isinstance(named, list) else [named])):
            raise ValueError(f"{folder}: eos_token_id of generation_config.json must be tokens' numbers, got {named!r}")
        ends = end_tokens(generation, tokenizer)
        if not sees_images(config):
            return cls(tokenizer, kind, ends=ends)
        if kind in _GRIDS:
            template = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template")
            tokenizer.chat_template = template or tokenizer.chat_template
            return cls(tokenizer, kind, image_processor=AutoImageProcessor.from_pretrained(folder), ends=ends)
        processor = AutoProcessor.from_pretrained(folder)
        return cls(tokenizer, kind, processor, processor.image_processor, ends)

    # -- what it can do ------------------------------------------------------------------------------------------

    @property
    def takes_media(self) -> bool:
        """Whether the model sees images."""
        return self.image_processor is not None

    @property
    def speaks(self) -> bool:
        """Whether it has a chat template."""
        return self._speaker is not None

    @property
    def takes_videos(self) -> bool:
        """Whether videos go in as videos; else their frames go in as images."""
        return self.model_type in _GRIDS or getattr(self.processor, "video_processor", None) is not None

    @functools.cached_property
    def reserved(self) -> re.Pattern[str]:
        """What must not occur in the text of a conversation: special tokens, marks."""
        tokens = {*self.tokenizer.all_special_tokens, _MARK, self._token("image"), self._token("video")} - {""}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))

    def _token(self, kind: str) -> str:
        if self.model_type in _GRIDS:
            return f"<|{kind}_pad|>"
        return getattr(self.processor, f"{kind}_token", None) or ""

    @property
    def _speaker(self) -> Any:
        return next((p for p in (self.processor, self.tokenizer) if getattr(p, "chat_template", None)), None)

    # -- lengths -------------------------------------------------------------------------------------------------

    def media_tokens(self, frames: int | None, height: int, width: int) -> int:
        """Tokens of an image (`frames` is None) or a video of so many frames."""
        if frames is None:
            return self._image_tokens(height, width)
        if self.model_type in _GRIDS:
            return -(-frames // self.image_processor.temporal_patch_size) * self._image_tokens(height, width)
        if self.takes_videos:
            found = self.processor._get_num_multimodal_tokens(video_sizes=[(frames, height, width)])
            return int(found["num_video_tokens"][0])
        return frames * self._image_tokens(height, width)

    def _count_image_tokens(self, height: int, width: int) -> int:
        if self.model_type in _GRIDS:
            patches = self.image_processor.get_number_of_image_patches(height, width, {})
            return int(patches) // self.image_processor.merge_size**2
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        if count is not None:
            return int(count(image_sizes=[(height, width)])["num_image_tokens"][0])
        import numpy as np

        blank = np.zeros((height, width, 3), dtype=np.uint8)
        return len(self.processor(text=[self._token("image")], images=[[blank]])["input_ids"][0])

    def text_tokens(self, conversation: Conversation) -> int:
        """Tokens of a conversation without its media; one for each of their slots."""
        text = self._render(conversation)
        return len(self._segments.encode_row(text, **self._options(text, conversation))[0])

    # -- tensors -------------------------------------------------------------------------------------------------

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """A batch, padded on the right.

        Returns:
            What the model takes, and `labels` `(B, L)` int64: the tokens of the answers, each with the token after it
            that ends it, and -100 elsewhere.

        Raises:
            ValueError: media for a model without eyes, or a conversation for one without a chat template.
        """
        return self._batch([self._render(c) for c in conversations], conversations)

    def _batch(self, texts: list[str], conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        media = [clip for c in conversations for clip in c.media]
        self._segments.rows = [self._options(t, c) for t, c in zip(texts, conversations, strict=True)]
        if media and not self.takes_media:
            raise ValueError(f"a {self.model_type} takes text only, got {len(media)} images or videos")
        if self.model_type in _GRIDS:
            batch = self._grid_batch(texts, media)
        elif self.processor is not None and media:
            batch = self._processor_batch(texts, conversations)
        else:
            batch = {name: torch.tensor(rows) for name, rows in self._segments(texts).items()}
        labels = torch.tensor(self._segments.labels)
        if self.model_type in _SEE_PROMPTS:
            batch["token_type_ids"] = ((labels != IGNORE).cumsum(1) > 0).long()
        return {**batch, "labels": labels}

    def prompts(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """What `generate` takes to answer the last question of each conversation, whose answer is None: a batch, padded
        on the left."""
        self._segments.padding_side = "left"
        try:
            batch = self(conversations)
        finally:
            self._segments.padding_side = "right"
        return {name: value for name, value in batch.items() if name != "labels"}

    def ask(self, question: str, media: Sequence[Clip] = ()) -> dict[str, Tensor]:
        """What `generate` takes to answer one question about media, which come before the words.

        Without a chat template, a model is given the media and the words as they are.

        Raises:
            ValueError: the words hold the model's token for an image or a video.
        """
        question = self._words(question)
        if self._speaker is not None:
            batch = self([Conversation(((SLOT * len(media) + question, None),), tuple(media))])
        elif any(clip.is_video for clip in media):
            raise ValueError("a video needs a processor with a chat template, got one without")
        else:
            text = self._token("image") * len(media) + question
            batch = self._batch([text], [Conversation((("", None),), tuple(media))])
        if not batch["input_ids"].numel():
            raise ValueError("chat template: it must make tokens of the words, got none")
        return {name: value for name, value in batch.items() if name != "labels"}

    def following(self, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
        """The tokens between the last answer of a conversation of text and the answer to the next question. Without a
        chat template they are the question's.

        Raises:
            ValueError: the template does not show where an answer ends, or the words hold the model's token for an
                image or a video.
        """
        text = self._words(question)
        if self._speaker is not None:
            before = [(asked.replace(SLOT, ""), said) for asked, said in turns]
            text, marks = self._render(Conversation((*before, (text, None)))), 2 * len(before)
            if text.count(_MARK) != marks:
                raise ValueError("chat template: it must write answers as they are, to go on after them, got others")
            text = text.split(_MARK)[-1]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _words(self, question: str) -> str:
        """A question without marks; an error where it stands for pixels."""
        words = question.replace(SLOT, "").replace(_MARK, "")
        for token in filter(None, map(self._token, ("image", "video"))):
            if token in words:
                raise ValueError(f"the words must not hold {token!r}, which stands for pixels")
        return words

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(i for i in (*self.ends, self.tokenizer.eos_token_id) if i is not None)

    def _options(self, text: str, conversation: Conversation) -> dict[str, bool]:
        """How a conversation's text becomes tokens: arguments of `_Segments.encode_row`."""
        begin, text = self.tokenizer.bos_token, text.replace(_MARK, "")
        if conversation.is_plain or self._speaker is None:
            special = True  # as the tokenizer does by itself
        elif self.model_type in _GRIDS:  # as the processor does that these stand for
            special = begin is None or not text.startswith(begin)
        else:
            special = adds_special_tokens(self._speaker, text)
        return {"special": special, "close": conversation.turns[-1][1] is not None}

    def _render(self, conversation: Conversation) -> str:
        """The text of a conversation, with marks around its answers."""
        if conversation.is_plain:
            return f"{_MARK}{conversation.turns[0][1]}"
        if self._speaker is None:
            raise ValueError(f"this {self.model_type} has no chat template: put a chat_template.jinja in its folder")
        answers = [answer for _, answer in conversation.turns if answer is not None]
        text = self._speak(conversation, answers)
        for mark in (_marked, _marked_within):
            marked = self._speak(conversation, [mark(answer) for answer in answers])
            if marked.replace(_MARK, "") == text and marked.count(_MARK) == 2 * len(answers):
                return marked
        # The template leaves out how an answer begins, such as its thoughts: mark as much of its end as there is.
        *pieces, rest = self._speak(conversation, [_marked_end(answer) for answer in answers]).split(_MARK)
        if len(pieces) != len(answers) or "".join((*pieces, rest)) != text:
            return text  # an answer that cannot be told from the template's words is not supervised
        out = ""
        for piece, answer in zip(pieces, answers, strict=True):
            end = answer.strip()
            same = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(reversed(piece), reversed(end), strict=False)
            )
            shown = piece[len(piece) - sum(1 for _ in same) :].lstrip()
            start = len(piece) - len(shown)
            out += f"{piece[:start]}{_MARK}{shown}{_MARK}"
        return out + rest

    def _speak(self, conversation: Conversation, answers: Sequence[str]) -> str:
        messages: list[dict[str, Any]] = []
        if conversation.system:
            messages.append({"role": "system", "content": self._content(conversation.system, None)})
        media, said = iter(conversation.media), iter(answers)
        for question, answer in conversation.turns:
            messages.append({"role": "user", "content": self._content(question, media)})
            if answer is not None:
                messages.append({"role": "assistant", "content": self._content(next(said), None)})
        asks = conversation.turns[-1][1] is None
        with told("chat template"):
            return self._speaker.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)

    def _content(self, text: str, media: Any) -> Any:
        if not self.takes_media:
            return text
        parts: list[dict[str, Any]] = []
        for i, piece in enumerate(text.split(SLOT)):
            if i:
                clip = next(media)
                as_video = clip.is_video and self.takes_videos
                shown = 1 if as_video or not clip.is_video else len(clip.frames)
                parts += [{"type": "video" if as_video else "image"}] * shown
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def _processor_batch(self, texts: list[str], conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        images: list[list[Any]] = []
        videos: list[Any] = []
        metadata: list[dict[str, Any]] = []
        for conversation in conversations:
            images.append([])
            for clip in conversation.media:
                if clip.is_video and self.takes_videos:
                    videos.append(clip.frames)
                    count = len(clip.frames)
                    metadata.append({"total_num_frames": count, "fps": clip.fps, "frames_indices": list(range(count))})
                else:
                    images[-1] += list(clip.frames)
        options: dict[str, Any] = {"text": texts, "return_tensors": "pt"}
        if any(images):
            options["images"] = images
        if videos:
            options |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        return dict(self.processor(**options))

    def _grid_batch(self, texts: list[str], media: list[Clip]) -> dict[str, Tensor]:
        pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
        grids: dict[str, list[Tensor]] = {"image": [], "video": []}
        seconds = []
        for clip in media:
            kind = "video" if clip.is_video else "image"
            patches, grid = grid_patches(self.image_processor, clip)
            pixels[kind].append(patches)
            grids[kind].append(grid)
            if clip.fps is not None:
                seconds.append(self.image_processor.temporal_patch_size / clip.fps)
        merge = self.image_processor.merge_size**2
        counts = {kind: iter([int(grid.prod()) // merge for grid in found]) for kind, found in grids.items()}

        def expand(match: re.Match[str]) -> str:
            token = match.group()
            return token * next(counts["image" if token == self._token("image") else "video"])

        pattern = re.compile("|".join(re.escape(self._token(kind)) for kind in grids))
        rows = self._segments([pattern.sub(expand, text) for text in texts])
        batch = {name: torch.tensor(value) for name, value in rows.items()}
        ids = {kind: self.tokenizer.convert_tokens_to_ids(self._token(kind)) for kind in grids}
        batch["mm_token_type_ids"] = (batch["input_ids"] == ids["image"]) + 2 * (batch["input_ids"] == ids["video"])
        for kind, values, name in (("image", "pixel_values", "image_grid_thw"),
                                   ("video", "pixel_values_videos", "video_grid_thw")):  # fmt: skip
            if pixels[kind]:
                batch |= {values: torch.cat(pixels[kind]), name: torch.stack(grids[kind])}
        if seconds and self.model_type == "qwen2_5_vl":
            batch["second_per_grid_ts"] = torch.tensor(seconds)
        return batch


def grid_patches(image_processor: Any, clip: Clip) -> tuple[Tensor, Tensor]:
    """A clip for a Qwen2-VL-like model: patches `(t * h * w, C * temporal * P * P)` and the grid `(3,)` of t, h, w.

    The image processor resizes, scales and cuts each frame; frames are then put together in groups of
    `temporal_patch_size`, the last one repeated where they do not divide.
    """
    out = image_processor(images=list(clip.frames), return_tensors="pt")
    patches, (_, h, w) = out["pixel_values"], out["image_grid_thw"][0].tolist()
    if not clip.is_video:
        return patches, out["image_grid_thw"][0]
    depth, side = image_processor.temporal_patch_size, image_processor.patch_size
    # An image fills a patch's whole depth with itself: any of its slices is the frame.
    frames = patches.reshape(len(clip.frames), h * w, -1, depth, side, side)[:, :, :, 0]
    if missing := -len(frames) % depth:
        frames = torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])])
    t = len(frames) // depth
    groups = frames.reshape(t, depth, h * w, -1, side, side).permute(0, 2, 3, 1, 4, 5)
    return groups.reshape(t * h * w, -1), torch.tensor([t, h, w])
