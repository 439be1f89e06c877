#!/usr/bin/env bash
# Turns chat data into packed rows of tokens with the answers marked as trained.
#
#   bash scripts/3_tokenize.sh TOKENIZER_DIR DATA LENGTH
#
#   TOKENIZER_DIR  folder of a Hugging Face model, with its tokenizer and chat template
#   DATA           a file (JSON lines, JSON array, CSV, parquet; also .gz, .zst), a folder of them, or a hub id. Several, each
#                  with a number or a share of its rows if wanted: "a.jsonl#500 b.jsonl#20%" (with spaces in paths: one a line)
#   LENGTH         tokens in a row
#
# Variables (docs/data.md says more):
#   OVERLONG=drop      drop, truncate, split (between turns) or error: what to do with conversations longer than LENGTH
#   TRAIN_ON=all_assistant  which turns are trained: all_assistant, last_assistant or all (every token)
#   CHAT_TEMPLATE=     chatml, llama-2, llama-3, mistral, qwen, deepseek-r1 or a file; the tokenizer's own if empty
#   BAD_ROWS=stop      skip: put rows that cannot be used into <data>.rejected.jsonl, with the reasons, and go on
#   MODEL_NAME=        what {{NAME}} in the data stands for
#   MODEL_AUTHOR=      what {{AUTHOR}} in the data stands for
#   SEED=1234          decides the order of rows and what shares a row
#   PACKING=1          0: one conversation a row
#   GROUP_KEY=         field of the data, such as instruction: conversations of rows with the same value (the short and the long
#                      answer to one question) stay in one row or in rows that training keeps in one global batch
#   NUM_WORKERS=       worker processes; as many as processors if empty
#   MAP_COLUMNS=       columns to rename: "OLD=NEW OLD=NEW", such as problem=instruction; OLD=- leaves one out
#   OUTPUT_PREFIX=     name of the result, without .bin
#
# Writes Tokenized-<data>-<tokenizer>-<LENGTH>_text_document.bin, .idx and .json beside (the first of) DATA.
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 3 3 "$@"
: "${OVERLONG:=drop}"
: "${TRAIN_ON:=all_assistant}"
: "${CHAT_TEMPLATE:=}"
: "${BAD_ROWS:=stop}"
: "${MODEL_NAME:=}"
: "${MODEL_AUTHOR:=}"
: "${OUTPUT_PREFIX:=}"
: "${SEED:=1234}"
: "${PACKING:=1}"
: "${GROUP_KEY:=}"
: "${NUM_WORKERS:=}"
: "${MAP_COLUMNS:=}"

arguments=(--tokenizer "$1" --input "$2" --seq-length "$3" --overlong "$OVERLONG" --seed "$SEED"
  --train-on "$TRAIN_ON" --bad-rows "$BAD_ROWS")
case "$PACKING" in
  1) ;;
  0) arguments+=(--no-packing) ;;
  *) die "PACKING is '$PACKING': give 1 or 0" ;;
esac
[[ -z "$GROUP_KEY" ]] || arguments+=(--group-key "$GROUP_KEY")
[[ -z "$CHAT_TEMPLATE" ]] || arguments+=(--chat-template "$CHAT_TEMPLATE")
[[ -z "$MODEL_NAME" ]] || arguments+=(--model-name "$MODEL_NAME")
[[ -z "$MODEL_AUTHOR" ]] || arguments+=(--model-author "$MODEL_AUTHOR")
[[ -z "$OUTPUT_PREFIX" ]] || arguments+=(--output-prefix "$OUTPUT_PREFIX")
[[ -z "$NUM_WORKERS" ]] || arguments+=(--num-workers "$NUM_WORKERS")
read -r -a columns <<<"$MAP_COLUMNS"
[[ ${#columns[@]} -eq 0 ]] || arguments+=(--map-column "${columns[@]}")

run_module tokenize "${arguments[@]}"
