#!/usr/bin/env bash
# Pretraining on several machines under SLURM, which goes on by itself after the time limit and after preemption.
#   cae-pipe doctor; dvc repro tokenizer        first: the prepared images and the tokenizer
#   sbatch docker/examples/slurm-pretrain.sh    in the repository's root, on a file system that all machines share
#   dvc repro                                   afterwards: the rest of the pipeline
#SBATCH --job-name=cae-pretrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
# Two minutes before the time is up this script, and no one else, gets SIGUSR1. The trainer needs a step and 30 s.
#SBATCH --signal=B:USR1@120
set -euo pipefail

# `runtime.num_processes: auto` in params.yaml is one process for each GPU of a machine.
PET_NNODES=$SLURM_JOB_NUM_NODES
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
PET_MASTER_ADDR=${names%%$'\n'*}
# Jobs that share a machine do not share a port.
PET_MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export PET_NNODES PET_MASTER_ADDR PET_MASTER_PORT

# One launcher on each machine; it has the GPUs to itself. The command is not DVC's, which would hide the exit code.
# shellcheck disable=SC2016  # for the shell on each machine
srun --kill-on-bad-exit=0 --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    bash -c 'PET_NODE_RANK=$SLURM_NODEID exec cae-pipe pretrain' &
step=$!

# srun hands on what it gets to every machine's launcher, which hands it to its ranks. `wait` ends at each signal.
trap 'heard=USR1; kill -USR1 "$step" || true' USR1
trap 'heard=TERM; kill -TERM "$step" || true' TERM
heard=again
while [ -n "$heard" ]; do
    heard=
    code=0
    wait "$step" || code=$?
done

case $code in
    0) dvc commit --force pretrain ;; # dvc.lock then names these weights, as if `dvc repro` had made them
    138) scontrol requeue "$SLURM_JOB_ID" ;; # SIGUSR1: everything is saved
esac
exit "$code"
