#!/usr/bin/env bash
# Starts a stage with torchrun on this node; run the same line on every node of the job.
#
#   one node:   launch/torchrun.sh eval configs/r1v3-38b/eval.yaml
#   N nodes:    NODES=8 HEAD=node0:29500 launch/torchrun.sh grpo configs/r1v3-38b/grpo_4k.yaml
#   go on:      ... launch/torchrun.sh grpo configs/r1v3-38b/grpo_4k.yaml --resume
#
# GPUS (of a node) defaults to all. Say `r1v3 plan <config> --gpus N` first.
set -euo pipefail

if (($# < 2)); then
    echo "usage: [NODES=n HEAD=host:port] $0 sft|grpo|connector|eval CONFIG [key=value ...] [--resume]" >&2
    exit 2
fi

nodes=${NODES:-1}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
rendezvous=(--standalone)
if ((nodes > 1)); then
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "${HEAD:?HEAD=host:port of the first node}"
        --rdzv-id "${JOB:-r1v3}")
fi

# One thread per process for what little runs on the CPU; raise it where the loaders wait.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
# Packed micro-batches differ in length; without this their sizes fragment the memory.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Sequence parallelism on Hopper: communication must be queued before the products that hide it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# A collective that hangs ends the process instead of waiting for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# No restarts by torchrun: a stage goes on from its checkpoint with --resume, all ranks together.
# It gets a session of its own, because it gives its workers only seconds after a signal; here a
# signal (SIGUSR1, SIGTERM, Ctrl-C) goes to the workers alone, which finish their step and save.
setsid torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts 0 "${rendezvous[@]}" \
    -m r1v3 "$@" &
agent=$!
trap 'pkill -TERM -P "$agent" || true' USR1 TERM INT

while :; do
    status=0
    wait "$agent" || status=$?
    # A trapped signal ends wait as well, with a status above 128.
    if ((status <= 128)) || ! kill -0 "$agent" 2>/dev/null; then
        exit "$status"
    fi
done
