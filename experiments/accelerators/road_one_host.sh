#!/bin/sh
# Every stage on one host; each uses all GPUs, TPU chips or simulated devices that it has.
#
#     sh experiments/accelerators/road_one_host.sh CKPT OUT
#
# Expected: OUT/stats.npz, OUT/found/recipe.json, OUT/small, OUT/compared/report.html, OUT/samples.npz and
# OUT/speed/bench.json. Stopped? Begun stages resume; remove what is finished, or give a new OUT. SAMPLES, STEPS
# and BATCHES say how much is computed, SEARCH more options of the search.
set -eu
samples="${SAMPLES:-256}" steps="${STEPS:-50}"
mkdir -p "$2"
qdit calibrate "$1" "$2/stats.npz" --num-samples "$samples" --steps "$steps"
qdit search "$1" "$2/found" --budget bitops=1.0x-g128 --steps "${STEPS:-20}" \
  --num-batches "${BATCHES:-16}" --per-device "${PER_DEVICE:-1}" ${SEARCH:-}
qdit quantize "$1" "$2/small" --recipe "$2/found/recipe.json" --method "${METHOD:-best}"
qdit verify "$2/small" --against "$1" --no-timing --steps "$steps"
qdit evaluate "$2/small" --against "$1" --num-samples "$samples" --steps "$steps" --out "$2/compared"
qdit sample "$2/small" --labels "${LABELS:-0-7}" --steps "$steps" --out "$2/samples.npz"
qdit bench "$2/small" "$2/speed" --against "$1" --repeats "${REPEATS:-15}"
