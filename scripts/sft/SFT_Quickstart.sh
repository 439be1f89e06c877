#!/usr/bin/env bash
# The quickstart's training: a tiny model learns to sort names on CPU, with every layer split over two processes.
#
#   bash scripts/sft/SFT_Quickstart.sh [train|resume|plan]
#   bash scripts/cluster/train.sbatch scripts/sft/SFT_Quickstart.sh   # on a SLURM cluster: docs/slurm.md
#
# scripts/quickstart.sh makes the model and data. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

: "${MODEL:=quickstart}"
: "${DATA:=quickstart}"
: "${SEQ_LENGTH:=256}"
: "${TENSOR_PARALLEL_SIZE:=2}"
: "${PIPELINE_PARALLEL_SIZE:=1}"

: "${MICRO_BATCH_SIZE:=8}"
: "${GLOBAL_BATCH_SIZE:=8}"
: "${TRAIN_ITERS:=600}"
: "${LR_WARMUP_FRACTION:=0.05}"
: "${LR:=3e-3}" # for random initial weights; a pretrained model needs about a hundredth of this
: "${MIN_LR:=1.5e-4}"
: "${WEIGHT_DECAY:=0.01}"
: "${ADAM_BETA2:=0.99}"
: "${PRECISION:=fp32}"

: "${SPLIT:=98,2,0}"
: "${LOG_INTERVAL:=20}"
: "${SAVE_INTERVALS:=200}"
: "${EVAL_INTERVAL:=100}"

: "${PRETRAIN_CHECKPOINT_PATH:=$ROOT/assets/checkpoints/${MODEL}_Megatron_TP${TENSOR_PARALLEL_SIZE}PP${PIPELINE_PARALLEL_SIZE}}"
: "${DATA_PATH:=$ROOT/assets/data/$DATA/Tokenized-$DATA-$MODEL-${SEQ_LENGTH}_text_document}"
: "${OUTPUT_PATH:=$ROOT/outputs/quickstart/checkpoints}"

# shellcheck source=scripts/lib/recipe.sh
source "$ROOT/scripts/lib/recipe.sh"
