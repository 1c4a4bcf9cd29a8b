#!/usr/bin/env bash
# Runs a stage of the 38B on a Slurm cluster. From the repository's root:
#
#   sbatch configs/r1v3-38b/launch/slurm.sh grpo configs/r1v3-38b/grpo_4k.yaml run=runs/r1v3-38b
#   sbatch --nodes 4 ... for 32 GPUs, --nodes 16 for 128; --partition and --account are yours.
#
# Preemption and time limit: ten minutes before the end, Slurm sends SIGUSR1 to this script (when it
# preempts, too, with PreemptParameters=send_user_signal); the stage finishes its step, saves and
# exits, and the same job is queued again and goes on with --resume.
#
# A job that fails once its stage has begun (a GPU or a node that is lost) is queued again as well,
# until it has failed RETRIES (3) times without a new checkpoint; sbatch --exclude=NODE ... leaves a
# bad node out. A job that fails before, for a wrong setting, is not.
#
# NCCL: the defaults are right on most fabrics. If ranks cannot reach each other, name the
# interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and the InfiniBand devices (NCCL_IB_HCA);
# NCCL_DEBUG=INFO in front of sbatch prints what was chosen.
#SBATCH --job-name=r1v3
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=r1v3-%j.log
set -euo pipefail

if (($# < 2)); then
    echo "usage: sbatch $0 sft|grpo|connector|eval CONFIG [key=value ...]" >&2
    exit 2
fi

# Slurm runs a copy of this file, so the launcher is found from the folder of submission.
launcher="$SLURM_SUBMIT_DIR/configs/r1v3-38b/launch/torchrun.sh"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES="$SLURM_JOB_NUM_NODES"
export HEAD="$head:$((29500 + SLURM_JOB_ID % 1000))"
export JOB="$SLURM_JOB_ID"

arguments=("$@")
# A job that was queued again goes on; evaluation goes on by itself.
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ $1 != eval ]]; then
    arguments+=(--resume)
fi

# The run folder: the last run=... of the command line, or that of the configuration.
run=$(sed -n 's/^run:[[:space:]]*\([^#[:space:]]*\).*/\1/p' "$2" | head -n 1)
for argument in "${@:3}"; do
    if [[ $argument == run=* ]]; then run=${argument#run=}; fi
done

# Counts a failure; succeeds if the job may try again.
may_retry() {
    [[ -f "$run/config/$1.yaml" ]] || return 1
    local newest counted="" failures=0
    newest=$(find "$run/checkpoints/$1" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1)
    if [[ -f "$run/failures-$1" ]]; then
        IFS=$'\t' read -r failures counted <"$run/failures-$1" || true
    fi
    if [[ $counted != "$newest" ]]; then failures=0; fi
    failures=$((failures + 1))
    printf '%s\t%s\n' "$failures" "$newest" >"$run/failures-$1"
    echo "$(date --iso-8601=seconds) failure $failures after ${newest:-no checkpoint}" >&2
    ((failures <= ${RETRIES:-3}))
}

stopped=0
stop() {
    stopped=1
    echo "$(date --iso-8601=seconds) asked to stop; the stage saves" >&2
    scancel --signal=USR1 "$SLURM_JOB_ID.0" || true # torchrun.sh passes it on to the workers
}
trap stop USR1 TERM

srun --kill-on-bad-exit=1 bash "$launcher" "${arguments[@]}" &
step=$!
status=0
# A signal interrupts wait; the second one waits for the stage to have saved.
wait "$step" || status=$?
if ((stopped)); then
    wait "$step" || status=$?
    scontrol requeue "$SLURM_JOB_ID"
elif ((status)) && may_retry "$1"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
