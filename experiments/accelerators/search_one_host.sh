#!/bin/sh
# Search on one machine; every GPU, TPU core or simulated device it has takes part.
#
#     sh experiments/accelerators/search_one_host.sh CKPT OUT
#
# Expected: progress with the best error so far and the time left; OUT/recipe.json, front.png,
# map.png, history.json. Stopped? The same command goes on. On a CPU it uses one device; simulate
# more with XLA_FLAGS=--xla_force_host_platform_device_count=8 (for tests: it is not faster).
set -eu
qdit search "$1" "$2" --budget bitops=1.0x-g128 --objective paired --per-device "${PER_DEVICE:-1}"
qdit quantize "$1" "$2/quantized" --recipe "$2/recipe.json"
