"""Makes the helpers of this folder importable, and lets every test choose its own precision and processes."""

import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _forget_the_last_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
