"""LinMU models in lmms-eval, through its plugin entry point: `lmms-eval --model linmu --model_args pretrained=DIR`.

lmms-eval finds `manifest` by the entry point `lmms_eval.models` in pyproject.toml; nothing of it is changed or copied.
"""

from typing import Any

from lmms_eval.models.chat.huggingface import Huggingface
from lmms_eval.models.registry_v2 import ModelManifest

import linmu_models  # noqa: F401  makes LinMU's classes known to the Auto classes


class Linmu(Huggingface):
    """lmms-eval's own transformers model, on the device there is. Teachers run through it as well, for comparison.

    Args:
        pretrained: a folder or hub name with a processor that has a chat template.
        device: "cuda" or "cpu"; what there is when None.
        options: as in lmms-eval's `huggingface` model.
    """

    is_simple = False

    def __init__(self, pretrained: str, device: str | None = None, **options: Any) -> None:
        import torch

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=pretrained, device=device, device_map=options.pop("device_map", device), **options)


manifest = ModelManifest(model_id="linmu", chat_class_path="distill.lmms.Linmu")
