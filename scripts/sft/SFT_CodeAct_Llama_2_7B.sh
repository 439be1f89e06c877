#!/usr/bin/env bash
# CodeAct: Llama-2-7B learns to act by writing code, from 7,139 CodeAct conversations and 71,246 general ones.
#
#   bash scripts/sft/SFT_CodeAct_Llama_2_7B.sh [train|resume|plan]
#   bash scripts/cluster/train.sbatch scripts/sft/SFT_CodeAct_Llama_2_7B.sh   # on a SLURM cluster: docs/slurm.md
#
# Before it, once:
#   bash scripts/1_download.sh model meta-llama/Llama-2-7b-hf
#   bash tools/edit_tokenizer assets/checkpoints/meta_llama_Llama_2_7b_hf --add-token '<|im_start|>' --add-token '<|im_end|>' --template chatml
#   bash scripts/2_convert.sh assets/checkpoints/meta_llama_Llama_2_7b_hf 4 1
#   SPLIT=codeact DATA_NAME=codeact bash scripts/1_download.sh dataset xingyaoww/code-act
#   SPLIT=general DATA_NAME=general bash scripts/1_download.sh dataset xingyaoww/code-act
#   OVERLONG=truncate bash scripts/3_tokenize.sh assets/checkpoints/meta_llama_Llama_2_7b_hf "assets/data/codeact/codeact.json assets/data/general/general.json" 4096
#
# Fits (memory by plan): 24 GB: 8 GPUs with RECOMPUTE_LAYERS=14; 40 GB: 4 GPUs; 48 GB: 4 GPUs; 80 GB: 4 GPUs; 141 GB: 4 GPUs
#
# To write a new recipe, copy this file and edit it. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

: "${MODEL:=meta_llama_Llama_2_7b_hf}"
: "${DATA:=codeact}"
: "${SEQ_LENGTH:=4096}"
: "${TENSOR_PARALLEL_SIZE:=4}"
: "${PIPELINE_PARALLEL_SIZE:=1}"
: "${SEQUENCE_PARALLEL:=1}"
: "${RECOMPUTE:=auto}"

: "${MICRO_BATCH_SIZE:=1}"
: "${GLOBAL_BATCH_SIZE:=32}"
: "${EPOCHS:=5}"
: "${LR_WARMUP_FRACTION:=0.05}"
: "${LR:=1e-5}"
: "${MIN_LR:=1e-6}"
: "${LR_DECAY_STYLE:=cosine}"
: "${WEIGHT_DECAY:=0.01}"
: "${ADAM_BETA1:=0.9}"
: "${ADAM_BETA2:=0.999}"
: "${CLIP_GRAD:=1.0}"
: "${PRECISION:=bf16}"

: "${SPLIT:=100,0,0}"
: "${LOG_INTERVAL:=1}"
: "${SAVE_INTERVALS:=606}" # about once an epoch

: "${OUTPUT_PATH:=$ROOT/outputs/checkpoints/SFT_CodeAct_Llama_2_7B/epochs_$EPOCHS}"

# shellcheck source=scripts/lib/recipe.sh
source "$ROOT/scripts/lib/recipe.sh"
