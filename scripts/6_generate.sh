#!/usr/bin/env bash
# Chat with a model, ask it one question, or have it answer a file of questions.
#
#   bash scripts/6_generate.sh HF_DIR [PROMPT|FILE]
#
# HF_DIR  a Hugging Face model folder, such as one written by 5_export.sh, or a PEFT adapter (BASE=FOLDER where its model moved)
# PROMPT  one question; without it, a chat in the terminal
# FILE    JSON lines with instruction, prompt, messages or conversations; an answer is added to each. An interrupted run resumes.
#
# CONTROL="<think>"     starts every answer: the mode of a hybrid model
# SYSTEM="You are ..."  the system prompt of every conversation that has none (default: the template's own)
# MAX_NEW_TOKENS=512  TEMPERATURE=0 (greedy)  TOP_P=1  TOP_K=0 (all)  SEED=1234  BATCH_SIZE=64
# DTYPE=auto            auto (the folder's), float32, bfloat16 or float16
# OUTPUT                for a FILE (default: FILE without its extension, plus .answers.jsonl)
# BACKEND=transformers  or vllm, if it is installed, on NUM_GPUS=1 GPUs
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 1 2 "$@"
options=(${CONTROL:+--control "$CONTROL"} ${SYSTEM:+--system "$SYSTEM"} ${OUTPUT:+--output "$OUTPUT"} ${BACKEND:+--backend "$BACKEND"})
for name in MAX_NEW_TOKENS TEMPERATURE TOP_P TOP_K SEED BATCH_SIZE DTYPE NUM_GPUS; do
  option=${name,,}
  [[ -z ${!name-} ]] || options+=("--${option//_/-}" "${!name}")
done
run_module generate "${options[@]}" -- "$@"
