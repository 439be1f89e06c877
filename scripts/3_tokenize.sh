#!/usr/bin/env bash
# Tokenise chat data or preference pairs and pack them into rows, marking the tokens that are trained.
#
#   bash scripts/3_tokenize.sh TOKENIZER_DIR DATA LENGTH
#
# TOKENIZER_DIR  a Hugging Face model folder with a tokenizer and chat template
# DATA           a file (JSON lines, JSON array, CSV or parquet; also .gz or .zst), a folder of them, or a hub id. Several may be
#                given, each with a number or share of its records: "a.jsonl#500 b.jsonl#20%" (paths with spaces: one per line)
# LENGTH         tokens per row; both answers of a preference pair, each with the prompt, share a row
#
# Variables (details in docs/data.md):
#   OVERLONG=drop           conversations longer than LENGTH: drop, truncate, split (between turns; not of pairs) or error
#   TRAIN_ON=all_assistant  which turns are trained: all_assistant, last_assistant or all (every token; not of pairs)
#   CHAT_TEMPLATE=          chatml, llama-2, llama-3, mistral, qwen, deepseek-r1 or a file (default: the tokenizer's template)
#   EMPTY_THINK=every       the template's empty <think> block in every answer without reasoning, in none, or where the
#                           template writes it by itself (template)
#   TEMPLATE_DATE=          the date that a template prints, as YYYY-MM-DD (default: the day on which the run starts)
#   TEMPLATE_KWARGS=        arguments for the template of all records, as JSON: '{"enable_thinking": false}'
#   BAD_ROWS=stop           stop at an unusable record, or skip it: it goes to <data>.rejected.jsonl with the reason
#   UNKNOWN_FIELDS=stop     stop at a field of the data that is not known and could say what is said or trained, or ignore it
#   MODEL_NAME=             replaces {{NAME}} in the data, also {{name}} and {{ name }}
#   MODEL_AUTHOR=           replaces {{AUTHOR}} in the data
#   SEED=1234               decides the order of rows and which conversations share a row
#   PACKING=1               0 puts one conversation in each row
#   GROUP_KEY=              a field of the data, such as instruction: conversations with the same value (the short and the long
#                           answer to one question) share a row, or rows that training keeps in one global batch
#   NUM_WORKERS=            worker processes (default: one per processor)
#   MAP_COLUMNS=            columns to rename, "OLD=NEW OLD=NEW", such as problem=instruction; OLD=- drops a column,
#                           "messages[].OLD=-" a field of turns
#   OUTPUT_PREFIX=          path of the result without .bin
#
# Writes Tokenized-<data>-<tokenizer>-<LENGTH>_text_document.bin, .idx and .json next to the first DATA file.
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 3 3 "$@"
: "${OVERLONG:=drop}"
: "${TRAIN_ON:=all_assistant}"
: "${CHAT_TEMPLATE:=}"
: "${EMPTY_THINK:=every}"
: "${TEMPLATE_DATE:=}"
: "${TEMPLATE_KWARGS:=}"
: "${BAD_ROWS:=stop}"
: "${UNKNOWN_FIELDS:=stop}"
: "${MODEL_NAME:=}"
: "${MODEL_AUTHOR:=}"
: "${OUTPUT_PREFIX:=}"
: "${SEED:=1234}"
: "${PACKING:=1}"
: "${GROUP_KEY:=}"
: "${NUM_WORKERS:=}"
: "${MAP_COLUMNS:=}"

arguments=(--tokenizer "$1" --input "$2" --seq-length "$3" --overlong "$OVERLONG" --seed "$SEED"
  --train-on "$TRAIN_ON" --bad-rows "$BAD_ROWS" --empty-think "$EMPTY_THINK")
case "$PACKING" in
  1) ;;
  0) arguments+=(--no-packing) ;;
  *) die "PACKING is '$PACKING': give 1 or 0" ;;
esac
[[ $UNKNOWN_FIELDS == stop ]] || arguments+=(--unknown-fields "$UNKNOWN_FIELDS")
[[ -z "$GROUP_KEY" ]] || arguments+=(--group-key "$GROUP_KEY")
[[ -z "$CHAT_TEMPLATE" ]] || arguments+=(--chat-template "$CHAT_TEMPLATE")
[[ -z "$TEMPLATE_DATE" ]] || arguments+=(--template-date "$TEMPLATE_DATE")
[[ -z "$TEMPLATE_KWARGS" ]] || arguments+=(--template-kwargs "$TEMPLATE_KWARGS")
[[ -z "$MODEL_NAME" ]] || arguments+=(--model-name "$MODEL_NAME")
[[ -z "$MODEL_AUTHOR" ]] || arguments+=(--model-author "$MODEL_AUTHOR")
[[ -z "$OUTPUT_PREFIX" ]] || arguments+=(--output-prefix "$OUTPUT_PREFIX")
[[ -z "$NUM_WORKERS" ]] || arguments+=(--num-workers "$NUM_WORKERS")
read -r -a columns <<<"$MAP_COLUMNS"
[[ ${#columns[@]} -eq 0 ]] || arguments+=(--map-column "${columns[@]}")

run_module tokenize "${arguments[@]}"
