#!/usr/bin/env bash
# Everything there is to know from a machine with an NVIDIA GPU, in one command:
#
#     bench/gpu_check.sh                        all steps, in this order; results in bench/results/<device>, as h200
#     bench/gpu_check.sh list                   the names of the steps
#     bench/gpu_check.sh build test_gpu         only the steps whose names begin so
#     bench/gpu_check.sh quick                  in less than eight minutes: right or not, times, counters
#     bench/gpu_check.sh quick --emulate        the same without a GPU, on small cases, results in build/quick
#     bench/gpu_check.sh layer                  in less than four minutes: a whole decoder layer of 7B shape
#     bench/gpu_check.sh layer --emulate        the same without a GPU, of a small shape, results in build/layer
#     STEP_SECONDS=240 bench/gpu_check.sh ...   a step is ended after so long (600 if left out)
#
# A python3 whose torch sees the GPU is used as it is; otherwise .venv is made, from pip's index alone. nvcc must be
# there, and CUTLASS's headers (package nvidia-cutlass, or LINMU_CUTLASS_DIR). Nothing of the machine is changed: no clocks, no power limit. Each step's log and exit code are kept, and a step
# that fails does not keep the next ones from running; the last line says which failed. Where the machine has only the
# files, LINMU_COMMIT names their commit.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
wanted=("$@")
only_list=false
if [ "${1-}" = list ]; then only_list=true wanted=(); fi
short= seconds=0 emulate=false  # quick or layer, and how long it may take with its build
case "${1-}" in
  quick) short=quick seconds=460 ;;
  layer) short=layer seconds=230 ;;
esac
[ -n "$short" ] && [ "${2-}" = --emulate ] && emulate=true

device=unknown out=bench/results/unknown
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
if $emulate; then
  PYTHONPATH=$PWD:$PWD/tests/names${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m "bench.$short" --emulate --out "build/$short"
fi
if ! $only_list; then
  if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    python3 -m venv .venv && python=$PWD/.venv/bin/python &&
      "$python" -m pip install -q torch setuptools wheel "cmake>=3.24" ninja "pybind11>=2.13" numpy &&
      LINMU_BUILD=none "$python" -m pip install -q --no-build-isolation -e ".[dev]" || exit 1
  fi
  PYTHONPATH=$PWD:$PWD/tests/names:$PWD/build/peers${PYTHONPATH:+:$PYTHONPATH}
  PATH=$(dirname "$python"):$PATH
  export PYTHONPATH PATH PYTHONUNBUFFERED=1
  # "NVIDIA H100 80GB HBM3" is h100.
  device=$("$python" -c 'import re, torch; print(re.findall(r"[A-Z]*\d+\w*", torch.cuda.get_device_name())[0].lower())') ||
    { echo "torch sees no GPU" >&2; exit 1; }
  out=bench/results/$device
  mkdir -p "$out"
  {
    git rev-parse HEAD 2>/dev/null || echo "commit ${LINMU_COMMIT:-unknown}: not a git checkout"
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
    nvcc --version | tail -n 2
    "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|transformers|mamba|causal-conv1d|flash|fla)'
  } >"$out/machine.txt" 2>&1
fi

# On a bare machine the build for this one architecture is what takes longest; a library that was carried is used.
if [ -n "$short" ]; then
  if [ ! -e linmu_ops/liblinmu_cuda.so ]; then
    LINMU_BUILD=cuda LINMU_CUDA_ARCHS=90a-real "$python" setup.py -q build_ext --inplace >"$out/${short}_build.log" 2>&1 ||
      { tail -n 5 "$out/${short}_build.log" >&2; exit 1; }
  fi
  exec "$python" -m "bench.$short" --out "$out" --seconds $((seconds - SECONDS))
fi

failed=()
step() {  # name, command...
  local name=$1 code=0 begun=$SECONDS prefix run=false
  shift
  for prefix in "${wanted[@]-}"; do [[ $name == "$prefix"* ]] && run=true; done
  $run || return 0
  if $only_list; then echo "$name"; return 0; fi
  echo "== $name: $*"
  timeout --kill-after=10 "${STEP_SECONDS:-600}" "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n 4 "$out/$name.log"
  echo "$(date -u +%FT%TZ) $name exit $code, $((SECONDS - begun)) s" >>"$out/steps.txt"
  [ "$code" = 0 ] || failed+=("$name")
}

# Without pybind11 the layout planner is left out, which a forced build would call a failure.
build=$("$python" -c 'import pybind11' 2>/dev/null && echo cuda || echo auto)
step build env LINMU_BUILD="$build" "$python" setup.py -q build_ext --inplace
step build_library test -e linmu_ops/liblinmu_cuda.so
step build_env "$python" -m linmu_ops.env --json

parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
for part in ssd_scan window_attention "not ssd_scan and not window_attention"; do
  [[ $part == not* ]] && name=test_gpu_rest || name=test_gpu_$part
  step "$name" "$python" -m pytest -q "${parallel[@]}" -m gpu tests/gpu -k "$part"
done
step test_cpu "$python" -m pytest -q "${parallel[@]}" -m "not gpu" tests --ignore=tests/distill

# Small calls alone: a kernel runs tens of times slower. First what has the most to hide: the gradient of the windows'
# bias and the kernels of sm_90a.
filter=$(compute-sanitizer --help 2>/dev/null | grep -oE -- '--kernel-(regex|name)' | sort -r | head -n 1)
for calls in window scan ops; do
  for tool in memcheck racecheck; do
    step "sanitize_${calls}_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      ${filter:+"$filter" kernel_substring=linmu} "$python" -m bench.small_calls "$calls"
  done
done
for tool in initcheck synccheck; do
  step "sanitize_all_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
    ${filter:+"$filter" kernel_substring=linmu} "$python" -m bench.small_calls window scan ops
done

# A case is a process: what a kernel breaks is broken for its process.
bench() {  # step, op, options...
  local name=$1 op=$2
  shift 2
  step "$name" "$python" -m bench.run --op "$op" --both --no-gate --device cuda --impl auto --impl cuda --impl triton \
    --impl compiled --json "$out/$op.jsonl" --replace "$@"
}
for case in 7b-both 7b-forward mamba-2; do bench "bench_target_ssd_scan_$case" ssd_scan --case "$case"; done
bench bench_target_window_attention_7b window_attention --case 7b
for side in 7 8 12; do
  bench "bench_target_window_attention_swin_$side" window_attention --case "swin, ${side}x$side"
done
bench bench_target_mmate mmate --targets
bench bench_target_ssd_step ssd_step --targets
for op in causal_conv1d causal_conv1d_step branch_mix_norm ssd_step window_attention ssd_scan; do
  bench "bench_other_$op" "$op"
done
step bench_report "$python" -m bench.page "$device"

profile() {  # op, cases
  local program="import sys, torch
import linmu_ops
from bench.run import load
from linmu_ops._testing import run_op
op, *names = sys.argv[1:]
for name in names:
    bench = load(op)
    with linmu_ops.use_impl(op + ':cuda'):
        run_op(op, **bench.make(bench.cases[name], torch.bfloat16, 'cuda'))
torch.cuda.synchronize()"
  step "profile_$1" ncu --clock-control none --kernel-name "regex:states_kernel|output_kernel|forward_kernel" \
    --launch-count 12 --section SpeedOfLight --section Occupancy --section LaunchStats \
    --section MemoryWorkloadAnalysis "$python" -c "$program" "$@"
}
profile ssd_scan 7b-forward 7b-both mamba-2
profile window_attention 7b "swin, 8x8"

$only_list && exit 0
echo "results: $out"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
