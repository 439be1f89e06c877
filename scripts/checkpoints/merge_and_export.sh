#!/usr/bin/env bash
# Export a Megatron checkpoint to a Hugging Face folder: bash scripts/checkpoints/merge_and_export.sh CKPT HF_DIR OUT
exec bash "$(dirname "$(readlink -f "$0")")/../5_export.sh" "$@"
