#!/usr/bin/env bash
# The quickstart's training: a tiny model learns to sort names, on CPU, with each layer shared by two processes.
#
#   bash scripts/sft/SFT_Quickstart.sh [train|resume|plan]
#
# scripts/quickstart.sh makes the model and the data. A variable in the environment overrides the value here.
root=$(cd "$(dirname "$(readlink -f "$0")")/../.." && pwd)

: "${SEQ_LENGTH:=256}"
: "${TENSOR_PARALLEL_SIZE:=2}"
: "${PIPELINE_PARALLEL_SIZE:=1}"

: "${MICRO_BATCH_SIZE:=8}"
: "${GLOBAL_BATCH_SIZE:=8}"
: "${TRAIN_ITERS:=600}"
: "${LR_WARMUP_ITERS:=30}"
: "${LR:=3e-3}" # the weights begin at random; a model that knows something takes a hundredth of it
: "${MIN_LR:=1.5e-4}"
: "${WEIGHT_DECAY:=0.01}"
: "${ADAM_BETA2:=0.99}"
: "${PRECISION:=fp32}"

: "${SPLIT:=98,2,0}"
: "${LOG_INTERVAL:=10}"
: "${SAVE_INTERVALS:=200}"
: "${EVAL_INTERVAL:=100}"

: "${PRETRAIN_CHECKPOINT_PATH:=$root/assets/checkpoints/quickstart_Megatron_TP${TENSOR_PARALLEL_SIZE}PP${PIPELINE_PARALLEL_SIZE}}"
: "${DATA_PATH:=$root/assets/data/quickstart/Tokenized-quickstart-quickstart-${SEQ_LENGTH}_text_document}"
: "${OUTPUT_PATH:=$root/outputs/quickstart/checkpoints}"

# shellcheck source=scripts/4_train.sh
source "$root/scripts/4_train.sh"
