#!/usr/bin/env bash
# DPO of Qwen2.5-Instruct of any size, MODEL_SIZE=0.5B, 1.5B, 3B, 7B, 14B, 32B or 72B, on your own pairs of answers, with AutoAlign's
# values (docs/preferences.md). A row holds several pairs: 16 rows are more than AutoAlign's 16 pairs.
#
#   bash scripts/dpo/DPO_Qwen2.5.sh [train|resume|plan|reference]
#   bash scripts/cluster/train.sbatch scripts/dpo/DPO_Qwen2.5.sh   # on a SLURM cluster: docs/slurm.md
#
# Before it, once; a model of SFT (scripts/5_export.sh) is the usual start in place of the downloaded one:
#   bash scripts/1_download.sh model Qwen/Qwen2.5-3B-Instruct
#   bash scripts/2_convert.sh assets/checkpoints/Qwen_Qwen2.5_3B_Instruct 2 2
#   DATA_NAME=pairs bash scripts/1_download.sh dataset my_pairs.json
#   bash scripts/3_tokenize.sh assets/checkpoints/Qwen_Qwen2.5_3B_Instruct assets/data/pairs/pairs.json 4096
#
# Fits with 0.5B (memory by plan): 24 GB: 4 GPUs; 40 GB: 4 GPUs; 48 GB: 4 GPUs; 80 GB: 4 GPUs; 141 GB: 4 GPUs
# Fits with 1.5B (memory by plan): 24 GB: 4 GPUs with RECOMPUTE=selective; 40 GB: 4 GPUs; 48 GB: 4 GPUs; 80 GB: 4 GPUs; 141 GB: 4 GPUs
# Fits with 3B (memory by plan): 24 GB: 4 GPUs with RECOMPUTE_LAYERS=15; 40 GB: 4 GPUs with RECOMPUTE=selective; 48 GB: 4 GPUs with RECOMPUTE=selective; 80 GB: 4 GPUs; 141 GB: 4 GPUs
# Fits with 7B (memory by plan): 24 GB: 16 GPUs with RECOMPUTE_LAYERS=13; 40 GB: 8 GPUs with RECOMPUTE_LAYERS=9; 48 GB: 4 GPUs with RECOMPUTE_LAYERS=12; 80 GB: 4 GPUs; 141 GB: 4 GPUs
# Fits with 14B (memory by plan): 24 GB: 32 GPUs with RECOMPUTE_LAYERS=16; 40 GB: 8 GPUs with RECOMPUTE_LAYERS=21; 48 GB: 8 GPUs with RECOMPUTE_LAYERS=14; 80 GB: 8 GPUs; 141 GB: 8 GPUs
# Fits with 32B (memory by plan): 24 GB: 64 GPUs with RECOMPUTE_LAYERS=27; 40 GB: 32 GPUs with RECOMPUTE_LAYERS=13; 48 GB: 16 GPUs with RECOMPUTE_LAYERS=24; 80 GB: 16 GPUs; 141 GB: 16 GPUs
# Fits with 72B (memory by plan): 40 GB: 64 GPUs with RECOMPUTE_LAYERS=9; 48 GB: 64 GPUs with RECOMPUTE_LAYERS=2; 80 GB: 32 GPUs with RECOMPUTE=selective; 141 GB: 32 GPUs
#
# To write a new recipe, copy this file and edit it. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

: "${MODEL_SIZE:=3B}"
: "${MODEL:=Qwen_Qwen2.5_${MODEL_SIZE}_Instruct}"
: "${DATA:=pairs}"
: "${SEQ_LENGTH:=4096}"
case $MODEL_SIZE in
  14B) : "${TENSOR_PARALLEL_SIZE:=4}" "${SEQUENCE_PARALLEL:=1}" ;;
  32B) : "${TENSOR_PARALLEL_SIZE:=8}" "${SEQUENCE_PARALLEL:=1}" ;;
  72B) : "${TENSOR_PARALLEL_SIZE:=8}" "${SEQUENCE_PARALLEL:=1}" "${PIPELINE_PARALLEL_SIZE:=4}" ;;
esac
: "${TENSOR_PARALLEL_SIZE:=2}"
: "${PIPELINE_PARALLEL_SIZE:=2}"
: "${SEQUENCE_PARALLEL:=0}"
: "${CONTEXT_PARALLEL_SIZE:=1}"
: "${RECOMPUTE:=auto}"

: "${OBJECTIVE:=dpo}"
: "${MICRO_BATCH_SIZE:=4}"
: "${GLOBAL_BATCH_SIZE:=16}"
: "${EPOCHS:=1}"
: "${LR_WARMUP_FRACTION:=0.00016}"
: "${LR:=5e-6}"
: "${MIN_LR:=0}"
: "${LR_DECAY_STYLE:=cosine}"
: "${WEIGHT_DECAY:=0.1}"
: "${ADAM_BETA1:=0.9}"
: "${ADAM_BETA2:=0.95}"
: "${CLIP_GRAD:=1.0}"
: "${PRECISION:=bf16}"

: "${SPLIT:=100,0,0}"
: "${LOG_INTERVAL:=1}"
: "${SAVE_INTERVALS:=1000}"

: "${OUTPUT_PATH:=$ROOT/outputs/checkpoints/DPO_Qwen2.5/Qwen2.5_${MODEL_SIZE}_epochs_$EPOCHS}"

# shellcheck source=scripts/lib/recipe.sh
source "$ROOT/scripts/lib/recipe.sh"
