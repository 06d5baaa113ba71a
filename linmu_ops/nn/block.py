"""What both blocks share: their arguments, their call, and their state."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .._dims import accumulate_dtype
from ..context_parallel import ContextParallel, SlabLayout
from ..token_layout import TokenLayout
from . import transfer
from ._inputs import (
    Call,
    Rotary,
    check_held,
    check_inputs,
    check_rotary,
    number_sequences,
    prepare_layout,
    slab_layout,
    without_padding,
)
from ._probe import check_softmax
from .config import ExactConfig, MMATEConfig
from .far import FarAttention
from .near import NearAttention
from .scan import Scan
from .shape import AttentionShape
from .state import MMATEState, activations, check_state, continue_state
from .windows import Windows


class Block(nn.Module):
    """A linear-time block that takes the place of an attention layer: `MMATE` or `ExactMMATE`.

    Both take the same call. Text is causal: no text token sees a later token. There is one exception: in `MMATE`, text
    that stands between the tokens of one image or video sees that block's other visual tokens.

    Args:
        dim: model size D.
        num_heads: query heads H.
        num_kv_heads: key/value heads G, a divisor of H; H if None.
        head_dim: head size P; D / H if None.
        layer_idx: index of the decoder layer. It sets the major-scan order (mod 4) and the window shift (mod 2).
        qkv_bias, out_bias: whether the projections to q, k, v, and to the output, have biases.
        qk_norm: makes the norm of queries and keys, given the head size; None for no norm.
        scale: softmax scale of the attention; 1/sqrt(head_dim) if None.
        interleaved_rotary: channels (0, 1), (2, 3), ... rotate together, instead of (0, R/2), (1, R/2 + 1), ...
        causal_windows: within its window a visual token attends to no later one, as in a causal decoder. If None:
            False in `MMATE`, True in `ExactMMATE`.
        config: every other choice; the block's default if None.

    Attributes:
        scan, windows: the parts; None where the config has them off.
    """

    default_config: ClassVar[MMATEConfig | ExactConfig]
    default_causal_windows: ClassVar[bool]

    config: Any
    scan: Scan | FarAttention | None
    windows: Windows | NearAttention | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layer_idx: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        interleaved_rotary: bool = False,
        causal_windows: bool | None = None,
        config: MMATEConfig | ExactConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = self.default_config if config is None else config
        if not isinstance(self.config, type(self.default_config)):
            wanted, got = type(self.default_config).__name__, type(config).__name__
            raise TypeError(f"{self._name}: config must be a {wanted}, got a {got}")
        self.shape = AttentionShape.of(
            self._name, dim, num_heads, num_kv_heads, head_dim, layer_idx=layer_idx, qkv_bias=qkv_bias,
            out_bias=out_bias, qk_norm=qk_norm, scale=scale, interleaved_rotary=interleaved_rotary,
            causal_windows=self.default_causal_windows if causal_windows is None else causal_windows,
        )  # fmt: skip
        self._build()
        self.reset_new_parameters()

    _name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        """Python names a function by its `__qualname__` where arguments do not fit: the block's, not this class's."""
        super().__init_subclass__()
        if "__init__" not in vars(cls):
            cls.__init__ = _named(cls.__init__, f"{cls.__name__}.__init__")  # type: ignore[method-assign]

    @property
    def dim(self) -> int:
        """Model size D."""
        return self.shape.dim

    @property
    def layer_idx(self) -> int:
        """Index of the decoder layer."""
        return self.shape.layer_idx

    def _build(self) -> None:
        raise NotImplementedError

    def reset_new_parameters(self) -> None:
        """Initialise every parameter that attention does not have."""
        raise NotImplementedError

    def _output_projection(self) -> nn.Module:
        """One of its maps to the model size."""
        raise NotImplementedError

    def _mix(self, hidden_states: Tensor, call: Call) -> tuple[Tensor, MMATEState]:
        """out (B, L, D), and the state after these tokens where `call.keep` asks for it."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: TokenLayout | None = None,
        grid: Sequence[int] | None = None,
        position_embeddings: Rotary | None = None,
        attention_mask: Tensor | None = None,
        state: MMATEState | None = None,
        return_state: bool = False,
        seq_idx: Tensor | None = None,
        context: ContextParallel | None = None,
    ) -> Tensor | tuple[Tensor, MMATEState]:
        """Mix tokens.

        Args:
            hidden_states: (B, L, D) float, of the weights' dtype, but under autocast.
            layout: where the visual tokens of these L tokens are. None: there are none.
            grid: (T, H, W) with T*H*W = L, instead of a layout. Every token is visual, in t, y, x order.
            position_embeddings: (cos, sin) of these L tokens, each (B or 1, L, R), R <= head size.
            attention_mask: (B, L) bool, False at padding. Padding may lie anywhere among text. No other token sees it,
                whatever its hidden states and position embeddings hold.
            state: what an earlier call left. Under `torch.no_grad` or inference mode it is updated in place: its
                tensors keep their addresses. With gradients on, and inside a checkpoint, it is left as it is.
            return_state: also return the state after these tokens.
            seq_idx: (B, L) int32, for rows of several sequences. A sequence begins where the number differs from the
                one before. Each sequence is as if it were alone. Padding may have any number. A visual block must lie
                in one sequence (checked on a CPU). Not together with state. The state returned is that of the row's
                last sequence.
            context: how rows are split over ranks. The tensors are then this rank's slab of them, and so is out; the
                layout, or grid, and the state are of whole rows, the same on all ranks. A `SlabLayout` is shared by
                layers. Without a state; in `MMATE`, with one where there is no text_window. See
                `linmu_ops.context_parallel`.

        Returns:
            out: (B, L, D). With return_state: (out, state); state is the given one if that was updated in place.
            Outputs at padding are finite and mean nothing.

        Notes:
            The cost is linear in L. One text token, with a state and gradients off, is one `ssd_step`, or in
            `ExactMMATE` one `exact_step` on a CPU. `ExactMMATE` takes an image or video in several calls: see
            `TokenLayout.part`. In `MMATE` it must lie within one call, unless there is a forward scan alone, in place.
            Some parameters act on visual tokens alone: a batch without any gives them no gradient. Train on such
            batches under DDP with find_unused_parameters=True.
        """
        call = self._call(
            hidden_states, layout, grid, position_embeddings, attention_mask, state, return_state, seq_idx, context
        )
        hidden_states, call = without_padding(hidden_states, call)
        out, new = self._mix(hidden_states, call)
        new = continue_state(state, new)
        return (out, new) if return_state else out

    def _call(
        self,
        hidden_states: Tensor,
        layout: TokenLayout | None,
        grid: Sequence[int] | None,
        position_embeddings: Rotary | None,
        attention_mask: Tensor | None,
        state: MMATEState | None,
        return_state: bool,
        seq_idx: Tensor | None,
        context: ContextParallel | None = None,
    ) -> Call:
        slab = None
        if context is not None:
            self._check_context(state is not None or return_state)
            slab, grid = slab_layout(self._name, context, hidden_states, layout, grid), None
            layout = slab  # type: ignore[assignment]  # has what is read of one
        layout = check_inputs(
            self._name, hidden_states, self.dim, layout, grid, attention_mask, self.layer_idx, self.layer_windows
        )
        if not torch.compiler.is_compiling():
            check_held(self._name, hidden_states, self._output_projection())
        if position_embeddings is not None:
            check_rotary(self._name, position_embeddings, hidden_states, self.shape.head_dim)
        if state is not None:
            check_state(self._name, state, hidden_states.shape[0], self._kept_tokens)
        if layout is not None and layout.is_part:
            self._check_part(layout, state, hidden_states.device)
        numbers = number_sequences(self._name, seq_idx, hidden_states, attention_mask, layout, state)
        keep = return_state or state is not None
        call = Call(layout, position_embeddings, attention_mask, state, keep, numbers, context)
        return call if slab is None else self._split(call, slab, seq_idx)

    def _split(self, call: Call, slab: SlabLayout, seq_idx: Tensor | None) -> Call:
        """The call of a slab of rows that are split over ranks; seq_idx as it was given."""
        return call if seq_idx is None else call._replace(seq_idx=slab.numbers(seq_idx, call.mask))

    def _check_part(self, layout: TokenLayout, state: MMATEState | None, device: torch.device) -> None:
        """Raise ValueError where this block cannot go on within, or stop within, an image or video."""
        raise ValueError(f"{self._name}: layout must be of whole images and videos, got a part of one")

    def _check_context(self, has_state: bool) -> None:
        """Raise ValueError where this block cannot take slabs."""
        raise ValueError(f"{self._name}: context must be None, got one")

    @property
    def layer_windows(self) -> Any:
        """Windows and shifts of this layer, as `TokenLayout.window_table` takes them. None without windows."""
        return None if self.windows is None else self.windows.layer_windows

    @property
    def _kept_tokens(self) -> int:
        """Tokens whose keys the state has."""
        return 0 if self.windows is None else self.windows.state_tokens

    def prepare_layout(self, layout: TokenLayout, device: torch.device | str) -> None:
        """Compute what `forward` reads from `layout`; the layout keeps it.

        Call it before a compiled `forward`, whose graph cannot compute it. Elsewhere it is not needed, nor with `grid`.
        Every layout so prepared runs through the same graph.
        """
        prepare_layout(layout, device, self.layer_idx, self.layer_windows)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MMATEState:
        """The state before the first token: zeros.

        Args:
            batch_size: rows B.
            dtype, device: those of the hidden states. None: those that the block computes in, also where its weights
                are quantised or offloaded.
        """
        own = activations(self, self._output_projection())
        dtype, device = dtype or own[0], device or own[1]
        state = MMATEState()
        if self.scan is not None:
            shape = (batch_size, self.shape.num_heads, *self.scan.state_size)
            state = state._replace(ssm=torch.zeros(shape, dtype=accumulate_dtype(dtype), device=device))
        if self.windows is not None and self.windows.text_window:
            shape = (batch_size, self.shape.num_kv_heads, self._kept_tokens, self.shape.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
            state = state._replace(keys=keys, values=values, seen=seen)
        return state

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        **options: Any,
    ) -> Self:
        """Make a block with the sizes, device, dtype and weights of an attention layer.

        Args:
            attention: a module with linear projections under the names of transformers, timm, diffusers or
                `torch.nn.MultiheadAttention`, separate or fused. It may have norms of queries and keys per head. A
                dropout is left out, with a warning.
            num_heads: the module's num_heads, num_attention_heads or config.num_attention_heads if None.
            num_kv_heads: from the shape of the key projection if None.
            head_dim: from the shape of the query projection if None.
            layer_idx: of the block.
            options: other arguments of the block (scale, config). scale: the module's own `scaling` or `scale` if not
                given.

        Raises:
            ValueError: the module has no projection of a known name, or no number of heads; or it has a part that
                changes its result and that a block has no place for. The message names the part. Or what a copy of it
                makes of a few random tokens is not softmax attention of its projections, where it can be called with
                hidden states alone.
            TypeError: its weights are quantised.
        """
        config = options.get("config") or cls.default_config
        causal = options.get("causal_windows")
        causal = cls.default_causal_windows if causal is None else causal
        reach = max(config.text_window, math.prod(config.window) if causal else 0)
        sizes, weights = transfer.read_attention(attention, reach, num_heads, num_kv_heads, head_dim)
        options.setdefault("scale", sizes.pop("scale"))
        block = cls(**sizes, layer_idx=layer_idx, **options)
        block.to(device=weights["q_weight"].device, dtype=weights["q_weight"].dtype)
        block.load_attention_weights(**weights)
        check_softmax(attention, weights, block.shape)
        return block

    load_attention_weights = transfer.load_attention_weights

    def calibrate(
        self, batches: Iterable[tuple[Mapping[str, Any], Tensor]], weights: Sequence[Tensor] | None = None
    ) -> float:
        """Fit the block's output to what it replaces. Call it after the weights are loaded, before training.

        Args:
            batches: pairs of the arguments of `forward`, hidden_states among them, and the teacher's output (B, L, D).
            weights: for each batch (B, L) >= 0, how much each token counts in the fit of `ExactMMATE`. They make up
                half of what counts; the other half is spread evenly over tokens. None: all tokens count the same.

        Returns:
            The root mean square of the teacher's output, over all tokens that are not padding.
        """
        raise NotImplementedError


def _named(function: Any, name: str) -> Any:
    """The same function under another name."""
    made = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, name
    return functools.wraps(function, assigned=("__module__", "__doc__", "__annotations__"))(made)


def root_mean_square(
    batches: Sequence[tuple[Mapping[str, Any], Tensor]], value: Callable[[Mapping[str, Any], Tensor], Tensor]
) -> float:
    """Of `value(inputs, target)`, (B, L, D), over all tokens that are not padding."""
    total, count = 0.0, 0
    for inputs, target in batches:
        mask, v = inputs.get("attention_mask"), value(inputs, target).double()
        v = v if mask is None else v[mask]
        total, count = total + v.square().sum().item(), count + v.numel()
    return math.sqrt(total / max(count, 1))
