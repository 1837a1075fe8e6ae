#!/usr/bin/env bash
# Build, test, time and sanitize the ops, the training step and the data path on a machine with a GPU, and measure what
# short runs learn there. Needs no network.
#
#   bench/gpu.sh first|second|STAGE ...
#
# first, what matters most on a machine that is lent for a short time:
#   build preflight tiny engine baselines rates test ops
# second, after mending what it shows, perhaps on a bare machine:
#   build base lfov sanitize data ablation
# By default all, in this order. The exit code is 1 if a stage failed; later stages still run. Each stage ends within 8
# minutes, and all within BUDGET seconds if it is set. A stage with less than 20 seconds left is not started and counts
# as failed.
#
# Written to $OUT: stages.json (torch, GPU, commit; result and seconds of each stage), STAGE.log, and the JSON files of
# the benchmarks, which write theirs after every row. $ARCHIVE has all of this after every stage, so that a machine that
# is taken away leaves what it has measured.
#
# Environment: OUT (runs/gpu), ARCHIVE ($OUT.tar.gz), PYTHON (python3), DEVICE (cuda; cpu to try the script), COMMIT (for
# the JSON files; by default from git), ROIS (the set of muse_fast/configs/ablation.yaml), BUDGET, WHEELS (folder of
# packages that the machine lacks, installed first), WORKERS (8; processes of the tests, with pytest-xdist).
set -uo pipefail
cd "$(dirname "$0")/.."
FIRST=(build preflight tiny engine baselines rates test ops)
SECOND=(build base lfov sanitize data ablation)
STAGES=("${FIRST[@]}" "${SECOND[@]:1}")
OUT=$(realpath -m "${OUT:-runs/gpu}")
ARCHIVE=$(realpath -m "${ARCHIVE:-$OUT.tar.gz}")
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
BUDGET=${BUDGET:-86400}
LEAST=20
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

# What this machine lacks: tests of it cannot be collected, and the others still run.
stage_preflight() {
  "$PYTHON" - <<'PYTHON'
import importlib
import sys

required = ("numpy", "PIL", "torch", "torchvision", "timm", "omegaconf", "rich", "safetensors", "simplejpeg", "scipy", "shapely")
optional = ("triton", "openslide", "xformers", "nvidia.dali", "pytest", "xdist", "hypothesis", "pytest_timeout", "sklearn")
missing = []
for name in (*required, *optional):
    try:
        found = importlib.import_module(name)
        print(f"{name:16} {getattr(found, '__version__', 'there')}")
    except Exception as error:  # a package that cannot be imported is as good as none, whatever it raises
        print(f"{name:16} MISSING ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
        missing += [name] * (name in required)
sys.exit(f"missing: {', '.join(missing)}" if missing else None)
PYTHON
}

# Every op on the smallest inputs: whether its kernels compile and run. `test` and `ops` compare them with float64.
stage_tiny() {
  timeout "$(within 100)" "$PYTHON" -m bench.ops.tiny --device "$DEVICE"
}

# Whole steps of the engine at 224 px: a batch that fills a GPU, one that the host limits without CUDA graphs, and one
# that hides the host's time.
stage_engine() {
  local failed=0
  step vit_small 224 64 --only fast --cuda-graph true --cuda-graph false --from-host || failed=1
  step vit_small 224 16 --only fast --cuda-graph true --cuda-graph false || failed=1
  step vit_small 224 256 --only fast || failed=1
  return $failed
}

# The same beside both baselines: the literal one at the paper's 16 ROIs, the fair one at 64, where the engine is also
# compiled, once, as that takes most of a minute.
stage_baselines() {
  local failed=0
  step vit_small 224 16 || failed=1
  step vit_small 224 64 --only fair --only fast --compile --attention sdpa --attention varlen || failed=1
  return $failed
}

# The tests of every op and kernel, and everything else that needs a GPU; not those that plant bugs or compile for others.
stage_test() {
  local files workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "${WORKERS:-8}") # kernels compile in parallel
  mapfile -t files < <(
    ls tests/ops/test_*.py tests/kernels/test_*.py
    grep -rlE --include='test_*.py' 'mark\.gpu' tests
  )
  mapfile -t files < <(printf '%s\n' "${files[@]}" | sort -u)
  timeout "$(within 240)" "$PYTHON" -m pytest -q -m "not heavy" -p no:cacheprovider --continue-on-collection-errors \
    "${workers[@]}" "${files[@]}"
}

