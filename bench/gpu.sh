#!/usr/bin/env bash
# Build, test, sanitize and time the ops, the training step and the data path on a machine with a GPU, and measure what
# short runs learn there. Needs no network.
#
#   bench/gpu.sh [STAGE ...]      build test sanitize ops step lfov data ablation; by default all, in this order
#
# The exit code is 1 if a stage failed; later stages still run. Each stage ends within 8 minutes, and all within BUDGET
# seconds if it is set, for machines that are lent for a short time. A stage with less than a minute left is not started
# and counts as failed.
# Written to $OUT: stages.json (torch, GPU, commit; result and seconds of each stage), STAGE.log, ops.json, step-*.json,
# data.json and ablation.json.
#
# Environment: OUT (runs/gpu), PYTHON (python3), DEVICE (cuda; cpu to try the script), COMMIT (for the JSON files; by
# default from git), ROIS (the set of muse_fast/configs/ablation.yaml), BUDGET, WHEELS (folder of packages that the
# machine lacks, installed first), WORKERS (4; processes of the tests, with pytest-xdist).
set -uo pipefail
cd "$(dirname "$0")/.."
STAGES=(build test sanitize ops step lfov data ablation)
OUT=$(realpath -m "${OUT:-runs/gpu}")
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
BUDGET=${BUDGET:-86400}
BEGAN=$EPOCHSECONDS
export PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin

# SECONDS -> SECONDS, or what is left of the budget.
within() {
  local left=$((BUDGET - (EPOCHSECONDS - BEGAN)))
  echo $(($1 < left ? $1 : left > 1 ? left : 1))
}

# Editable, because the tests import muse_fast, with the library and the kernels, from the checkout.
stage_build() {
  if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl || return
  fi
  MUSE_FAST_BUILD=require timeout "$(within 420)" \
    "$PYTHON" -m pip install --no-index --no-deps --no-build-isolation -v -e . || return
  "$PYTHON" - "$DEVICE" <<'PYTHON'
import sys

from muse_fast.ops import backends

print(*backends.table(), sep="\n")
errors = [backends.library_error()]
if sys.argv[1] == "cuda":  # without these, later stages would skip their purpose
    errors += [backends.cuda_error("match_nuclei"), backends.triton_error()]
sys.exit("; ".join(filter(None, errors)) or None)
PYTHON
}

# The tests of every op and kernel, and everything else that needs a GPU.
stage_test() {
  local files op workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "${WORKERS:-4}") # kernels compile in parallel
  mapfile -t files < <(
    ls tests/ops/test_*.py tests/kernels/test_*.py
    grep -rlE --include='test_*.py' 'mark\.gpu' tests
  )
  mapfile -t files < <(printf '%s\n' "${files[@]}" | sort -u)
  timeout "$(within 470)" "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" "${files[@]}"
}

# Out-of-bounds accesses, races in shared memory and reads of uninitialised memory, on the smallest inputs. Without torch's
# cache of device memory, which would hide an access past the end of a tensor.
stage_sanitize() {
  local tool
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; return 1; }
  for tool in memcheck racecheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(within 155)" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m bench.ops.tiny --device "$DEVICE" || return
  done
}

stage_ops() {
  timeout "$(within 470)" "$PYTHON" -m bench ops --device "$DEVICE" --json "$OUT/ops.json"
}

# Whole steps at 224 px, with a batch that fills a GPU and with the paper's.
stage_step() {
  local failed=0
  step vit_small 224 64 || failed=1
  step vit_base 224 64 || failed=1
  step vit_small 224 16 || failed=1
  step vit_base 224 16 || failed=1
  return $failed
}

# Large fields of view: whole steps at 512 px; forward and backward at 1024 px, as fine-tuning runs them.
stage_lfov() {
  local failed=0
  step vit_small 512 16 || failed=1
  step vit_base 512 16 || failed=1
  if [[ $DEVICE == cuda ]]; then
    timeout "$(within 115)" "$PYTHON" -m bench step --device cuda --arch vit_base --lfov 1024 --json "$OUT/step-1024.json" || failed=1
  else
    timeout "$(within 115)" "$PYTHON" -m bench step --device cpu --lfov 64 --json "$OUT/step-1024.json" || failed=1
  fi
  return $failed
}

