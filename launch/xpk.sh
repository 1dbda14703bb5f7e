#!/usr/bin/env bash
# lrjax on a GKE cluster of TPU slices by xpk (https://github.com/AI-Hypercomputer/xpk), also on several slices.
#
#   CLUSTER=my-cluster WORKDIR=gs://bucket/run launch/xpk.sh [flags of lrjax.main]
#
# Settings: TPU_TYPE=v5p-32 SLICES=1 NAME=lrjax CONFIG=configs/llama8b_128k.py IMAGE (a base image with Python 3.11 and
# requirements-tpu.txt). With SLICES=2 and more, set --config.mesh.data to it: only gradients cross between slices.
# RESTARTS=10 times a preempted workload starts again and goes on. DRY_RUN=1 prints the command.
set -euo pipefail
: "${CLUSTER:?is not set: the name of the cluster}" "${WORKDIR:?is not set: the directory of the run, gs://...}"
SLICES=${SLICES:-1}
command=(
  xpk workload create
  --cluster "$CLUSTER"
  --workload "${NAME:-lrjax}"
  --tpu-type "${TPU_TYPE:-v5p-32}"
  --num-slices "$SLICES"
  --max-restarts "${RESTARTS:-10}"
  --base-docker-image "${IMAGE:-python:3.11}"
  --script-dir .
  --command "pip install -q -r requirements-tpu.txt &&
    python -m lrjax.main --config=${CONFIG:-configs/llama8b_128k.py} --workdir=$WORKDIR --config.mesh.data=$SLICES $*"
)
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  "${command[@]}"
fi
