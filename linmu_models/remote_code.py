"""Makes a saved model loadable where `linmu` is installed, not imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REMOTE_CODE = "modeling_linmu.py"


def write_remote_code(folder: Path, config_class: Any, model_class: Any) -> None:
    """Make the saved model in `folder` loadable with `trust_remote_code=True`."""
    (folder / REMOTE_CODE).write_text(
        # Within a try, as transformers asks for every other import under the name of its module, not of its package.
        f'"""Needs the package linmu."""\n\ntry:\n    from {model_class.__module__} import '
        f"{config_class.__name__}, {model_class.__name__}\nexcept ModuleNotFoundError as error:\n"
        "    hint = \"pip install 'linmu[models]'\"\n"
        '    raise ImportError(f"this model needs the package linmu ({error}): {hint}") from error\n\n'
        f'__all__ = ["{config_class.__name__}", "{model_class.__name__}"]\n',
        "utf-8",
    )
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    module = REMOTE_CODE.removesuffix(".py")
    config["auto_map"] = {
        "AutoConfig": f"{module}.{config_class.__name__}",
        model_class.auto_class: f"{module}.{model_class.__name__}",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
