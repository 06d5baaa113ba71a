#!/usr/bin/env bash
# Everything there is to know from a machine with an NVIDIA GPU, in one command:
#
#     bench/gpu_check.sh                   results in bench/results/<device>, as h200
#     bench/gpu_check.sh build test        only these steps of: build test sanitize bench profile
#
# A python3 whose torch sees the GPU is used as it is; otherwise .venv is made, from pip's index alone. nvcc must be
# there. Nothing of the machine is changed: no clocks, no power limit. Each step's log and exit code are kept, and a step
# that fails does not keep the next ones from running; the last line says which failed.
set -uo pipefail
cd "$(dirname "$0")/.."
steps=${*:-build test sanitize bench profile}

if [ -x .venv/bin/python ]; then python=$PWD/.venv/bin/python; else python=$(command -v python3); fi
if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  python3 -m venv .venv && python=$PWD/.venv/bin/python &&
    "$python" -m pip install -q torch setuptools wheel "cmake>=3.24" ninja "pybind11>=2.13" numpy &&
    LINMU_BUILD=none "$python" -m pip install -q --no-build-isolation -e ".[dev]" || exit 1
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PATH=$(dirname "$python"):$PATH PYTHONUNBUFFERED=1
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())') || exit 1
[ "$device" = hbm3 ] && device=h100
out=bench/results/$device
mkdir -p "$out"

failed=()
step() {  # name, command...
  local name=$1 code=0
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 4 "$out/$name.log"
  echo "$name $code" >>"$out/exit_codes.txt"
  [ "$code" = 0 ] || failed+=("$name")
}
wanted() { [[ " $steps " == *" $1 "* ]]; }
: >"$out/exit_codes.txt"
{
  git rev-parse HEAD 2>/dev/null || echo "commit: not a git checkout"
  date -u +%FT%TZ
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
  nvcc --version | tail -n 2
  "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|transformers|mamba|causal-conv1d|flash|fla)'
} >"$out/machine.txt"

if wanted build; then
  # Without pybind11 the layout planner is left out, which a forced build would call a failure.
  build=$("$python" -c 'import pybind11' 2>/dev/null && echo cuda || echo auto)
  step build env LINMU_BUILD="$build" "$python" setup.py -q build_ext --inplace
  step library test -e linmu_ops/liblinmu_cuda.so
  step env "$python" -m linmu_ops.env --json
fi
if wanted test; then
  parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8")
  step test_gpu "$python" -m pytest -q $parallel -m gpu tests/gpu
  step test_all "$python" -m pytest -q $parallel -m "not gpu" tests --ignore=tests/distill
fi
if wanted sanitize; then
  # Small cases alone: memcheck and racecheck run a kernel tens of times slower.
  program="import torch
from linmu_ops import _registry
from linmu_ops._testing import run_small
for op in sorted(_registry.OPS):
    if _registry.why_not(op, 'cuda', 'cuda') is None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run_small(op, 'cuda', 'cuda', dtype)
torch.cuda.synchronize()"
  for tool in memcheck racecheck initcheck synccheck; do
    step "sanitize_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=linmu \
      "$python" -c "$program"
  done
fi
if wanted bench; then
  for op in ssd_scan window_attention ssd_step causal_conv1d causal_conv1d_step branch_mix_norm; do
    rm -f "$out/$op.jsonl"
    step "bench_$op" "$python" -m bench.run --op "$op" --both --no-gate --device cuda --impl auto --impl cuda \
      --impl triton --json "$out/$op.jsonl"
  done
  step report "$python" -c "from bench import report; print(report.write('$device'))"
fi
if wanted profile; then
  program="import torch
import linmu_ops
from bench.run import load
for op, names in (('ssd_scan', ('gqa', 'gqa-both', 'L=32768')), ('window_attention', ('video', 'video, gqa'))):
    bench = load(op)
    for name in names:
        with linmu_ops.use_impl(op + ':cuda'):
            getattr(linmu_ops, op)(**bench.make(bench.cases[name], torch.bfloat16, 'cuda'))
torch.cuda.synchronize()"
  step profile ncu --clock-control none --kernel-name regex:states_kernel\\|output_kernel\\|attention --launch-count 12 \
    --section SpeedOfLight --section Occupancy --section LaunchStats --section MemoryWorkloadAnalysis \
    "$python" -c "$program"
fi
echo "results: $out"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
