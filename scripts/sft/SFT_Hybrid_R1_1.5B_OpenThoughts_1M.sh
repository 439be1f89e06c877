#!/usr/bin/env bash
# Hybrid reasoning: a DeepSeek-R1 distillation learns to answer after <think> or <short>.
# MODEL_SIZE is 1.5B (the default), 7B, 14B, 32B or Llama_8B.
#
#   bash scripts/sft/SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh [train|resume|plan]
#   bash scripts/cluster/train.sbatch scripts/sft/SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh   # on a SLURM cluster: docs/slurm.md
#
# Before it, once:
#   bash scripts/1_download.sh model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
#   bash tools/edit_tokenizer assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B --rename '<|quad_start|>=<short>' --keep-thinking
#   bash scripts/2_convert.sh assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B 1 1
#   bash scripts/1_download.sh dataset Vinnnf/Hybrid-OpenThoughts2-1M-1.5B
#   GROUP_KEY=instruction OVERLONG=truncate bash scripts/3_tokenize.sh assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B \
#     assets/data/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B.json 16384
#
# The files of the other sizes (SFT_Hybrid_R1_7B_OpenThoughts_1M.sh, ...) list these commands for their models, and run this recipe.
#
# Fits with 1.5B (memory by plan): 24 GB: 4 GPUs with RECOMPUTE_LAYERS=23; 40 GB: 1 GPU with RECOMPUTE_LAYERS=22; 48 GB: 1 GPU with RECOMPUTE_LAYERS=16; 80 GB: 1 GPU; 141 GB: 1 GPU
# Fits with 7B (memory by plan): 40 GB: 8 GPUs with RECOMPUTE_LAYERS=27; 48 GB: 8 GPUs with RECOMPUTE_LAYERS=21; 80 GB: 2 GPUs with RECOMPUTE_LAYERS=19; 141 GB: 2 GPUs
# Fits with 14B (memory by plan): 40 GB: 16 GPUs with RECOMPUTE_LAYERS=43; 48 GB: 16 GPUs with RECOMPUTE_LAYERS=29; 80 GB: 4 GPUs with RECOMPUTE_LAYERS=21; 141 GB: 4 GPUs
# Fits with 32B (memory by plan): 40 GB: 64 GPUs with RECOMPUTE_LAYERS=47; 48 GB: 32 GPUs with RECOMPUTE_LAYERS=50; 80 GB: 8 GPUs with RECOMPUTE_LAYERS=52; 141 GB: 8 GPUs
# Fits with Llama_8B (memory by plan): 40 GB: 16 GPUs with RECOMPUTE_LAYERS=26; 48 GB: 8 GPUs with RECOMPUTE_LAYERS=27; 80 GB: 2 GPUs with RECOMPUTE_LAYERS=27; 141 GB: 2 GPUs
#
# All sizes use the values of the published 1.5B recipe; no run of another size has been published.
#
# To write a new recipe, copy this file and edit it. A variable in the environment overrides the value here.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

: "${MODEL_SIZE:=1.5B}"
case $MODEL_SIZE in
  1.5B) : "${TENSOR_PARALLEL_SIZE:=1}" "${SEQUENCE_PARALLEL:=0}" ;;
  7B) : "${TENSOR_PARALLEL_SIZE:=2}" ;;
  14B) : "${TENSOR_PARALLEL_SIZE:=4}" ;;
  32B) : "${TENSOR_PARALLEL_SIZE:=8}" ;;
  Llama_8B) : "${TENSOR_PARALLEL_SIZE:=2}" "${MODEL:=deepseek_ai_DeepSeek_R1_Distill_Llama_8B}" ;;
  *) die "MODEL_SIZE is '$MODEL_SIZE': choose 1.5B, 7B, 14B, 32B or Llama_8B" ;;
esac
: "${MODEL:=deepseek_ai_DeepSeek_R1_Distill_Qwen_$MODEL_SIZE}"
: "${DATA:=Vinnnf-Hybrid-OpenThoughts2-1M-1.5B}"
: "${SEQ_LENGTH:=16384}"
: "${PIPELINE_PARALLEL_SIZE:=1}"
: "${CONTEXT_PARALLEL_SIZE:=1}"
: "${SEQUENCE_PARALLEL:=1}"
: "${RECOMPUTE:=auto}"

: "${MICRO_BATCH_SIZE:=1}"
: "${GLOBAL_BATCH_SIZE:=128}" # the published model was trained on 64 A100
: "${TRAIN_ITERS:=17000}"
: "${LR_WARMUP_FRACTION:=0.05}" # 850 of 17,000 steps
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

: "${OUTPUT_PATH:=$ROOT/outputs/checkpoints/SFT_Hybrid_R1_${MODEL_SIZE}_OpenThoughts_1M/train_iters_$TRAIN_ITERS}"

# shellcheck source=scripts/lib/recipe.sh
source "$ROOT/scripts/lib/recipe.sh"
