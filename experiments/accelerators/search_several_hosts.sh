#!/bin/sh
# Search by several processes; here two on this machine, as an example.
#
#     sh experiments/accelerators/search_several_hosts.sh CKPT OUT
#
# On real hosts run one line a host, with the first host's address, and OUT on a disk that all of
# them share (the state is written by the first process and read by all):
#
#     qdit search CKPT OUT --coordinator 10.0.0.1:9876 --num-processes 2 --process-id 0   # host 0
#     qdit search CKPT OUT --coordinator 10.0.0.1:9876 --num-processes 2 --process-id 1   # host 1
#
# Expected: the same recipe as on one host, to the bit. If a host is lost, all processes end with a
# message; run the same lines again, with as many processes as are left, and the search goes on.
set -eu
address="127.0.0.1:${PORT:-9876}"
qdit search "$1" "$2" --coordinator "$address" --num-processes 2 --process-id 1 &
qdit search "$1" "$2" --coordinator "$address" --num-processes 2 --process-id 0
wait
