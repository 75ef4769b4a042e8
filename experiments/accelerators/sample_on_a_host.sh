#!/bin/sh
# One host's share of the samples of several hosts: the same labels, a seed of its own.
#
#     HOST=0 sh experiments/accelerators/sample_on_a_host.sh CKPT OUT LABELS [OPTIONS]      # host 0
#     HOST=1 sh experiments/accelerators/sample_on_a_host.sh CKPT OUT LABELS [OPTIONS]      # host 1
#     python experiments/accelerators/join_samples.py OUT samples.npz                       # any of them
#
# The hosts know nothing of each other: each is a run of `qdit sample` with all devices of its host, and a lost
# one is run again. On a TPU slice each process must be kept to its own host's chips, as for a single host, by
# TPU_PROCESS_BOUNDS=1,1,1 and TPU_CHIPS_PER_PROCESS_BOUNDS (2,2,1 on a host with four); not run on hardware.
set -eu
checkpoint="$1" out="$2" labels="$3"
shift 3
mkdir -p "$out"
qdit sample "$checkpoint" --labels "$labels" --seed "$HOST" --out "$out/samples-$HOST.npz" "$@"
