#!/usr/bin/env bash
# Exact match of a model's answers on a data file of your own.
#
#   bash scripts/7_evaluate.sh HF_DIR FILE [OPTION...]
#
# HF_DIR  a Hugging Face model folder, such as 5_export.sh writes
# FILE    instruction/output or messages rows; the last answer is the reference. What follows </think> is compared.
#
# CONTROL="<short> <think>"  asks every question once in each mode of a hybrid model (--control "<short>" --control "<think>")
# LIMIT=                     only the first questions
# MAX_NEW_TOKENS=512  BATCH_SIZE=64  DTYPE=auto
# OUTPUT                     outputs/evaluations/<model>-<data>.json unless given: figures and every answer
for lib in "$(dirname "$(readlink -f "$0")")"{,/..}/lib "${SLURM_SUBMIT_DIR:-/}"{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 2 99 "$@"
options=(${LIMIT:+--limit "$LIMIT"} ${MAX_NEW_TOKENS:+--max-new-tokens "$MAX_NEW_TOKENS"}
  ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} ${DTYPE:+--dtype "$DTYPE"} ${OUTPUT:+--output "$OUTPUT"})
read -ra controls <<<"${CONTROL-}"
for control in "${controls[@]}"; do options+=(--control "$control"); done
run_module evaluate "${options[@]}" "$@"
