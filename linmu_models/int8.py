"""Linear maps that hold 8 bits a weight, for decoding: a step of few rows does little but read weights."""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linmu_ops import LinmuWarning

OP = "int8_weights"
FEW = 16  # rows: up to here torch's int8 kernel is faster than a product with weights made wide again
PART = 4096  # rows that are quantised at once
STRIDE = 32  # torch's kernel reads so many weights of a row at once, without a look at where the row ends


def int8_weights(model: Any) -> Any:
    """Hold the weights of a model's decoder and of its output layer in 8 bits, in place, and return the model.

    A row of a weight has one scale. Activations keep their dtype, and so does the state. A product of up to 16 rows, as
    in a decode step, is PyTorch's kernel for weights of 8 bits, whose activations are bfloat16. More rows, as in a
    prompt, are multiplied in the model's dtype. Embeddings, the vision tower, norms, maps to step sizes, gates and
    shares, and feature maps stay as they are. Output weights that were tied to the embeddings are so no longer.

    The model is then for inference on a CPU, and cannot be saved.

    Args:
        model: a model of transformers, linear or not, as it was loaded.

    Raises:
        TypeError: it is no model of transformers. ValueError: it is quantised already or not on a CPU, or a weight is
            not finite.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_decoder"):
        raise TypeError(f"{OP}: model must be a transformers model, got {type(model).__name__}")
    if getattr(model, "hf_quantizer", None) is not None or is_int8(model):
        raise ValueError(f"{OP}: model must have float weights, got a quantised one")
    whole: Any = model
    maps = {id(m): m for m in whole.get_decoder().modules() if type(m) is nn.Linear}
    head = whole.get_output_embeddings()
    if type(head) is nn.Linear:
        maps[id(head)] = head
    # All are looked at before one is changed.
    places = [(name, module) for name, module in model.named_modules() if id(module) in maps]
    for name, linear in places:
        if linear.weight.device.type != "cpu":
            raise ValueError(f"{OP}: {name}.weight must be on a CPU, got {linear.weight.device}")
        if not linear.weight.is_floating_point() or type(linear.weight.data) is not Tensor:
            raise ValueError(f"{OP}: {name}.weight must be a plain tensor of a float dtype, got {linear.weight.dtype}")
        if not linear.weight.isfinite().all():
            raise ValueError(f"{OP}: {name}.weight must be finite, got inf or nan")
    if not has_kernel():
        warnings.warn(
            f"{OP}: torch has no int8 kernel for this processor: weights take less memory, and steps more time",
            LinmuWarning,
            stacklevel=2,
        )
    for name, linear in places:
        model.set_submodule(name, Int8Linear(linear))
    return model


def is_int8(model: nn.Module) -> bool:
    """Whether a model has weights from `int8_weights`."""
    return any(isinstance(m, Int8Linear) for m in model.modules())


def has_kernel() -> bool:
    """Whether torch's int8 product is vectorised on this processor; elsewhere it is a plain loop."""
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT" or platform.machine() in ("aarch64", "arm64")


class Int8Linear(nn.Module):
    """A linear map of the weights `quantized * scale`; see `int8_weights`.

    Attributes:
        quantized: (out_features, in_features) int8, in [-127, 127].
        scale: (out_features,), of the model's dtype. Its values are bfloat16's.
        bias: that of the map, or None.
    """

    quantized: Tensor
    kernel_scale: Tensor

    @torch.no_grad()
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = weight.abs().amax(1).to(wide).div(127).bfloat16().clamp(min=torch.finfo(torch.bfloat16).tiny)
        # By the scale that the kernel reads, so that rounding it costs nothing; in parts, as a vocabulary's is large.
        pairs = zip(weight.split(PART), scale.to(wide)[:, None].split(PART), strict=True)
        parts = [(w.to(wide) / s).round_().clamp_(-127, 127).to(torch.int8) for w, s in pairs]
        self.register_buffer("quantized", torch.cat(parts))
        self.register_buffer("kernel_scale", scale)
        # A parameter: by it a block without other narrow parameters tells the dtype of its state.
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        self.bias = linear.bias
        self.in_kernel = has_kernel() and self.in_features % STRIDE == 0

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), of the dtype of x."""
        rows = x.numel() // max(self.in_features, 1)
        differentiated = torch.is_grad_enabled() and x.requires_grad
        narrow = x.dtype != torch.float64 and x.device.type == "cpu" and not differentiated
        if self.in_kernel and narrow and 0 < rows <= FEW:
            flat = x.reshape(rows, self.in_features).to(torch.bfloat16)
            y = torch.ops.aten._weight_int8pack_mm(flat, self.quantized, self.kernel_scale.bfloat16())
            y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.quantized.to(x.dtype) * self.scale[:, None].to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"{OP}: a model must have float weights to be saved, got 8 bits; save it before")
