#!/usr/bin/env bash
# N processes of lrjax on this machine, connected over loopback: what a pod does, in small.
#
#   launch/local_processes.sh 2 --config=configs/tiny.py:quick --workdir=runs/two
#
# DEVICES=2 gives every process so many fake CPU devices; PORT, PYTHON as usual. Everything after N goes to lrjax.main.
# SIGTERM goes on to all of them: they save and end with 0. The exit code is that of the first that failed.
set -u
if [ $# -lt 1 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "usage: $0 PROCESSES [flags of lrjax.main]" >&2
  exit 2
fi
count=$1
shift
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
if [ "$JAX_PLATFORMS" = cpu ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
fi
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-12355}
export JAX_NUM_PROCESSES=$count
pids=()
for ((id = 0; id < count; id++)); do
  JAX_PROCESS_ID=$id "${PYTHON:-python}" -m lrjax.main "$@" &
  pids+=($!)
done
# shellcheck disable=SC2317,SC2329  # called by the trap
forward() {
  signalled=1
  kill -TERM "${pids[@]}" 2>/dev/null
}
trap forward TERM INT
status=0
for pid in "${pids[@]}"; do
  signalled=1
  while [ -n "$signalled" ]; do # a signal ends `wait` early
    signalled=
    wait "$pid"
    code=$?
  done
  if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
    status=$code
    # One that is gone would leave the others waiting for it.
    kill -TERM "${pids[@]}" 2>/dev/null
  fi
done
exit "$status"
