# `make test` and `make demo` set everything up; the virtual environment is .venv.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0

.PHONY: setup build demo test asan bench lint env clean

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q setuptools wheel "cmake>=3.24" ninja "pybind11>=2.13"
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

setup: .venv/ready build

build: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace

test: setup
	$(BIN)/python -m pytest -q -n 2 --durations=10

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info linmu_ops/*.so .venv
