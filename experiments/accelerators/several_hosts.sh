#!/bin/sh
# One verb by several processes; here two on this machine, as an example.
#
#     sh experiments/accelerators/several_hosts.sh search CKPT OUT --budget bitops=1.0x-g128
#     sh experiments/accelerators/several_hosts.sh sample CKPT --num-samples 10000 --out samples.npz
#     sh experiments/accelerators/several_hosts.sh evaluate SMALL --against CKPT --out compared
#     sh experiments/accelerators/several_hosts.sh calibrate CKPT stats.npz
#
# On real hosts run one line per host, with the first host's address, and OUT on a disk that all see:
#
#     qdit sample CKPT --out OUT --coordinator 10.0.0.1:9876 --num-processes 2 --process-id 0   # host 0
#     qdit sample CKPT --out OUT --coordinator 10.0.0.1:9876 --num-processes 2 --process-id 1   # host 1
#
# Expected: what one process writes, to the bit where each has as many devices. If a host is lost, the others
# end within a minute with a message; run the same lines again, with as many processes as are left.
set -eu
address="127.0.0.1:${PORT:-9876}"
qdit "$@" --coordinator "$address" --num-processes 2 --process-id 1 &
qdit "$@" --coordinator "$address" --num-processes 2 --process-id 0
wait
