"""An argument of another type is refused in one line that names it."""

import pytest

from linmu_distill.config import load_config, parse_config
from linmu_distill.data import TaskStream, generate
from linmu_distill.evaluation import evaluate
from linmu_distill.run import RunError, distill

ODD = [1.5, "x", b"x", None, [5], {"a": 1}, object()]


def refused(error, line, call):
    with pytest.raises(error, match=line) as found:
        call()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("odd", ODD)
def test_built_in_tasks(odd):
    refused(ValueError, "^group must be one of ", lambda: generate(odd, 1, 0))
    refused(TypeError, "^n must be a whole number, got ", lambda: generate("read", odd, 0))
    refused(TypeError, "^turns must be a whole number, got ", lambda: generate("read", 1, 0, turns=odd))
    if odd != [5]:
        refused(TypeError, "^seed must be a whole number", lambda: generate("read", 1, odd))
    refused(ValueError, r"^sizes must be a list of \(rows, columns\)", lambda: generate("read", 1, 0, sizes=odd))
    refused(ValueError, r"^frames must be \(least, most\) ", lambda: generate("needle", 1, 0, frames=odd))
    if odd != {"a": 1}:
        refused(ValueError, "^TaskStream: mixture must hold weights", lambda: TaskStream(None, odd))
        refused(TypeError, "^TaskStream: batch_size must be ", lambda: TaskStream(None, {"read": 1}, odd))
    else:
        refused(ValueError, "batch_size must have every group", lambda: TaskStream(None, {"read": 1}, odd))


@pytest.mark.parametrize("frames", [(1, 1), (8, 4), (4,), (2.5, 4)])
def test_frames_of_a_needle(frames):
    refused(ValueError, "2 <= least <= most", lambda: generate("needle", 1, 0, frames=frames))


@pytest.mark.parametrize(
    ("group", "options", "rule"),
    [
        ("needle", {"frames": (2, 10**12)}, r"frames must be \(least, most\) with 2 <= least <= most <= 65536, got"),
        ("page", {"sizes": ((10**6, 8),)}, "sizes must be of at most 2097152 cells, rows x columns, got"),
        ("needles", {"keys": 677}, "keys must be at most 676, got 677"),
        ("tracking", {"hops": 10**30}, "hops must be at most 26, got"),
        ("tracking", {"chains": 10**30}, "chains must be at most 26, got"),
    ],
)
def test_no_number_fills_the_memory(group, options, rule):
    refused(ValueError, f"^{rule}", lambda: generate(group, 1, 0, **options))


def test_options_of_a_group():
    refused(ValueError, "^options of needle must be of frames, got sizes", lambda: generate("needle", 1, 0, sizes=3))
    refused(ValueError, "^options of video must be left out, got frames", lambda: generate("video", 1, 0, frames=3))


@pytest.mark.parametrize("odd", [5, *ODD])
def test_runs(odd):
    refused(TypeError, "^distill: config must be a Config", lambda: distill(odd))
    refused(TypeError, "^evaluate: model must be a transformers model", lambda: evaluate(odd, None, "read"))
    if not isinstance(odd, dict):
        refused(ValueError, "^config: Input should be a valid dictionary", lambda: parse_config(odd))
    if odd != "x":
        refused(TypeError, "^a configuration must be the path of a TOML file", lambda: load_config(odd))
    if odd is not None:
        settings = parse_config({"output": "x", "teacher": "t"})
        refused(RunError, "^--stage must be 1 to 3, got ", lambda: distill(settings, odd))
