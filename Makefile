# Every target sets up what it needs; the virtual environment is .venv.
#   make test TORCH=torch==2.12.0    installs another torch; without TORCH=, one that is in .venv stays
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0
# Modules are compiled when they are first imported: most of what is installed never is.
INSTALL := $(BIN)/pip install -q --no-compile
TORCH_ASKED := $(filter-out file,$(origin TORCH))

.PHONY: setup build test test-all test-transformers fuzz asan arm64 wheels wheel-cuda env demo docs lint clean FORCE

# PyTorch, and what a build needs.
.venv/tools: pyproject.toml $(if $(TORCH_ASKED),$(if $(filter $(TORCH),$(shell cat .venv/torch 2>/dev/null)),,FORCE))
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_ASKED),,$(BIN)/python -c "import torch" 2>/dev/null ||) $(INSTALL) "$(TORCH)"
	echo "$(TORCH)" > .venv/torch
	$(INSTALL) "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13" numpy
	touch $@

# What tests, training and the demo need.
.venv/ready: .venv/tools
	LINMU_BUILD=none $(INSTALL) --no-build-isolation -e ".[test]"
	touch $@

# What checks and publishes.
.venv/dev: .venv/ready
	LINMU_BUILD=none $(INSTALL) --no-build-isolation -e ".[dev]"
	touch $@

# The compiler and pip work side by side.
setup:
	$(MAKE) --no-print-directory -j2 .venv/ready build

# Make's job server is not for the compiler's, which would call it an error.
build: .venv/tools
	MAKEFLAGS= $(BIN)/python setup.py -q build_ext --inplace

# One draw of each sweep, and one GPU architecture; all of them with test-all.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10 -m "not sweep"

# Libraries that quantise weights are loud wherever transformers is imported: only what tests them has them.
.venv/quantized: .venv/ready
	$(INSTALL) "bitsandbytes; platform_machine == 'x86_64'" torchao
	touch $@

test-all: setup .venv/quantized docs
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10

# The models' tests and the code of pages, with the oldest and the newest transformers that pyproject.toml allows, each in
# a folder of its own.
TRANSFORMERS ?= 5.23 5.24
test-transformers: setup
	for version in $(TRANSFORMERS); do \
	  folder=$(CURDIR)/build/transformers/$$version; \
	  test -d $$folder || $(INSTALL) --target $$folder "transformers==$$version.*" || exit 1; \
	  PYTHONPATH=$$folder $(BIN)/python -c "import transformers; print('transformers', transformers.__version__)"; \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not sweep" tests/models tests/test_readme.py || exit 1; \
	done

# Random cases of ops and blocks without a fixed seed, by the kernels of every instruction set.
SECONDS ?= 600
fuzz: setup
	$(BIN)/python -m tests.fuzz $(SECONDS)

# The libraries under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package.
ASAN_PRELOAD = $(foreach lib,libasan.so libubsan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(lib)))
asan: .venv/ready
	LINMU_BUILD=cpu LINMU_SANITIZE=1 $(BIN)/python setup.py -q build_ext
	tar -c --exclude='*.so' --exclude=__pycache__ linmu_ops | tar -x -C build/asan
	for isa in avx2 avx512 avx512bf16; do \
	  LD_PRELOAD="$(ASAN_PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LINMU_CPU_ISA=$$isa $(BIN)/pytest -q -o pythonpath=build/asan -p no:cacheprovider tests/asan || exit 1; \
	done

# The kernels compiled for arm64, and run under qemu-user: emulated, not timed.
arm64: setup
	$(BIN)/python -m tests.arm64

# What is published, in dist/: for any platform, the teacher, x86-64 and arm64 (Debian: g++-aarch64-linux-gnu).
wheels: setup .venv/dev
	$(BIN)/python -m wheels

# The kernels for NVIDIA GPUs, data alone; it needs nvcc.
wheel-cuda: setup .venv/dev
	$(BIN)/python -m wheels cuda

env: setup
	$(BIN)/linmu env

demo: setup
	$(BIN)/linmu distill distill/configs/demo.toml --resume

# The site needs neither torch nor what is compiled: it reads docstrings from source.
.venv-docs/ready: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	$(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*p['optional-dependencies']['docs'], sep='\n')" > .venv-docs/requirements.txt
	.venv-docs/bin/pip install -q --no-compile -r .venv-docs/requirements.txt
	touch $@

docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build -q
	@echo "The site: build/site/index.html; links to elsewhere: build/external-links.txt"

bench: setup
	$(BIN)/python -m bench.run --both --quick --seconds 0.2 --save
	$(BIN)/python -m bench.models.run --layers 4 --prefill 1k 4k 16k --decode 1k 16k --batch 1 8 --seconds 2 --report

lint: setup .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cuda/*.h' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info linmu_ops/*.so .venv .venv-docs
