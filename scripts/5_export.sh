#!/usr/bin/env bash
# Export a Megatron checkpoint to a Hugging Face model folder that transformers and vLLM can load; adapters to a PEFT folder.
#
#   bash scripts/5_export.sh CKPT HF_DIR OUT [ITERATION]
#
# CKPT       a checkpoint folder written by 4_train.sh, 2_convert.sh or Megatron-LM, in any format and parallel layout
# HF_DIR     the original model, which provides config.json, tokenizer and chat template
# OUT        the folder to write
# ITERATION  the iteration to export, or best: the lowest validation loss among the checkpoints (default: the latest)
#
# DTYPE      of the weights: bf16, fp16 or fp32 (default: the original's). Values changed by a cast are counted
# MERGE=1    of adapters: write a whole model, their products added to the weights in float32 and rounded once
# BASE       of adapters with MERGE=1: the checkpoint of the weights under them, where it has moved since training
# VERIFY     of a merged model: 1 compares its logits with those of PEFT's adapter, 0 does not (default: up to 4 GB of weights)
# PUSH_TO    OWNER/NAME on the hub to upload the folder to with HF_TOKEN, into a private repository if it is new (default: none)
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 3 4 "$@"
options=(${4:+--iteration "$4"} ${PUSH_TO:+--push-to "$PUSH_TO"} ${DTYPE:+--dtype "$DTYPE"} ${BASE:+--base "$BASE"} ${VERIFY:+--verify "$VERIFY"})
[[ ${MERGE:-0} == 0 ]] || options+=(--merge)
run_module export --load "$1" --hf-dir "$2" --output "$3" "${options[@]}"
