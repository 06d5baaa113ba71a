"""NVILA through its remote code. Its decoder gets embeddings, so layouts are made where the embeddings are.

    model.llm                   the decoder, a causal language model of transformers
    model.encoders[name]        "image", "video": features of one picture after the other, with text tokens around them
    model._embed(...)           puts them in the place of one placeholder token each, and pads
    model.tokenizer             media_token_ids {name: id}, padding_side, model_max_length

This code is not part of transformers, and its versions pin older ones: the adapter relies on the names above only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from linmu_models.layout import Block, Placeholders, VisualUnit, build_layout, to_numpy
from linmu_models.modeling import LinmuModel
from linmu_ops import TokenLayout
from linmu_ops.nn import EXACT, ExactConfig, MMATEConfig


def convert_nvila(
    model: Any,
    config: MMATEConfig | ExactConfig | Mapping[str, Any] = EXACT,
    keep_attention: Iterable[int] = (),
) -> Any:
    """Make the decoder of a loaded NVILA model linear, in place.

    Args:
        model: the remote-code model; its names are those in this module's docstring.
        config, keep_attention: as in `linmu_models.convert`.

    Returns:
        The model. Its `llm` is a `LinmuModel`. Save and load it on its own (`model.llm.save_pretrained`). After you
        load it into `model.llm`, call `attach_nvila(model)`.

    Raises:
        TypeError: a name is missing.
    """
    from linmu_models.conversion import convert

    _check("convert_nvila", model)
    model.llm = convert(model.llm, config, keep_attention)
    return attach_nvila(model)


def attach_nvila(model: Any) -> Any:
    """Connect a linear decoder to its NVILA model, which then says in each `_embed` where the visual tokens are.

    Raises:
        TypeError: a name is missing, or `llm` is no linear decoder.
    """
    _check("attach_nvila", model)
    if not isinstance(model.llm, LinmuModel):
        raise TypeError(f"attach_nvila: model.llm must be a LinmuModel, got {type(model.llm).__name__}")
    recorder = _Recorder(model)
    model.llm.layout_source = recorder.layout
    model._embed = recorder.embed
    return model


def _check(function: str, model: Any) -> None:
    for name in ("llm", "encoders", "_embed", "tokenizer"):
        if not hasattr(model, name):
            raise TypeError(f"{function}: model must have the attribute {name}, got {type(model).__name__}")


class _Recorder:
    """Wraps `_embed`: notes how long each picture is, and lays a `TokenLayout` over what comes out."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embed_media = model._embed
        self.made: TokenLayout | None = None

    def embed(
        self, input_ids: Tensor, media: Mapping[str, Any], media_config: Mapping[str, Any], labels: Any, mask: Any
    ) -> Any:
        units: dict[str, deque[VisualUnit]] = {}
        plain = dict(self.model.encoders)
        for name, encoder in plain.items():
            self.model.encoders[name] = _Noting(encoder, name, units)
        try:
            out = self.embed_media(input_ids, media, media_config, labels, mask)
        finally:
            self.model.encoders.update(plain)
        self.made = self._layout(input_ids, mask, units, out[0])
        return out

    def layout(self, inputs: Mapping[str, Any]) -> TokenLayout | None:
        """The layout of the embeddings that `_embed` made last, if these are the inputs."""
        embeds, made = inputs.get("inputs_embeds"), self.made
        if embeds is None or made is None or embeds.shape[1] != made.length:
            return None
        copies, rest = divmod(embeds.shape[0], made.batch_size)
        if rest:
            return None
        if copies == 1:
            return made
        # Beams: row i of the batch becomes rows i * copies to (i + 1) * copies.
        starts = np.cumsum([0, *made.blocks[:, 1:].prod(1)])
        blocks, positions = [], []
        for copy in range(copies):
            for (row, *grid), a, b in zip(made.blocks.tolist(), starts[:-1], starts[1:], strict=True):
                blocks.append((row * copies + copy, *grid))
                positions.append(made.positions[a:b])
        return TokenLayout(np.array(blocks), np.concatenate(positions), embeds.shape[0], made.length)

    def _layout(
        self, input_ids: Tensor, mask: Any, units: dict[str, deque[VisualUnit]], embeds: Tensor
    ) -> TokenLayout | None:
        names = {token_id: name for name, token_id in self.model.tokenizer.media_token_ids.items()}
        batch, length = embeds.shape[:2]
        keep = np.ones(tuple(input_ids.shape), bool) if mask is None else to_numpy(mask).astype(bool)
        visual, order = np.zeros((batch, length), bool), []
        for row, ids in enumerate(to_numpy(input_ids)):
            at, spans = 0, []
            # As _embed does: as many ids as there are real tokens, from the left.
            for token in ids[: keep[row].sum()].tolist():
                unit = units[names[token]].popleft() if token in names else None
                if unit is not None:
                    spans.append((at, unit))
                at += 1 if unit is None else unit.tokens
            if at > length:
                raise ValueError(f"linmu: a row must fit model_max_length, got {at} tokens for {length}")
            offset = 0 if self.model.tokenizer.padding_side == "right" else length - at
            for start, unit in spans:
                visual[row, offset + start : offset + start + unit.tokens] = True
                order.append(unit)
        return build_layout([Placeholders(visual, order)], batch, length)


