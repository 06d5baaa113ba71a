"""One thread, fixed seeds, caches of one's own, and uninitialised tensors filled with NaN so that gaps are seen."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

# Matrix products round differently on other numbers of threads: a subprocess must count as its parent does, and test
# processes side by side must not wait for each other's threads. Tests of thread counts set their own.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# As `pythonpath` in pyproject.toml, for processes that tests start.
NAMES = str(Path(__file__).parent / "names")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (NAMES, os.environ.get("PYTHONPATH"))))

# Test processes side by side must not read what another is writing, nor a run what an older one left.
SCRATCH = tempfile.TemporaryDirectory(prefix="linmu-tests-", ignore_cleanup_errors=True)
for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_MODULES_CACHE"):
    os.environ[cache] = os.path.join(SCRATCH.name, cache.lower())
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it then


# A test gives the same answer each time it is run; `make fuzz` draws anew.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _deterministic_and_poisoned():
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


# What a test process has left to be collected belongs to threads that a fork of it does not have: the fork must not
# collect it, or it crashes or waits for ever.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)

GANG = pytest.StashKey()


def pytest_collection_finish(session):
    """Fork the processes of `gang` before any test: where there is a GPU, PyTorch refuses a backward pass in a process
    that was forked off one that has run one."""
    if not session.config.option.collectonly and any("gang" in getattr(i, "fixturenames", ()) for i in session.items):
        from tests.context_parallel.gang import Gang

        session.config.stash[GANG] = Gang(Path(tempfile.mkdtemp(dir=SCRATCH.name)))
        session.config.stash[GANG].start()


@pytest.fixture(scope="session")
def gang(request):
    """Processes that work together; see `tests/context_parallel/gang.py`."""
    gang = request.config.stash[GANG]
    yield gang
    gang.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without a GPU, a test that needs one is not collected: thousands of skips would hide the one that matters.

    Of the older instruction sets `make test` runs the oldest.
    """
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("isa") == "avx512":
            item.add_marker(pytest.mark.sweep)
    if not torch.cuda.is_available():
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
