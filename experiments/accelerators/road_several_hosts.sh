#!/bin/sh
# Every stage that several hosts share; the same line on every host, each with its own number.
#
#     HOST=0 HOSTS=2 ADDRESS=10.0.0.1 sh experiments/accelerators/road_several_hosts.sh CKPT OUT     # host 0
#     HOST=1 HOSTS=2 ADDRESS=10.0.0.1 sh experiments/accelerators/road_several_hosts.sh CKPT OUT     # host 1
#
# ADDRESS is that of host 0, whose ports from PORT (9876) on are free, and OUT lies on a disk that all hosts see.
# Expected: OUT/stats.npz, OUT/found/recipe.json, OUT/small (quantized by host 0 alone), OUT/samples.npz and
# OUT/compared/report.html, as one host writes them. Stopped, or a host lost? Start all again, with as many
# hosts as are left: begun stages resume. SAMPLES, STEPS, BATCHES, SEARCH and METHOD are as in road_one_host.sh.
set -eu
samples="${SAMPLES:-256}" steps="${STEPS:-50}" port="${PORT:-9876}"
share() {
  qdit "$@" --coordinator "$ADDRESS:$port" --num-processes "$HOSTS" --process-id "$HOST"
}
mkdir -p "$2"
[ -e "$2/stats.npz" ] || share calibrate "$1" "$2/stats.npz" --num-samples "$samples" --steps "$steps"
port=$((port + 1))
[ -e "$2/found/recipe.json" ] || share search "$1" "$2/found" --budget bitops=1.0x-g128 \
  --steps "${STEPS:-20}" --num-batches "${BATCHES:-16}" --per-device "${PER_DEVICE:-1}" ${SEARCH:-}
port=$((port + 1))
if [ "$HOST" = 0 ] && [ ! -e "$2/small" ]; then
  qdit quantize "$1" "$2/small" --recipe "$2/found/recipe.json" --method "${METHOD:-best}"
fi
until [ -e "$2/small/model.json" ]; do sleep 5; done
[ -e "$2/samples.npz" ] || share sample "$2/small" --labels "${LABELS:-0-7}" --steps "$steps" --out "$2/samples.npz"
port=$((port + 1))
share evaluate "$2/small" --against "$1" --num-samples "$samples" --steps "$steps" --out "$2/compared"
