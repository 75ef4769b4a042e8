#!/bin/sh
# One verb (calibrate, search, sample, evaluate) on all hosts of a TPU slice.
#
#     sh experiments/accelerators/tpu_slice.sh NAME ZONE search /mnt/ckpt /mnt/out --budget tpu=1.0x-g128
#     sh experiments/accelerators/tpu_slice.sh NAME ZONE sample /mnt/ckpt --num-samples 50000 --out /mnt/samples.npz
#
# Creates nothing: NAME is a running slice (`gcloud compute tpus tpu-vm create NAME --zone ZONE
# --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite`). CKPT and OUT must be paths that all hosts
# see (a mounted bucket or NFS). `--worker=all` starts the same line on every host, and `--distributed` lets
# them find each other.
#
# Expected: as on one host; 16 chips search about 16 candidates at a time, and each host samples and
# calibrates its share of the batches on its own chips. Not yet run on hardware.
set -eu
name="$1" zone="$2"
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command \
  "pip install -q 'jax[tpu]' qdit-jax && qdit $* --distributed"
