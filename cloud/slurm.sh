#!/usr/bin/env bash
# Trains on one node of a SLURM cluster; at the time limit it saves a checkpoint and queues itself again.
#
#   sbatch cloud/slurm.sh
#   CONFIG=rn_configs/rn18_8ep.yaml RUN=runs/rn18_8ep sbatch --gpus-per-node=1 --cpus-per-task=16 cloud/slurm.sh
#
# Run from the repository's root after `make setup`. Further settings go after the script's name.
# tests/test_cloud.py runs it with stand-ins for torchrun and scontrol; on a cluster it is not tested yet.
#SBATCH --job-name=imagenet
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
PATH="$PWD/.venv/bin:$PATH"
config=${CONFIG:-rn_configs/rn50_16ep.yaml}
run=${RUN:-runs/$(basename "$config" .yaml)-$SLURM_JOB_ID} # the number stays when the job is queued again

python -m ffcv_imnet doctor --device=cuda || exit 1

# torchrun is not started by srun: srun answers SIGTERM by killing its tasks at once. B: above has SLURM signal this
# script alone; torchrun hands SIGTERM on, and training ends after the step in hand, with a checkpoint.
again= torchrun= asked=
pass_on() { # once: at a third SIGTERM torchrun leaves its processes alone, and scancel may send one to all
    [ -n "$torchrun" ] && [ -z "$asked" ] && kill -TERM "$torchrun" 2>/dev/null && asked=yes
}
trap 'again=yes; pass_on' USR1 # 180 seconds before the time limit
trap pass_on TERM              # scancel, or the partition needs the node: SLURM decides whether it is queued again

# torchrun kills what has not ended 30 seconds after it was asked to, too early for a step that is being compiled.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

# A shared disk that is slow: read from the node's own.
# cp data/beton/{train,val}.{beton,json} "$TMPDIR"
# set -- --data.train_dataset="$TMPDIR/train.beton" --data.val_dataset="$TMPDIR/val.beton" "$@"

torchrun --standalone --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" train_imagenet.py \
    --config "$config" --logging.folder="$run" --resume auto --device=cuda "$@" &
torchrun=$!
wait "$torchrun"
status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal ends `wait` before its process has ended
    wait "$torchrun"
    status=$?
done
if [ -n "$again" ] && [ "$status" -ne 0 ]; then
    echo "the time limit is near: queued again, to go on from $run/last.pt"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