# Decoding, rendering and whole loaders, on the real ROIs that MUSE_FAST_DATA names, otherwise on procedural ones.
stage_data() {
  local arguments=(--rounds 5)
  [[ $DEVICE == cpu ]] && arguments=(--rounds 2 --rois 1 --side 512 --size 224)
  timeout "$(within 470)" "$PYTHON" -m bench data --device "$DEVICE" --json "$OUT/data.json" "${arguments[@]}"
}

# What each loss and the scales of the views contribute; on a CPU two steps on procedural ROIs.
stage_ablation() {
  local rois=${ROIS:-} arguments=(--seconds "$(within 430)")
  if [[ $DEVICE == cpu ]]; then
    rois=$OUT/rois
    arguments=(--variant "both losses" --seed 0 --mpp 0.25 model.arch=vit_tiny optim.steps=2 optim.warmup_steps=1
      optim.batch_size=2 data.workers=0 train.precision=fp32 train.log_every=1 train.eval_rois=2)
    [[ -d $rois ]] || "$PYTHON" -m muse_fast.prepare synthetic:7 "$rois" size=320 mpp=0.25 || return
  fi
  [[ -n $rois ]] || { echo "ROIS is not set; muse_fast/configs/ablation.yaml explains how to make this ROI set"; return 1; }
  timeout "$(within 470)" "$PYTHON" -m bench ablation --device "$DEVICE" --rois "$rois" --out "$OUT/ablation" \
    --json "$OUT/ablation.json" "${arguments[@]}"
}

# ARCH SIZE ROIS; on a CPU a small model instead.
step() {
  local arguments=(--arch "$1" --size "$2" --batch "$3" --compile --seconds 4)
  if [[ $DEVICE == cpu ]]; then
    arguments=(--arch vit_tiny --batch 1 --seconds 0 views.global_size=64 views.local_size=32 head.prototypes=64)
  fi
  timeout "$(within 115)" "$PYTHON" -m bench step --device "$DEVICE" --json "$OUT/step-$1-$2-$3.json" "${arguments[@]}"
}

# STAGE EXIT_CODE SECONDS, for every stage so far -> stages.json
record() {
  "$PYTHON" - "$OUT" "$DEVICE" "$@" <<'PYTHON'
import json
import sys
from pathlib import Path

from bench.machine import environment

out, device, *fields = sys.argv[1:]
stages = [
    {"stage": stage, "exit_code": int(code), "seconds": int(seconds)}
    for stage, code, seconds in zip(fields[::3], fields[1::3], fields[2::3], strict=True)
]
for row in stages:
    lines = (Path(out) / f"{row['stage']}.log").read_text().splitlines()
    row["last_line"] = next((line for line in reversed(lines) if any(map(str.isalpha, line))), "")
report = {"environment": environment(device), "stages": stages}
(Path(out) / "stages.json").write_text(json.dumps(report, indent=2) + "\n")
PYTHON
}

for stage in "$@"; do
  if [[ " ${STAGES[*]} " != *" $stage "* ]]; then
    echo "bench/gpu.sh: unknown stage '$stage'; expected some of: ${STAGES[*]}" >&2
    exit 2
  fi
done
mkdir -p "$OUT"
results=()
failed=0
for stage in "${@:-${STAGES[@]}}"; do
  echo "== $stage"
  SECONDS=0
  if (($(within 60) < 60)); then
    echo "less than a minute of the budget is left"
    false
  else
    "stage_$stage"
  fi 2>&1 | tee "$OUT/$stage.log"
  code=${PIPESTATUS[0]}
  results+=("$stage" "$code" "$SECONDS")
  ((code == 0)) || failed=1
  record "${results[@]}"
done
printf '== %s: exit code %s after %s s\n' "${results[@]}"
exit "$failed"
