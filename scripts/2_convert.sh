#!/usr/bin/env bash
# Convert a Hugging Face model folder to a Megatron checkpoint.
#
#   bash scripts/2_convert.sh HF_DIR [TP] [PP] [OUT]
#
# HF_DIR  a folder with config.json, *.safetensors and the tokenizer, as 1_download.sh makes it
# TP, PP  tensor-parallel and pipeline-parallel sizes, 1 and 1 unless given
# OUT     <HF_DIR>_Megatron_TP<TP>PP<PP> unless given
#
# CKPT_FORMAT=torch_dist (default: loads at any TP and PP) or torch (classic Megatron-LM's mp_rank_* tree, fixed to TP and PP)
for lib in "$(dirname "$(readlink -f "$0")")"{,/..}/lib "${SLURM_SUBMIT_DIR:-/}"{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 1 4 "$@"
hf_dir=${1%/} tp=${2:-1} pp=${3:-1}
run_module convert --hf-dir "$hf_dir" --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" \
  --output "${4:-${hf_dir}_Megatron_TP${tp}PP${pp}}" --ckpt-format "${CKPT_FORMAT:-torch_dist}"
