#!/usr/bin/env bash
# Convert a Hugging Face model folder to a Megatron checkpoint, or a Megatron checkpoint to another layout or format.
#
#   bash scripts/2_convert.sh SOURCE [TP] [PP] [OUT]
#
# SOURCE  a Hugging Face folder with config.json, *.safetensors and the tokenizer, as written by 1_download.sh; or a checkpoint
#         folder with latest_checkpointed_iteration.txt, written by this project, Megatron-LM or a project built on Megatron-LM
# TP, PP  tensor- and pipeline-parallel sizes (default 1 and 1)
# OUT     the folder to write (default SOURCE_Megatron_TP<TP>PP<PP>)
#
# CKPT_FORMAT=torch_dist  loads at any TP and PP; or torch, classic Megatron-LM's mp_rank_* tree
# EP=1                    expert-parallel size of a mixture of experts in the torch format
# DTYPE                   of the weights: bf16, fp16 or fp32 (default: the source's). Values changed by a cast are counted
# VERIFY=auto             compare logits with transformers afterwards: 1, 0, or auto (only below 4 GB of weights)
# ROPE_SCALING=yarn       extend the positions of a Hugging Face model: yarn, linear or dynamic; the export's config.json has it too
# ROPE_FACTOR=4           by how much; ROPE_ORIGINAL=N: the positions it was trained on (default max_position_embeddings)
# HF_DIR=FOLDER           the original Hugging Face model, for a checkpoint written by another project
# ITERATION=N             iteration of a checkpoint (default: the latest)
# WITH_OPTIMIZER=1        keep the optimizer state of a training checkpoint (torch_dist to torch_dist)
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 1 4 "$@"
source_dir=${1%/} tp=${2:-1} pp=${3:-1}
options=(--ckpt-format "${CKPT_FORMAT:-torch_dist}" --verify "${VERIFY:-auto}" --expert-model-parallel-size "${EP:-1}")
if [[ -n ${DTYPE-} ]]; then options+=(--dtype "$DTYPE"); fi
if [[ -n ${ROPE_SCALING-} ]]; then options+=(--rope-scaling "$ROPE_SCALING"); fi
if [[ -n ${ROPE_FACTOR-} ]]; then options+=(--rope-factor "$ROPE_FACTOR"); fi
if [[ -n ${ROPE_ORIGINAL-} ]]; then options+=(--rope-original "$ROPE_ORIGINAL"); fi
if [[ -n ${HF_DIR-} ]]; then options+=(--hf-dir "$HF_DIR"); fi
if [[ -n ${ITERATION-} ]]; then options+=(--iteration "$ITERATION"); fi
if [[ ${WITH_OPTIMIZER:-0} == 1 ]]; then options+=(--with-optimizer); fi
run_module convert --source "$source_dir" --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" \
  --output "${4:-${source_dir}_Megatron_TP${tp}PP${pp}}" "${options[@]}"
