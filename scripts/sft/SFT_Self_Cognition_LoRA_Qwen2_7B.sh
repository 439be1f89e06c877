#!/usr/bin/env bash
# Self-cognition with LoRA adapters: Qwen2-7B-Instruct learns a new name and author on one GPU, mixed with 1,000 rows of general data.
#
#   bash scripts/sft/SFT_Self_Cognition_LoRA_Qwen2_7B.sh [train|resume|plan]
#   bash scripts/cluster/train.sbatch scripts/sft/SFT_Self_Cognition_LoRA_Qwen2_7B.sh   # on a SLURM cluster: docs/slurm.md
#
# Before it, once:
#   bash scripts/1_download.sh model Qwen/Qwen2-7B-Instruct
#   bash scripts/2_convert.sh assets/checkpoints/Qwen_Qwen2_7B_Instruct 1 1
#   DATA_NAME=self_cognition bash scripts/1_download.sh dataset modelscope/self-cognition
#   MODEL_NAME='Xiao Huang' MODEL_AUTHOR=ModelScope bash scripts/3_tokenize.sh assets/checkpoints/Qwen_Qwen2_7B_Instruct "assets/data/self_cognition/self_cognition.json#500 \
#     sharegpt.jsonl#500 codefuse.jsonl#250 metamathqa.jsonl#250" 2048
#
# Fits (memory by plan): 24 GB: 1 GPU with RECOMPUTE=selective; 40 GB: 1 GPU; 48 GB: 1 GPU; 80 GB: 1 GPU; 141 GB: 1 GPU
#
# The last three files are subsets of the data set swift/swift-sft-mixture on modelscope.cn. Rows are packed, so a step of 4 rows
# holds several times as many conversations as a step of 4 unpacked samples. The same with all weights:
# SFT_Self_Cognition_Qwen2_7B.sh.
#
# To write a new recipe, copy this file and edit it. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

: "${MODEL:=Qwen_Qwen2_7B_Instruct}"
: "${DATA:=self_cognition}"
: "${SEQ_LENGTH:=2048}"
: "${TENSOR_PARALLEL_SIZE:=1}"
: "${PIPELINE_PARALLEL_SIZE:=1}"
: "${RECOMPUTE:=auto}"

: "${LORA_RANK:=8}"
: "${LORA_ALPHA:=32}"
: "${LORA_DROPOUT:=0.05}"
: "${LORA_TARGETS:=all}"

: "${MICRO_BATCH_SIZE:=1}"
: "${GLOBAL_BATCH_SIZE:=4}"
: "${EPOCHS:=1}"
: "${LR_WARMUP_FRACTION:=0.05}"
: "${LR:=1e-4}"
: "${MIN_LR:=1e-5}"
: "${LR_DECAY_STYLE:=cosine}"
: "${WEIGHT_DECAY:=0.1}"
: "${ADAM_BETA1:=0.9}"
: "${ADAM_BETA2:=0.95}"
: "${CLIP_GRAD:=1.0}"
: "${PRECISION:=bf16}"

: "${SPLIT:=99,1,0}"
: "${LOG_INTERVAL:=5}"
: "${SAVE_INTERVALS:=200}"
: "${EVAL_INTERVAL:=200}"

: "${OUTPUT_PATH:=$ROOT/outputs/checkpoints/SFT_Self_Cognition_LoRA_Qwen2_7B/epochs_$EPOCHS}"

# shellcheck source=scripts/lib/recipe.sh
source "$ROOT/scripts/lib/recipe.sh"
