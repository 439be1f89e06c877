#!/usr/bin/env bash
# Hybrid reasoning with DeepSeek-R1-Distill-Qwen-14B: SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh with MODEL_SIZE=14B.
# That file has the settings, and says which GPUs they fit.
#
#   bash scripts/sft/SFT_Hybrid_R1_14B_OpenThoughts_1M.sh [train|resume|plan]
#
# Before it, once:
#   bash scripts/1_download.sh model deepseek-ai/DeepSeek-R1-Distill-Qwen-14B
#   bash tools/edit_tokenizer assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_14B --rename '<|quad_start|>=<short>' --keep-thinking
#   bash scripts/2_convert.sh assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_14B 4 1
#   bash scripts/1_download.sh dataset Vinnnf/Hybrid-OpenThoughts2-1M-1.5B
#   GROUP_KEY=instruction OVERLONG=truncate bash scripts/3_tokenize.sh assets/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_14B \
#     assets/data/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B/Vinnnf-Hybrid-OpenThoughts2-1M-1.5B.json 16384
#
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
MODEL_SIZE=14B
# shellcheck source=scripts/sft/SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh
source "$lib/../sft/SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh"
