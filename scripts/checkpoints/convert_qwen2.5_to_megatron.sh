#!/usr/bin/env bash
# Convert a downloaded Qwen2.5 model to a Megatron checkpoint in the classic format (CKPT_FORMAT=torch).
#
#   bash scripts/checkpoints/convert_qwen2.5_to_megatron.sh SIZE [TP] [PP]
#
# SIZE is the end of the model's name, such as 1.5B. The model is read from assets/checkpoints/Qwen_Qwen2.5_SIZE
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 1 3 "$@"
CKPT_FORMAT=${CKPT_FORMAT:-torch} exec bash "$ROOT/scripts/2_convert.sh" "$ASSETS_DIR/checkpoints/Qwen_Qwen2.5_$1" "${@:2}"
