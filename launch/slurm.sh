#!/usr/bin/env bash
# lrjax on NVIDIA GPUs under SLURM: one process a card, found by jax.distributed from SLURM's variables.
#
#   WORKDIR=/shared/run sbatch --nodes=2 launch/slurm.sh [flags of lrjax.main]
#
# Two minutes before the time is over SLURM sends SIGTERM: the run saves, ends with 0, and the job asks to be queued again.
#SBATCH --job-name=lrjax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=lrjax-%j.log
set -euo pipefail
: "${WORKDIR:?is not set: the directory of the run, on a disk that all nodes share}"
command=(
  srun --kill-on-bad-exit=1
  "${PYTHON:-.venv/bin/python}" -m lrjax.main
  --config="${CONFIG:-configs/llama8b_128k.py}" --workdir="$WORKDIR"
  --config.mesh.context=8 --config.mesh.fsdp=-1 --config.model.context_parallel=ulysses "$@"
)
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
"${command[@]}"
if [ ! -f "$WORKDIR/stages/report.json" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
