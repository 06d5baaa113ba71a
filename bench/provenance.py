"""What every row of results says: by which code it was measured, on what, with which versions."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from linmu_ops import _registry
from linmu_ops.env import cpu_name

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "mamba_ssm",
    "fla-core",
    "flash-attn",
    "natten",
    "causal-conv1d",
    "onnxruntime",
)
# Results and pages do not change what the next rows are measured by.
CODE = ("linmu_ops", "linmu_models", "distill", "csrc", "CMakeLists.txt", "bench", ":!bench/results", ":!bench/reports")


@functools.cache
def _code() -> dict[str, Any]:
    """As this process has loaded it: at the first row."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "--short=12", "HEAD"])
        changed = git(["git", "status", "--porcelain", "--", *CODE])
    except OSError:  # no git
        return dict(commit=os.environ.get("LINMU_COMMIT"), dirty=None)
    return dict(
        commit=commit.stdout.strip() or os.environ.get("LINMU_COMMIT"),
        dirty=bool(changed.stdout.strip()) if changed.returncode == 0 else None,
    )


def where(device: str) -> dict[str, Any]:
    """Commit, machine, versions and time.

    Args:
        device: "cpu" or "cuda".
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        name, versions["cuda"] = torch.cuda.get_device_name(), torch.version.cuda or ""
        clock = "as the driver sets it"
    else:
        name, clock = cpu_name(), f"not fixed; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the start"
    return dict(
        **_code(), device=name, isa=_registry.binaries()["cpu"].info.get("isa"), threads=torch.get_num_threads(),
        versions=versions, clock=clock, date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
