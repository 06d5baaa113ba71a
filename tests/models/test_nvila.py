"""The NVILA adapter, on a stand-in with the remote code's names (the code itself needs an older transformers)."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from torch import nn

import linmu_models
from linmu_models.adapters.nvila import image_unit, video_unit

from . import tiny

IMAGE, VIDEO = 310, 311


class Tokenizer:
    def __init__(self, padding_side):
        self.media_token_ids = {"image": IMAGE, "video": VIDEO}
        self.model_max_length = 512
        self.padding_side = padding_side


class Encoder(nn.Module):
    """Pools each 4 x 4 picture into side x side tokens; a newline after each frame."""

    start_tokens, end_tokens = None, "\n"

    def __init__(self, embeddings, side, pool_sizes=None):
        super().__init__()
        self.embeddings, self.side = embeddings, side
        if pool_sizes:
            self.pool_sizes = pool_sizes

    def embed_tokens(self, text):
        return None if text is None else self.embeddings(torch.tensor([13]))

    def one(self, picture):
        frames = picture if picture.dim() == 4 else picture[None]
        cells = nn.functional.adaptive_avg_pool2d(frames, self.side)
        features = cells.flatten(2).mT @ torch.ones(3, self.embeddings.embedding_dim)
        newline = self.embed_tokens(self.end_tokens)[None].expand(len(frames), -1, -1)
        return torch.cat((features, newline), dim=1).flatten(0, 1)

    def forward(self, pictures, config):
        return [self.one(p) for p in pictures]


class StandIn(nn.Module):
    def __init__(self, padding_side="left"):
        super().__init__()
        self.llm = copy.deepcopy(tiny.teacher("qwen2"))
        embeddings = self.llm.get_input_embeddings()
        self.encoders = {"image": Encoder(embeddings, 4), "video": Encoder(embeddings, 2)}
        self.tokenizer = Tokenizer(padding_side)

    def _embed(self, input_ids, media, media_config, labels, attention_mask):
        embeds = {n: deque(self.encoders[n](media[n], media_config[n])) for n in media}
        names = {i: n for n, i in self.tokenizer.media_token_ids.items()}
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            parts = [
                embeds[names[i]].popleft() if i in names else self.llm.get_input_embeddings()(torch.tensor([i]))
                for i in ids[: mask.sum()].tolist()
            ]
            rows.append(torch.cat(parts))
        longest = max(map(len, rows))
        left = self.tokenizer.padding_side == "left"
        pads = [(longest - len(r), 0) if left else (0, longest - len(r)) for r in rows]
        stacked = torch.stack([nn.functional.pad(r, (0, 0, *p)) for r, p in zip(rows, pads, strict=True)])
        real = torch.stack(
            [nn.functional.pad(torch.ones(len(r), dtype=torch.bool), p) for r, p in zip(rows, pads, strict=True)]
        )
        return stacked, labels, real

    def forward(self, input_ids, media, attention_mask):
        embeds, _, mask = self._embed(input_ids, media, {n: {} for n in media}, None, attention_mask)
        return self.llm(inputs_embeds=embeds, attention_mask=mask)

    @torch.no_grad()
    def generate(self, input_ids, media, attention_mask, **options):
        embeds, _, mask = self._embed(input_ids, media, {n: {} for n in media}, None, attention_mask)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)


def inputs():
    """Two rows, the second shorter: an image and a video, and an image."""
    ids = torch.tensor([[5, IMAGE, 6, 7, VIDEO, 8, 9], [5, 6, IMAGE, 7, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool()
    media = {"image": [tiny.noise(3, 4, 4), tiny.noise(3, 4, 4, seed=1)], "video": [tiny.noise(3, 3, 4, 4, seed=2)]}
    return ids, media, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_finds_pictures_in_embeddings(side):
    model = linmu_models.convert_nvila(StandIn(side).eval())
    assert isinstance(model.llm, linmu_models.LinmuModel)
    seen = []
    model.llm.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["linmu"].layout), with_kwargs=True)
    with torch.no_grad():
        out = model(*inputs()).logits
    layout = seen[0]
    assert layout.blocks.tolist() == [[0, 1, 4, 4], [0, 3, 2, 2], [1, 1, 4, 4]]
    # Row 0: 5, 16 + newline, 6, 7, three frames of 4 + newline, 8, 9. Row 1 is 20 long, padded to 37.
    start = 17 if side == "left" else 0
    expected = [*range(1, 17), *range(20, 24), *range(25, 29), *range(30, 34), *range(start + 2, start + 18)]
    assert layout.positions.tolist() == expected
    alone = linmu_models.convert_nvila(StandIn(side).eval())
    ids, media, mask = inputs()
    with torch.no_grad():
        second = alone(ids[1:], {"image": media["image"][1:]}, mask[1:]).logits
    torch.testing.assert_close(out[1, start : start + 20], second[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_generates(how):
    model = linmu_models.convert_nvila(StandIn().eval())
    options = dict(max_new_tokens=4, do_sample=False, **how)
    assert torch.equal(model.generate(*inputs(), **options), model.generate(*inputs(), **options, use_cache=False))


def test_the_decoder_saves_and_loads(tmp_path):
    model = linmu_models.convert_nvila(StandIn().eval())
    with torch.no_grad():
        expected = model(*inputs()).logits
    model.llm.save_pretrained(tmp_path)
    again = StandIn().eval()
    again.llm = tiny.hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(linmu_models.attach_nvila(again)(*inputs()).logits, expected)


def test_units():
    assert image_unit(16 + 1, None, 0, 1).blocks[0].grid == (1, 4, 4)
    assert image_unit(2 + 96 + 1, (2, 3), 2, 1).blocks[0].grid == (1, 8, 12)
    pyramid = video_unit(8 * (16 + 1) + 1 + 2 * (4 + 1) + 1, 8, [(1, 1, 1), (4, 2, 2)], 0, 1, 1)
    assert [b.grid for b in pyramid.blocks] == [(8, 4, 4), (2, 2, 2)]
    assert pyramid.blocks[1].offsets[:5].tolist() == [137, 138, 139, 140, 142]
    with pytest.raises(ValueError, match="must be 1 x 1 squares of tokens, got 6"):
        image_unit(6, None, 0, 0)
    with pytest.raises(TypeError, match="must have the attribute llm, got Linear"):
        linmu_models.convert_nvila(nn.Linear(2, 2))
