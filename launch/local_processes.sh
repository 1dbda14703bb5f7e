#!/usr/bin/env bash
# N processes of lrjax on this machine, connected over loopback: what a pod does, in small.
#
#   launch/local_processes.sh 2 --config=configs/tiny.py:quick --workdir=runs/two
#
# DEVICES=2 gives every process so many fake CPU devices; PORT, PYTHON as usual. Everything after N goes to lrjax.main.
# SIGTERM goes on to all of them: they save and end with 0. Where one fails or is killed, the others end with it and the
# exit code is its; the same command goes on from the last checkpoint.
set -u
if [ $# -lt 1 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "usage: $0 PROCESSES [flags of lrjax.main]" >&2
  exit 2
fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "$0 needs bash 5.1 or newer (wait -p); this is $BASH_VERSION" >&2
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
  kill -TERM "${pids[@]}" 2>/dev/null
}
trap forward TERM INT
status=0
running=$count
while [ "$running" -gt 0 ]; do
  wait -n -p ended "${pids[@]}"
  code=$?
  [ -n "${ended:-}" ] || continue # a signal ends `wait` early
  running=$((running - 1))
  for index in "${!pids[@]}"; do
    [ "${pids[index]}" = "$ended" ] && unset "pids[index]"
  done
  if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
    status=$code
    # The others would wait in a collective for the one that is gone, until JAX's heartbeat notices (100 s).
    [ "$running" -eq 0 ] || kill -KILL "${pids[@]}" 2>/dev/null
  fi
done
exit "$status"
