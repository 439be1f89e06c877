#!/usr/bin/env bash
# Qwen3-30B-A3B, a mixture of 128 experts, on your own conversations: on one node of 8 GPUs, or on two (NNODES=2) with moments in 32 bits.
#
#   bash scripts/sft/SFT_Qwen3_30B_A3B.sh [train|resume|plan]
#   NNODES=2 bash scripts/cluster/train.sbatch scripts/sft/SFT_Qwen3_30B_A3B.sh   # on a SLURM cluster: docs/slurm.md
#
# Before it, once:
#   bash scripts/1_download.sh model Qwen/Qwen3-30B-A3B
#   bash scripts/2_convert.sh assets/checkpoints/Qwen_Qwen3_30B_A3B 1 1
#   DATA_NAME=conversations bash scripts/1_download.sh dataset my_conversations.json
#   OVERLONG=truncate bash scripts/3_tokenize.sh assets/checkpoints/Qwen_Qwen3_30B_A3B assets/data/conversations/conversations.json 8192
#
# Fits (memory by plan): 40 GB: 16 GPUs with RECOMPUTE=full; 48 GB: 16 GPUs with RECOMPUTE=full; 80 GB: 8 GPUs with RECOMPUTE=full; 141 GB: 8 GPUs
# Fits with NNODES=2 (memory by plan): 48 GB: 64 GPUs with RECOMPUTE=full; 80 GB: 16 GPUs with RECOMPUTE=full; 141 GB: 8 GPUs
#
# To write a new recipe, copy this file and edit it. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

: "${MODEL:=Qwen_Qwen3_30B_A3B}"
: "${DATA:=conversations}"
: "${SEQ_LENGTH:=8192}"
# Experts are spread over the GPUs of a node, where rows travel fast; everything else is data-parallel.
: "${EXPERT_PARALLEL_SIZE:=8}"
: "${TENSOR_PARALLEL_SIZE:=1}"
: "${PIPELINE_PARALLEL_SIZE:=1}"
: "${RECOMPUTE:=auto}"
# 8 GPUs of 80 GB hold the model with gradients and moments in 16 bits, 16 with them in 32.
case ${NNODES:-1} in
  1) : "${OPTIMIZER_PRECISION:=bf16}" ;;
  *) : "${OPTIMIZER_PRECISION:=fp32}" ;;
esac

: "${MICRO_BATCH_SIZE:=1}"
: "${GLOBAL_BATCH_SIZE:=64}"
: "${EPOCHS:=1}"
: "${LR_WARMUP_FRACTION:=0.05}"
: "${LR:=1e-5}"
: "${MIN_LR:=1e-6}"
: "${LR_DECAY_STYLE:=cosine}"
: "${WEIGHT_DECAY:=0.1}"
: "${ADAM_BETA1:=0.9}"
: "${ADAM_BETA2:=0.95}"
: "${CLIP_GRAD:=1.0}"
: "${PRECISION:=bf16}"

: "${SPLIT:=100,0,0}"
: "${LOG_INTERVAL:=1}"
: "${SAVE_INTERVALS:=1000}"

: "${OUTPUT_PATH:=$ROOT/outputs/checkpoints/SFT_Qwen3_30B_A3B/epochs_$EPOCHS}"

# shellcheck source=scripts/lib/recipe.sh
source "$ROOT/scripts/lib/recipe.sh"
