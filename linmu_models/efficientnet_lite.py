"""EfficientNet-Lite as a vision tower for transformers' LLaVA; transformers has no such model.

It is a convolutional backbone for phones, pretrained on ImageNet. Its last map, averaged to `grid` x `grid` cells,
gives that many visual tokens. Batch norms are folded into the convolutions when weights are converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# (blocks, kernel, stride, expansion, channels) of each stage of EfficientNet-Lite0.
_LITE0 = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
_BATCH_NORM_EPS = 1e-3


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of an EfficientNet-Lite tower; the defaults are Lite0's.

    Attributes:
        stages: (blocks, kernel, stride, expansion, channels) each.
        stem: channels after the first convolution.
        hidden_size: channels of the map that visual tokens are cut from.
        image_size: side of the images, in pixels.
        grid: rows, and columns, of visual tokens.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self,
        stages: Iterable[Iterable[int]] = _LITE0,
        stem: int = 32,
        hidden_size: int = 1280,
        image_size: int = 224,
        grid: int = 4,
        **kwargs: Any,
    ) -> None:
        self.stages = [list(stage) for stage in stages]
        self.stem, self.hidden_size, self.image_size, self.grid = stem, hidden_size, image_size, grid
        super().__init__(**kwargs)


class _Convolution(nn.Conv2d):
    """Padded as TensorFlow's "SAME": what is left over goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max(-(-s // stride) * stride - stride + kernel - s, 0) for s in x.shape[-2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


class _Block(nn.Module):
    """Expand, convolve each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Convolution(inputs, wide, 1) if expansion != 1 else None
        self.depthwise = _Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _Convolution(wide, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.adds else y


class EfficientNetLiteModel(PreTrainedModel):
    """Pixels (B, 3, H, W), scaled to about [-1, 1], to visual tokens (B, grid * grid, hidden_size) in y, x order."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    _no_split_modules = ["_Block"]  # noqa: RUF012  # as transformers declares it

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _Convolution(3, config.stem, 3, 2)
        blocks, channels = [], config.stem
        for count, kernel, stride, expansion, outputs in config.stages:
            for i in range(count):
                blocks.append(_Block(channels, outputs, kernel, 1 if i else stride, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = _Convolution(channels, config.hidden_size, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """The tokens, as the last and only hidden state; keywords that transformers passes to towers mean nothing."""
        x = F.relu6(self.stem(pixel_values.to(self.dtype)))
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(F.relu6(self.head(x)), self.config.grid).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=x, hidden_states=(x,))


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `efficientnet_lite_pytorch` names them to `EfficientNetLiteModel`'s, batch norms folded in.

    The classifier (`_fc`) is left out.
    """
    pairs = {"_conv_stem": ("_bn0", "stem"), "_conv_head": ("_bn1", "head")}
    for index in sorted({name.split(".")[1] for name in state if name.startswith("_blocks.")}, key=int):
        old, new = f"_blocks.{index}", f"blocks.{index}"
        pairs[f"{old}._depthwise_conv"] = (f"{old}._bn1", f"{new}.depthwise")
        pairs[f"{old}._project_conv"] = (f"{old}._bn2", f"{new}.project")
        if f"{old}._expand_conv.weight" in state:
            pairs[f"{old}._expand_conv"] = (f"{old}._bn0", f"{new}.expand")
    out = {}
    for convolution, (norm, name) in pairs.items():
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _BATCH_NORM_EPS)
        out[f"{name}.weight"] = state[f"{convolution}.weight"] * scale[:, None, None, None]
        out[f"{name}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return out


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
