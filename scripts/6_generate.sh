#!/usr/bin/env bash
# Talk to a model, ask it one question, or let it answer a data file.
#
#   bash scripts/6_generate.sh HF_DIR [PROMPT|FILE]
#
# HF_DIR  a Hugging Face model folder, such as 5_export.sh writes
# PROMPT  a question; without it a chat on the terminal
# FILE    JSON lines of instruction or messages rows; writes them with an answer more
#
# CONTROL="<think>"   what every answer begins with: the mode of a hybrid model
# MAX_NEW_TOKENS=512  TEMPERATURE=0 (greedy)  BATCH_SIZE=64  SEED=1234
# DTYPE=auto          auto (as the folder says), float32, bfloat16 or float16
# OUTPUT              of a FILE; <FILE without its ending>.answers.jsonl unless given
for lib in "$(dirname "$(readlink -f "$0")")"{,/..}/lib "${SLURM_SUBMIT_DIR:-/}"{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 1 2 "$@"
run_module generate ${CONTROL:+--control "$CONTROL"} ${MAX_NEW_TOKENS:+--max-new-tokens "$MAX_NEW_TOKENS"} \
  ${TEMPERATURE:+--temperature "$TEMPERATURE"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} ${SEED:+--seed "$SEED"} \
  ${DTYPE:+--dtype "$DTYPE"} ${OUTPUT:+--output "$OUTPUT"} ${BACKEND:+--backend "$BACKEND"} -- "$@"
