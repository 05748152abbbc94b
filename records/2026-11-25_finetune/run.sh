#!/usr/bin/env bash
# All runs of this record, one after another; started again it goes on where it was. From the root of the project, with
# .beton files of both data sets (README.md):   nice bash records/2026-11-25_finetune/run.sh [LITE0_WEIGHTS.pth]
set -euo pipefail
here=records/2026-11-25_finetune
export OMP_NUM_THREADS=1
go() { python train_imagenet.py --resume auto "$@"; }

go --config "$here/tiny100.yaml"
go --config "$here/tiny100_full.yaml"
imagenette() { # FOLDER SEED OPTIONS
    go --config "$here/imagenette.yaml" --training.seed="$2" --logging.folder="runs/finetune/$1_$2" "${@:3}"
}
weights=runs/finetune/tiny100/last.pt
# The body's learning rate is chosen on a seed of its own.
for factor in 1 0.3 0.1; do imagenette "body_$factor" 100 --model.weights=$weights --lr.body_lr_mult=$factor; done
for seed in 1 2 3; do
    imagenette random10 "$seed" --training.epochs=10 --lr.lr_peak_epoch=1.25
    imagenette weights3 "$seed" --model.weights=$weights --lr.body_lr_mult="${BODY_LR_MULT:-1}"
done
full=runs/finetune/tiny100_full/last.pt
imagenette full_body1 100 --model.weights=$full
imagenette full_b64 100 --model.weights=$full --training.batch_size=64
imagenette full_body0.5 100 --model.weights=$full --lr.body_lr_mult=0.5
for seed in 1 2 3; do imagenette full_weights3 "$seed" --model.weights=$full; done
if [ $# -gt 0 ]; then
    go --config "$here/lite0.yaml" --model.weights="$1"
    go --config "$here/lite0.yaml" --logging.folder=runs/finetune/lite0_random
fi
