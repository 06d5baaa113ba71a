"""Ways to run a teacher and its student: as users run them, and as fast as they are to be had."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linmu_models import LinmuInputs, LinmuModel
from linmu_models.cache import LinmuCacheLayer, cache_argument, linear_layer
from linmu_ops import TokenLayout
from linmu_ops.nn import MMATEState

PLAIN = "transformers"  # scaled_dot_product_attention, a cache that grows, nothing compiled
STUDENT = "student"
FREE = "transformers without attention"  # what a block that costs nothing would take; a step has an empty cache
COMPILED = ", compiled"
# On a GPU the compiled teacher runs with each of these first; what cannot serve leaves the next one.
GPU_ATTENTION = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FULL = 64  # tokens that fill a convolution's taps, and leave no place of a scan's state at 0
OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Variant:
    """One way to run one model.

    attention: the backend asked for first; PyTorch's own choice if None.
    free: with its projections, and without what attention does with them.
    """

    name: str
    model: Any
    compiled: bool = False
    attention: SDPBackend | None = None
    free: bool = False

    @property
    def is_student(self) -> bool:
        return isinstance(self.model, LinmuModel)


def variants(teacher: Any, student: Any, device: str) -> list[Variant]:
    """Every variant that is measured, the plain ones first."""
    found = [Variant(PLAIN, teacher), Variant(STUDENT, student), Variant(FREE, teacher, free=True)]
    if device == "cuda":
        found += [Variant(f"{PLAIN}{COMPILED}, {n}", teacher, True, b) for n, b in GPU_ATTENTION.items()]
    else:
        found.append(Variant(PLAIN + COMPILED, teacher, True))
    return [*found, Variant(STUDENT + COMPILED, student, True)]


def _own_values(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, None]:
    """In place of attention (B, H, L, P): each token's own value, (B, L, H, P)."""
    heads, length = query.shape[1:3]
    return value[:, :, -length:].repeat_interleave(heads // value.shape[1], 1).transpose(1, 2), None


@contextlib.contextmanager
def _attention(variant: Variant) -> Iterator[None]:
    if variant.free:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _own_values
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
    elif variant.attention is not None:
        with sdpa_kernel([variant.attention, *OTHERS], set_priority=True):
            yield
    else:
        yield


class Prefill:
    """A decoder from embeddings, or a whole model from its inputs, to the logits of the last position.

    A compiled one is compiled once for all lengths.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant, self.model = variant, variant.model
        decoder = self.model.get_decoder()
        self.cache_name = cache_argument(decoder)
        plain = decoder.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _attention(variant):
                return plain(*args, **kwargs)

        self.forward = torch.compile(forward, dynamic=True) if variant.compiled else forward

    def prepare(self, layout: TokenLayout) -> dict[str, Any]:
        """Arguments of `decoder` that a student needs: where the visual tokens are."""
        if not self.variant.is_student:
            return {}
        for layer in self.model.linmu_layers():
            layer.self_attn.prepare_layout(layout, self.model.device)
        return dict(linmu=LinmuInputs(layout))

    @torch.no_grad()
    def decoder(self, embeddings: Tensor, positions: Tensor, **rest: Any) -> Tensor:
        """(B, L, D) to logits (B, 1, V), through the decoder alone."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        with mock.patch.object(self.model.get_decoder(), "forward", self.forward):
            out = self.model.get_decoder()(
                inputs_embeds=embeddings, position_ids=positions, use_cache=True, **{self.cache_name: cache}, **rest
            )
        return self.model.lm_head(out.last_hidden_state[:, -1:])

    @torch.no_grad()
    def whole(self, **inputs: Tensor) -> Tensor:
        """Ids and pixels to logits (B, 1, V), through the vision tower too."""
        with mock.patch.object(self.model.get_decoder(), "forward", self.forward):
            return self.model(**inputs, use_cache=True, logits_to_keep=1).logits


class Decode:
    """A model with `tokens` tokens behind it, that goes on token by token."""

    def __init__(self, variant: Variant, tokens: int, batch: int, steps: int) -> None:
        tokens = 0 if variant.free else tokens
        self.variant, self.model, self.tokens = variant, variant.model, tokens
        self.cache = filled_cache(self.model, tokens, batch, tokens + steps if variant.compiled else None)
        # A state has no way back but a copy.
        self.states = [layer.state.repeat(1) for layer in self.cache.layers] if variant.is_student else []
        device = self.model.device
        self.positions = torch.arange(tokens, tokens + steps, device=device)[:, None, None].expand(-1, batch, 1)
        self.first = torch.full((batch, 1), 7, device=device)
        decoder, head, cache = self.model.get_decoder(), self.model.lm_head, self.cache
        rest: dict[str, Any] = {cache_argument(decoder): cache}
        if variant.is_student:
            rest["linmu"] = LinmuInputs()

        def step(ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            with _attention(variant):
                out = decoder(input_ids=ids, position_ids=positions, use_cache=True, **rest)
            logits = head(out.last_hidden_state)
            return logits.argmax(-1), logits

        self.step: Callable[..., tuple[Tensor, Tensor]] = step
        if variant.compiled:
            mode = "reduce-overhead" if device.type == "cuda" else None
            self.step = torch.compile(step, mode=mode, fullgraph=True)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`steps` greedy tokens after the prompt; the last one's logits (B, 1, V)."""
        ids = self.first
        for positions in self.positions:
            if self.variant.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            ids, logits = self.step(ids.clone(), positions)
        return logits

    def rewind(self) -> None:
        """Back to `tokens` tokens, in every field of a student's state."""
        for layer, state in zip(self.cache.layers, self.states, strict=False):
            layer.state.copy_(state)
        if self.variant.compiled or self.variant.is_student:
            for layer in self.cache.layers:
                if isinstance(layer.cumulative_length, Tensor):
                    layer.cumulative_length.fill_(self.tokens)
                else:
                    layer.cumulative_length = self.tokens
        else:
            self.cache.crop(-len(self.positions))


@torch.no_grad()
def filled_cache(model: Any, tokens: int, batch: int, static_length: int | None = None) -> Any:
    """The cache after `tokens` tokens: random keys and values; of a student, whose state is of constant size, what
    `counted_on` gives. A prompt of that length is prefilled for neither.

    static_length: length of a static cache; None for one that grows.
    """
    config = model.config.get_text_config(decoder=True)
    cache: Any
    if static_length is None:
        cache = DynamicCache(config=config)
    else:
        cache = StaticCache(config=config, max_cache_len=static_length)
    if isinstance(model, LinmuModel):
        for index, state in enumerate(counted_on(model, tokens, batch)):
            linear_layer(cache, index).advance(state, tokens)
        return cache
    generator = torch.Generator(model.device).manual_seed(0)
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        keys, values = (
            torch.empty(batch, heads, tokens, size, dtype=model.dtype, device=model.device).normal_(generator=generator)
            for _ in range(2)
        )
        cache.update(keys, values, index)
    return cache


@torch.no_grad()
def counted_on(model: Any, tokens: int, batch: int) -> list[MMATEState]:
    """The state of each layer of a student after `tokens` tokens of text: of a real prefix, which is long enough to
    fill all that a state keeps and ends at the same place of the window, with its tokens counted on to `tokens`."""
    windows = model.linmu_layers()[0].self_attn.windows
    sizes = getattr(windows, "sizes", None)
    window, filled = (0, 0) if windows is None else (windows.text_window, windows.text_window)
    if sizes is not None:  # at as many tokens of the ring, with as many of a step still to come
        window, filled = math.lcm(sizes.ring, sizes.leave), sizes.sinks + sizes.ring + sizes.kept + FULL
    least = max(FULL, filled)
    length = tokens if tokens <= least else least + (tokens - least) % max(window, 1)
    decoder, device = model.get_decoder(), model.device
    embeddings = torch.empty(batch, length, decoder.config.hidden_size, dtype=model.dtype, device=device)
    embeddings.normal_(generator=torch.Generator(device).manual_seed(0))
    positions = torch.arange(tokens - length, tokens, device=device).expand(batch, -1)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    decoder(
        inputs_embeds=embeddings, position_ids=positions, use_cache=True, linmu=LinmuInputs(),
        **{cache_argument(decoder): cache},
    )  # fmt: skip
    states = []
    for layer in cache.layers:
        assert isinstance(layer, LinmuCacheLayer) and layer.state is not None
        if layer.state.seen is not None:
            layer.state.seen.fill_(tokens)
        states.append(layer.state)
    return states
