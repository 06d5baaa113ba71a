"""A teacher and a student that answer one question, one after the other, and tell what they do as they do it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import cache_bytes, output_cache
from ..chat import ChatProcessor
from ..conversion import convert
from ..generate import generate_text, load
from ..media import Clip
from ..modeling import LinmuModel

Tell = Callable[[dict[str, Any]], None]
POINTS = 16  # of the line that shows how memory grew while the prompt was read


class StoppedError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Side:
    """A model that answers."""

    name: str
    """"teacher" or "student"."""
    label: str
    """What it is called on the page."""
    model: Any
    processor: ChatProcessor


@dataclass(frozen=True)
class Pair:
    """A teacher and its student."""

    teacher: Side
    student: Side
    max_new_tokens: int = 256

    @classmethod
    def load(cls, teacher: str, student: str | None, max_new_tokens: int = 256, **how: Any) -> Pair:
        """Both models, from their folders or their names on the hub.

        Args:
            student: None: what `convert` makes of the teacher, untrained.
            how: of `linmu_models.generate.load`: device, dtype.

        Raises:
            ValueError, OSError: as `load` and `convert`; or the student is no LinMU model, or one of the two takes
                images and the other does not.
        """
        one = Side("teacher", _label(teacher), *load(teacher, **how))
        if student is None:
            made = convert(one.model, share_frozen=True).eval()
            return cls(one, Side("student", "converted, not trained", made, one.processor), max_new_tokens)
        other = Side("student", _label(student), *load(student, **how))
        if not isinstance(other.model, LinmuModel):
            raise ValueError(f"demo: the student must be a LinMU model, got a {other.model.config.model_type}")
        if one.processor.takes_media != other.processor.takes_media:
            seeing = (one if one.processor.takes_media else other).name
            raise ValueError(f"demo: teacher and student must both take images, or neither, got a {seeing} that does")
        return cls(one, other, max_new_tokens)

    @property
    def takes_media(self) -> bool:
        """Whether they see images and videos."""
        return self.student.processor.takes_media

    def warm_up(self) -> None:
        """Answer once, as whatever is set up by a first answer would count as the teacher's time."""
        clip = Clip(np.full((1, 112, 112, 3), 255, np.uint8)) if self.takes_media else None
        replace(self, max_new_tokens=2).answer("?", clip, threading.Event(), lambda _: None)

    def answer(self, question: str, clip: Clip | None, stop: threading.Event, tell: Tell) -> None:
        """Both answer, the teacher first, so that neither slows the other.

        Args:
            clip: what the question is about.
            stop: once set, the answer ends before the next layer is computed.
            tell: called with what happens: "start" of a side; "read", when its first token is there; "step", with each
                token after it; "text", a piece of the answer; "end", with the figures of `Answer`.

        Raises:
            StoppedError: it was stopped. ValueError, OSError: as `generate_text`.
        """
        images = [clip] if clip is not None and not clip.is_video else []
        videos = [clip] if clip is not None and clip.is_video else []
        for side in (self.teacher, self.student):
            say = partial(_say, tell, side.name)
            say("start")
            with _watched(side.model, stop, say):
                answer = generate_text(
                    side.model, side.processor, question, images, videos, stream=partial(_say_text, say),
                    max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
                )  # fmt: skip
            say(
                "end", text=answer.text, prompt_tokens=answer.prompt_tokens, tokens=answer.tokens,
                seconds=answer.first_token_seconds, rate=answer.tokens_per_second, bytes=answer.cache_bytes,
            )  # fmt: skip


def _say(tell: Tell, side: str, what: str, **facts: Any) -> None:
    tell({"what": what, "side": side, **facts})


def _say_text(say: Callable[..., None], text: str) -> None:
    say("text", text=text)


def _label(path: str) -> str:
    """The folder's last names; more of the path is nobody's business on a page."""
    return "/".join(Path(path).parts[-2:])


@contextmanager
def _watched(model: Any, stop: threading.Event, say: Callable[..., None]) -> Iterator[None]:
    """While the context is open, each call of the model is told, and none goes on once it is stopped."""
    began: list[float] = []
    calls = 0

    def check(*_: Any) -> None:
        if stop.is_set():
            raise StoppedError

    def begin(*_: Any) -> None:
        check()
        if not began:
            began.append(time.perf_counter())

    def called(_module: Any, _args: Any, out: Any) -> None:
        nonlocal calls
        calls += 1
        cache, seconds = output_cache(out), time.perf_counter() - began[0]
        facts = {"tokens": calls, "seconds": seconds, "bytes": 0 if cache is None else cache_bytes(cache)}
        if calls == 1:
            say("read", growth=[] if cache is None else growth(cache), **facts)
        else:
            say("step", **facts)

    hooks = [layer.register_forward_pre_hook(check) for layer in model.get_decoder().layers]
    hooks += [model.register_forward_pre_hook(begin), model.register_forward_hook(called)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def growth(cache: Any) -> list[tuple[int, int]]:
    """(tokens, bytes) of a dynamic cache while what it holds was read: keys and values came token by token, as far as
    they are kept; states had their size from the beginning."""
    tokens = int(cache.get_seq_length())
    held = []
    for layer in cache.layers:
        found = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor)]
        held += [(t.shape[-2], t.numel() * t.element_size()) for t in found if t.ndim == 4 and t.shape[-2]]
    constant = cache_bytes(cache) - sum(size for _, size in held)
    at = torch.linspace(min(tokens, 1), tokens, min(tokens, POINTS)).round().long().unique().tolist()
    return [(n, constant + sum(size * min(n, length) // length for length, size in held)) for n in at]
