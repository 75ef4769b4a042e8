#!/bin/sh
# The searched recipes of the packaged digit model, and what they give by `best` against uniform groups.
#
#     sh experiments/recipes/search_digits.sh WORK      # WORK: a folder for checkpoints and states
#
# About 5 minutes on 2 free cores. Writes experiments/recipes/digits-*.json and prints what `qdit verify` says of
# each and of the uniform recipe that its budget is relative to (README.md here has the figures). Stopped? The same
# command goes on.
set -eu
here="$(dirname "$0")" work="$1"
mkdir -p "$work"
[ -e "$work/digits" ] || python -c "
import sys
from qdit_jax.demo import PACKAGED
PACKAGED['digits'].convert(sys.argv[1])" "$work/digits"

search() { # NAME, options of qdit search
  name="$1"; shift
  [ -e "$work/$name/recipe.json" ] || qdit search "$work/digits" "$work/$name" --quiet --steps 8 \
    --num-batches 2 --batch-size 10 --transforms none smooth "$@"
  cp "$work/$name/recipe.json" "$here/digits-$name.json"
}
measure() { # TITLE, options of qdit quantize
  title="$1"; shift
  qdit quantize "$work/digits" "$work/small" --force --quiet --method best --num-samples 16 --steps 20 "$@"
  qdit verify "$work/small" --against "$work/digits" --no-timing --num-samples 20 --steps 20 --json \
    2>/dev/null | python -c "
import json, sys
found = json.load(sys.stdin)
print(sys.argv[1], found['final_db'], found['bytes'] if 'bytes' in found else '')" "$title"
}

search w4a8-bitops --budget bitops=1.0x-g64 --group-sizes 32 64 128
search w4a8-bytes --budget bytes=1.0x-g64 --group-sizes 32 64 128
measure digits-w4a8-bitops --recipe "$here/digits-w4a8-bitops.json"
measure digits-w4a8-bytes --recipe "$here/digits-w4a8-bytes.json"
measure uniform-w4a8-g64 --recipe w4a8 --group-size 64
