#!/usr/bin/env bash
# Convert a Hugging Face model folder to a Megatron checkpoint, or a Megatron checkpoint to another layout or format.
#
#   bash scripts/2_convert.sh SOURCE [TP] [PP] [OUT]
#
# SOURCE  a folder with config.json, *.safetensors and the tokenizer, as 1_download.sh makes it; or a checkpoint folder with
#         latest_checkpointed_iteration.txt: of this project, of Megatron-LM, or of a project that carries Megatron-LM
# TP, PP  tensor-parallel and pipeline-parallel sizes, 1 and 1 unless given
# OUT     <SOURCE>_Megatron_TP<TP>PP<PP> unless given
#
# CKPT_FORMAT=torch_dist (default: loads at any TP and PP) or torch (classic Megatron-LM's mp_rank_* tree)
# EP=1                expert-parallel size of a mixture of experts in the torch format
# DTYPE=bf16          of the weights: bf16, fp16 or fp32; the source's unless given. Values that change are counted
# VERIFY=auto         compare logits with transformers afterwards: 1, 0, or auto (below 4 GB of weights)
# HF_DIR=FOLDER       the original model, for a checkpoint that another project wrote
# ITERATION=N         of a checkpoint; the latest unless given
# WITH_OPTIMIZER=1    keep a training checkpoint's optimizer state (torch_dist to torch_dist)
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 1 4 "$@"
source_dir=${1%/} tp=${2:-1} pp=${3:-1}
options=(--ckpt-format "${CKPT_FORMAT:-torch_dist}" --verify "${VERIFY:-auto}" --expert-model-parallel-size "${EP:-1}")
if [[ -n ${DTYPE-} ]]; then options+=(--dtype "$DTYPE"); fi
if [[ -n ${HF_DIR-} ]]; then options+=(--hf-dir "$HF_DIR"); fi
if [[ -n ${ITERATION-} ]]; then options+=(--iteration "$ITERATION"); fi
if [[ ${WITH_OPTIMIZER:-0} == 1 ]]; then options+=(--with-optimizer); fi
run_module convert --source "$source_dir" --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" \
  --output "${4:-${source_dir}_Megatron_TP${tp}PP${pp}}" "${options[@]}"