class _Noting(nn.Module):
    """An encoder that also notes the unit of each picture it returns."""

    def __init__(self, encoder: Any, name: str, units: dict[str, deque[VisualUnit]]) -> None:
        super().__init__()
        self.encoder, self.name, self.units = encoder, name, units

    def forward(self, pictures: Sequence[Tensor], config: Mapping[str, Any]) -> Any:
        out = self.encoder(pictures, config)
        extra = [_tokens(self.encoder, part) for part in ("start_tokens", "end_tokens", "sep_tokens")]
        blocks = config.get("block_sizes") or [None] * len(out)
        self.units[self.name] = deque(
            video_unit(len(features), len(picture), getattr(self.encoder, "pool_sizes", None), *extra)
            if self.name == "video"
            else image_unit(len(features), block, *extra[:2])
            for features, picture, block in zip(out, pictures, blocks, strict=True)
        )
        return out


def _tokens(encoder: Any, name: str) -> int:
    text = getattr(encoder, name, None)
    embeds = None if text is None else encoder.embed_tokens(text)
    return 0 if embeds is None else len(embeds)


def image_unit(tokens: int, block: Sequence[int] | None, start: int, end: int) -> VisualUnit:
    """An image of `tokens` embeddings, `start` and `end` of them text; a square, or block[0] x block[1] squares."""
    rows, columns = block or (1, 1)
    side = math.isqrt((tokens - start - end) // (rows * columns))
    h, w = rows * side, columns * side
    if h * w != tokens - start - end:
        raise ValueError(f"linmu: an image must be {rows} x {columns} squares of tokens, got {tokens - start - end}")
    return VisualUnit(tokens, (Block((1, h, w), start + np.arange(h * w)),))


def video_unit(
    tokens: int, frames: int, pools: Sequence[Sequence[int]] | None, start: int, end: int, sep: int
) -> VisualUnit:
    """A video of `frames` squares, text around each; or a pyramid of them, pooled by each of `pools` (t, h, w)."""
    pools = pools or [(1, 1, 1)]
    texts = sum(frames // t * (start + end) + sep for t, _, _ in pools)
    per_frame = sum(frames / t / (h * w) for t, h, w in pools)
    side = round(math.sqrt((tokens - texts) / per_frame))
    parts = []
    for t, h, w in pools:
        grid = (frames // t, side // h, side // w)
        cells, stride = grid[1] * grid[2], start + grid[1] * grid[2] + end
        at = (np.arange(grid[0])[:, None] * stride + start + np.arange(cells)).reshape(-1)
        parts.append(VisualUnit(grid[0] * stride + sep, (Block(grid, at),)))
    unit = VisualUnit.joined(parts)
    if unit.tokens != tokens:
        raise ValueError(f"linmu: a video of {frames} frames must have {unit.tokens} tokens, got {tokens}")
    return unit
