#!/usr/bin/env bash
# LoRA adapters for Qwen2.5-Instruct of any size (MODEL_SIZE=0.5B, 1.5B, 3B, 7B, 14B, 32B or 72B), or another MODEL.
#
#   bash scripts/sft/SFT_LoRA.sh [train|resume|plan]
#   bash scripts/cluster/train.sbatch scripts/sft/SFT_LoRA.sh   # on a SLURM cluster: docs/slurm.md
#
# Before it, once:
#   bash scripts/1_download.sh model Qwen/Qwen2.5-7B-Instruct
#   bash scripts/2_convert.sh assets/checkpoints/Qwen_Qwen2.5_7B_Instruct 1 1
#   DATA_NAME=conversations bash scripts/1_download.sh dataset my_conversations.json
#   OVERLONG=truncate bash scripts/3_tokenize.sh assets/checkpoints/Qwen_Qwen2.5_7B_Instruct assets/data/conversations/conversations.json 4096
#
# Fits with 0.5B (memory by plan): 24 GB: 1 GPU; 40 GB: 1 GPU; 48 GB: 1 GPU; 80 GB: 1 GPU; 141 GB: 1 GPU
# Fits with 1.5B (memory by plan): 24 GB: 1 GPU; 40 GB: 1 GPU; 48 GB: 1 GPU; 80 GB: 1 GPU; 141 GB: 1 GPU
# Fits with 3B (memory by plan): 24 GB: 1 GPU; 40 GB: 1 GPU; 48 GB: 1 GPU; 80 GB: 1 GPU; 141 GB: 1 GPU
# Fits with 7B (memory by plan): 24 GB: 1 GPU with RECOMPUTE_LAYERS=15; 40 GB: 1 GPU; 48 GB: 1 GPU; 80 GB: 1 GPU; 141 GB: 1 GPU
# Fits with 14B (memory by plan): 40 GB: 1 GPU with RECOMPUTE_LAYERS=33; 48 GB: 1 GPU with RECOMPUTE_LAYERS=20; 80 GB: 1 GPU; 141 GB: 1 GPU
# Fits with 32B (memory by plan): 80 GB: 1 GPU with RECOMPUTE_LAYERS=50; 141 GB: 1 GPU
# Fits with 72B (memory by plan): 48 GB: 4 GPUs with RECOMPUTE_LAYERS=57; 80 GB: 4 GPUs; 141 GB: 4 GPUs
#
# 5_export.sh writes a PEFT folder, or a whole model with MERGE=1. docs/lora.md: what to choose, and how to continue an adapter.
#
# To write a new recipe, copy this file and edit it. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

: "${MODEL_SIZE:=7B}"
: "${MODEL:=Qwen_Qwen2.5_${MODEL_SIZE}_Instruct}"
: "${DATA:=conversations}"
: "${SEQ_LENGTH:=4096}"
case $MODEL_SIZE in
  72B) : "${TENSOR_PARALLEL_SIZE:=4}" "${SEQUENCE_PARALLEL:=1}" ;;
esac
: "${TENSOR_PARALLEL_SIZE:=1}"
: "${PIPELINE_PARALLEL_SIZE:=1}"
: "${SEQUENCE_PARALLEL:=0}"
: "${RECOMPUTE:=auto}"

: "${LORA_RANK:=16}"
: "${LORA_ALPHA:=32}"
: "${LORA_DROPOUT:=0}"
: "${LORA_TARGETS:=all}"

: "${MICRO_BATCH_SIZE:=1}"
: "${GLOBAL_BATCH_SIZE:=16}"
: "${EPOCHS:=1}"
: "${LR_WARMUP_FRACTION:=0.03}"
: "${LR:=1e-4}"
: "${MIN_LR:=1e-5}"
: "${LR_DECAY_STYLE:=cosine}"
: "${WEIGHT_DECAY:=0.1}"
: "${ADAM_BETA1:=0.9}"
: "${ADAM_BETA2:=0.95}"
: "${CLIP_GRAD:=1.0}"
: "${PRECISION:=bf16}"

: "${SPLIT:=99,1,0}"
: "${LOG_INTERVAL:=1}"
: "${SAVE_INTERVALS:=500}"
: "${EVAL_INTERVAL:=100}"

: "${OUTPUT_PATH:=$ROOT/outputs/checkpoints/SFT_LoRA/${MODEL}_rank_${LORA_RANK}_epochs_$EPOCHS}"

# shellcheck source=scripts/lib/recipe.sh
source "$ROOT/scripts/lib/recipe.sh"
