"""The names that `linmu_models` offers. Importing them makes LinMU models known to transformers."""

from linmu_ops.nn import EXACT, LITERAL, PAPER, ExactConfig, MMATEConfig

from . import adapters as _adapters  # noqa: F401  registers
from . import efficientnet_lite as _efficientnet_lite  # noqa: F401  registers
from .accelerate import Accelerated, accelerate_transformers
from .adapters.nvila import attach_nvila, convert_nvila
from .attention import LinmuAttention
from .cache import LinmuCacheLayer
from .calibration import calibrate
from .conversion import convert
from .generate import fast_decode
from .int8 import int8_weights
from .layout import LinmuInputs
from .modeling import FAMILIES, LinmuModel
from .report import TransferReport
from .snapshot import CacheSnapshot
from .states import LinmuDynamicCache, LinmuStaticCache, load_cache


def families() -> list[str]:
    """Model types (`teacher.config.model_type`) with an adapter; `linmu families` lists the others, too."""
    return sorted(FAMILIES)


__all__ = [
    "EXACT",
    "LITERAL",
    "PAPER",
    "Accelerated",
    "CacheSnapshot",
    "ExactConfig",
    "LinmuAttention",
    "LinmuCacheLayer",
    "LinmuDynamicCache",
    "LinmuInputs",
    "LinmuModel",
    "LinmuStaticCache",
    "MMATEConfig",
    "TransferReport",
    "accelerate_transformers",
    "attach_nvila",
    "calibrate",
    "convert",
    "convert_nvila",
    "families",
    "fast_decode",
    "int8_weights",
    "load_cache",
]
