"""`distill/` of this checkout by its import name: tests find it here, whatever is installed."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3] / "distill")]
