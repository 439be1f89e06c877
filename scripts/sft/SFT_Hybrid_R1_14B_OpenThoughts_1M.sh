#!/usr/bin/env bash
# Hybrid reasoning: DeepSeek-R1-Distill-Qwen-14B learns to answer after <think> or <short>.
#
#   bash scripts/sft/SFT_Hybrid_R1_14B_OpenThoughts_1M.sh [train|resume|plan]
#   bash scripts/cluster/train.sbatch scripts/sft/SFT_Hybrid_R1_14B_OpenThoughts_1M.sh   # on a SLURM cluster: docs/slurm.md
#
# Before it, once:
#   bash scripts/1_download.sh model deepseek-ai/DeepSeek-R1-Distill-Qwen-14B
#   bash tools/edit_tokenizer assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_14B --rename '<|quad_start|>=<short>' --keep-thinking
#   bash scripts/2_convert.sh assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_14B 4 1
#   bash scripts/1_download.sh dataset Vinnnf/Hybrid-OpenThoughts2-1M-1.5B
#   GROUP_KEY=instruction OVERLONG=truncate bash scripts/3_tokenize.sh assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_14B \
#     assets/data/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B.json 16384
#
# Fits (memory by plan): 40 GB: 16 GPUs with RECOMPUTE=full; 48 GB: 16 GPUs with RECOMPUTE=full; 80 GB: 4 GPUs with RECOMPUTE=full; 141 GB: 4 GPUs
#
# The values are those of the published 1.5B recipe; nobody has published a run of this size.
#
# To make a recipe of your own, copy this file and edit it. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for root in "$(dirname "$(readlink -f "$0")")/../.." "${SLURM_SUBMIT_DIR:-/}"{,/..,/../..}; do [[ -f $root/scripts/4_train.sh ]] && break; done
root=$(cd "$root" && pwd)

: "${ASSETS_DIR:=$root/assets}"
: "${MODEL:=deepseek_ai_DeepSeek_R1_Distill_Qwen_14B}"
: "${DATA:=Vinnnf-Hybrid-OpenThoughts2-1M-1.5B}"
: "${SEQ_LENGTH:=16384}"
: "${TENSOR_PARALLEL_SIZE:=4}"
: "${PIPELINE_PARALLEL_SIZE:=1}"
: "${CONTEXT_PARALLEL_SIZE:=1}"
: "${SEQUENCE_PARALLEL:=1}"
: "${RECOMPUTE:=auto}"

: "${MICRO_BATCH_SIZE:=1}"
: "${GLOBAL_BATCH_SIZE:=128}"
: "${TRAIN_ITERS:=17000}"
: "${LR_WARMUP_ITERS:=850}" # 5 % of the steps
: "${LR:=1e-5}"
: "${MIN_LR:=1e-6}"
: "${LR_DECAY_STYLE:=cosine}"
: "${WEIGHT_DECAY:=0.1}"
: "${ADAM_BETA1:=0.9}"
: "${ADAM_BETA2:=0.95}"
: "${CLIP_GRAD:=1.0}"
: "${PRECISION:=bf16}"

: "${SPLIT:=999,1,0}"
: "${LOG_INTERVAL:=10}"
: "${SAVE_INTERVALS:=1000}"
: "${EVAL_INTERVAL:=100}"
: "${EVAL_ITERS:=10}"

TAG=SFT_Hybrid_R1_14B_OpenThoughts_1M
: "${PRETRAIN_CHECKPOINT_PATH:=$ASSETS_DIR/checkpoints/${MODEL}_Megatron_TP${TENSOR_PARALLEL_SIZE}PP${PIPELINE_PARALLEL_SIZE}}"
: "${DATA_PATH:=$ASSETS_DIR/data/$DATA/Tokenized-$DATA-$MODEL-${SEQ_LENGTH}_text_document}"
: "${OUTPUT_PATH:=$root/outputs/checkpoints/$TAG/train_iters_$TRAIN_ITERS}"

# shellcheck source=scripts/4_train.sh
source "$root/scripts/4_train.sh"
