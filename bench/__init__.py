"""Measurements. `python -m bench.run --op ssd_scan`; the method is in bench/README.md."""
