#!/usr/bin/env bash
# A Cloud TPU slice by queued resource, lrjax on all of its hosts, and the slice deleted afterwards.
#
#   launch/tpu_vm.sh create                 ask for the slice and wait for it
#   launch/tpu_vm.sh run [flags]            install this checkout on every host and run lrjax.main there
#   launch/tpu_vm.sh delete
#
# Settings, with their defaults: NAME=lrjax ZONE=us-east5-a ACCELERATOR=v5p-32 (v5p:2x2x4) VERSION=v2-alpha-tpuv5
# WORKDIR (gs://...), CONFIG=configs/llama8b_128k.py, SPOT=1 for preemptible. DRY_RUN=1 prints the commands.
set -euo pipefail
NAME=${NAME:-lrjax}
ZONE=${ZONE:-us-east5-a}
ACCELERATOR=${ACCELERATOR:-v5p-32}
VERSION=${VERSION:-v2-alpha-tpuv5}
CONFIG=${CONFIG:-configs/llama8b_128k.py}

do_it() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

case ${1:-} in
  create)
    spot=()
    if [ -n "${SPOT:-}" ]; then spot=(--spot); fi
    do_it gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$VERSION" "${spot[@]}"
    until [ -n "${DRY_RUN:-}" ]; do
      state=$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)')
      echo "$NAME: $state"
      case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDED) exit 1 ;;
      esac
      sleep 60
    done
    ;;
  run)
    shift
    : "${WORKDIR:?is not set: the directory of the run, gs://... or on a disk that all hosts share}"
    archive=$(mktemp --suffix=.tar.gz)
    do_it git archive --output="$archive" HEAD
    do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:lrjax.tar.gz" --zone="$ZONE" --worker=all
    on_all "mkdir -p lrjax && tar xzf lrjax.tar.gz -C lrjax && cd lrjax && python3 -m venv .venv &&
      .venv/bin/pip install -q -r requirements-tpu.txt"
    # Every host runs the same command; jax.distributed finds the others.
    on_all "cd lrjax && .venv/bin/python -m lrjax.main --config=$CONFIG --workdir=$WORKDIR $*"
    ;;
  delete)
    do_it gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
    ;;
  *)
    echo "usage: $0 create | run [flags of lrjax.main] | delete" >&2
    exit 2
    ;;
esac