stage_ops() {
  timeout "$(within 470)" "$PYTHON" -m bench ops --device "$DEVICE" --json "$OUT/ops.json"
}

# Matrix products and convolutions of a step by themselves.
stage_rates() {
  timeout "$(within 60)" "$PYTHON" -m bench rates --device "$DEVICE" --json "$OUT/rates.json"
}

# Out-of-bounds accesses, and races in shared memory, on the smallest inputs. Without torch's cache of device memory,
# which would hide an access past the end of a tensor. Not initcheck: it also reports reads inside CUB and cuBLAS, whose
# scratch memory is partly never written, so one of our own would have to be looked for among them.
stage_sanitize() {
  local tool
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; return 1; }
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(within 155)" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m bench.ops.tiny --device "$DEVICE" || return
  done
}

stage_base() {
  step vit_base 224 64 --only fair --only fast
}

# Large fields of view: whole steps at 512 px; forward and backward at 1024 px, as fine-tuning runs them.
stage_lfov() {
  local failed=0
  step vit_small 512 16 --only fair --only fast || failed=1
  step vit_base 512 16 --only fast || failed=1
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

# What each loss contributes, beside the untrained network, with two seeds; on a CPU two steps on procedural ROIs.
stage_ablation() {
  local rois=${ROIS:-} arguments=(--seconds "$(within 430)" --variant "both losses" --variant "image loss"
    --variant "nucleus loss" --seed 0 --seed 1)
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

# ARCH SIZE ROIS [OPTION ...]; on a CPU a small model instead.
step() {
  local arch=$1 size=$2 rois=$3 only arguments
  shift 3
  arguments=(--arch "$arch" --size "$size" --batch "$rois" --seconds 4 "$@")
  only=$([[ " $* " == *" fair "* || " $* " != *" --only "* ]] && echo all || echo fast)
  if [[ $DEVICE == cpu ]]; then
    arguments=(--arch vit_tiny --batch 1 --seconds 0 views.global_size=64 views.local_size=32 head.prototypes=64)
    [[ $only == fast ]] && arguments+=(--only fast)
  fi
  timeout "$(within 150)" "$PYTHON" -m bench step --device "$DEVICE" --json "$OUT/step-$arch-$size-$rois-$only.json" \
    "${arguments[@]}"
}

# STAGE EXIT_CODE SECONDS, for every stage so far -> stages.json; then everything -> one archive.
record() {
  "$PYTHON" - "$OUT" "$DEVICE" "$@" <<'PYTHON'
import json
import sys
from pathlib import Path

out, device, *fields = sys.argv[1:]
stages = [
    {"stage": stage, "exit_code": int(code), "seconds": int(seconds)}
    for stage, code, seconds in zip(fields[::3], fields[1::3], fields[2::3], strict=True)
]
for row in stages:
    lines = (Path(out) / f"{row['stage']}.log").read_text().splitlines()
    row["last_line"] = next((line for line in reversed(lines) if any(map(str.isalpha, line))), "")
file = Path(out) / "stages.json"
if file.exists():  # of the stage before: importing torch takes seconds
    machine = json.loads(file.read_text())["environment"]
else:
    from bench.machine import environment

    machine = environment(device)
file.write_text(json.dumps({"environment": machine, "stages": stages}, indent=2) + "\n")
PYTHON
  (cd "$OUT" && tar -czf "$ARCHIVE.part" -- *.json *.log) && mv "$ARCHIVE.part" "$ARCHIVE"
}

(($#)) || set -- "${STAGES[@]}"
wanted=()
for stage in "$@"; do
  case $stage in
    first) wanted+=("${FIRST[@]}") ;;
    second) wanted+=("${SECOND[@]}") ;;
    *)
      if [[ " ${STAGES[*]} " != *" $stage "* ]]; then
        echo "bench/gpu.sh: unknown stage '$stage'; expected first, second or some of: ${STAGES[*]}" >&2
        exit 2
      fi
      wanted+=("$stage")
      ;;
  esac
done
mkdir -p "$OUT" "$(dirname "$ARCHIVE")"
rm -f "$OUT/stages.json"
results=()
failed=0
for stage in "${wanted[@]}"; do
  echo "== $stage"
  SECONDS=0
  if (($(within $LEAST) < LEAST)); then
    echo "less than $LEAST seconds of the budget are left"
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
