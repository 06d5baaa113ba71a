"""Tables of training runs. `python -m bench.runs.run bench/runs/tables/open.toml`, `python -m bench.runs.recall`."""
