#!/bin/sh
# Search on a TPU slice with several hosts, every chip of it measuring candidates.
#
#     sh experiments/accelerators/search_tpu_slice.sh NAME ZONE gs://BUCKET/ckpt gs-mounted/out
#
# Creates nothing: NAME is a running slice (`gcloud compute tpus tpu-vm create NAME --zone ZONE
# --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite`). CKPT and OUT must be paths that
# all hosts see (a mounted bucket or NFS). `--worker=all` starts the same line on every host, and
# `--distributed` lets them find each other.
#
# Expected: as on one host; on 16 chips about 16 candidates at a time. Not yet run on hardware.
set -eu
gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command \
  "pip install -q 'jax[tpu]' qdit-jax && \
   qdit search '$3' '$4' --distributed --budget tpu=1.0x-g128 --per-device 4"
