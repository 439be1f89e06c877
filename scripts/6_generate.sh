#!/usr/bin/env bash
# Talk to a model, ask it one question, or let it answer a data file.
#
#   bash scripts/6_generate.sh HF_DIR [PROMPT|FILE]
#
# HF_DIR  a Hugging Face model folder, such as 5_export.sh writes
# PROMPT  a question; without it a chat on the terminal
# FILE    JSON lines of instruction, prompt, messages or conversations rows; writes them with an answer more. A run that
#         was cut off goes on where it was.
#
# CONTROL="<think>"   what every answer begins with: the mode of a hybrid model
# MAX_NEW_TOKENS=512  TEMPERATURE=0 (greedy)  TOP_P=1  TOP_K=0 (all)  SEED=1234  BATCH_SIZE=64
# DTYPE=auto          auto (as the folder says), float32, bfloat16 or float16
# OUTPUT              of a FILE; <FILE without its ending>.answers.jsonl unless given
# BACKEND=transformers  or vllm, where it is installed, on NUM_GPUS=1 GPUs
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 1 2 "$@"
options=(${CONTROL:+--control "$CONTROL"} ${OUTPUT:+--output "$OUTPUT"} ${BACKEND:+--backend "$BACKEND"})
for name in MAX_NEW_TOKENS TEMPERATURE TOP_P TOP_K SEED BATCH_SIZE DTYPE NUM_GPUS; do
  option=${name,,}
  [[ -z ${!name-} ]] || options+=("--${option//_/-}" "${!name}")
done
run_module generate "${options[@]}" -- "$@"
