#!/bin/bash
# One run over several machines; requeued and resumed until it is finished. Submit: sbatch docs/slurm.sh
#SBATCH --job-name=switchable
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM three minutes before the end of the time: all ranks save after the same step.
#SBATCH --signal=TERM@180

set -euo pipefail
CONFIG=${CONFIG:-configs/7b.yaml}
DATA=${DATA:?set DATA to files or a folder of text}
OUT=${OUT:-runs/$SLURM_JOB_NAME}      # on a file system that all machines share
CACHE=${CACHE:-runs/cache}            # token files, shared too

MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if compgen -G "$OUT/checkpoints/step-*" > /dev/null; then
  TASK=(--out "$OUT" --cache "$CACHE" --resume)
else
  TASK=("$CONFIG" --data "$DATA" --out "$OUT" --cache "$CACHE" --overwrite)
fi

status=0
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$MASTER:29500" \
  -m switchable pretrain "${TASK[@]}" || status=$?
# Not finished (stopped by the signal, or a rank was lost): go on in a new job. A wrong setting would only fail again,
# and leaves no checkpoint to go on from.
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] && [ ! -e "$OUT/summary.json" ] && compgen -G "$OUT/checkpoints/step-*" > /dev/null; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
