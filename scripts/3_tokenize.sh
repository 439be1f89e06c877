#!/usr/bin/env bash
# Turns chat data into packed rows of tokens with the answers marked as trained.
#
#   bash scripts/3_tokenize.sh TOKENIZER_DIR FILE LENGTH
#
#   TOKENIZER_DIR  folder of a Hugging Face model, with its tokenizer and chat template
#   FILE           JSON lines or a JSON array of instruction/output, messages or conversations rows
#   LENGTH         tokens in a row
#
# Variables:
#   OVERLONG=drop      drop, truncate or error: what to do with conversations longer than LENGTH
#   SEED=1234          decides the order of rows and what shares a row
#   PACKING=1          0: one conversation a row
#   GROUP_KEY=         field of the data, such as instruction: conversations of rows with the same value (the short and the long
#                      answer to one question) stay in one row or in rows that training keeps in one global batch
#   NUM_WORKERS=       threads of the tokenizer; all processors if empty
#   MAP_COLUMNS=       columns to rename: "OLD=NEW OLD=NEW", such as problem=instruction
#
# Writes Tokenized-<data>-<tokenizer>-<LENGTH>_text_document.bin, .idx and .json beside FILE.
for up in "$(dirname "$(readlink -f "$0")")" "${SLURM_SUBMIT_DIR:-/}"{,/..,/../..}/scripts; do [[ -f $up/lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$up/lib/common.sh" || exit 2

help_or_arguments 3 3 "$@"
: "${OVERLONG:=drop}"
: "${SEED:=1234}"
: "${PACKING:=1}"
: "${GROUP_KEY:=}"
: "${NUM_WORKERS:=}"
: "${MAP_COLUMNS:=}"

arguments=(--tokenizer "$1" --input "$2" --seq-length "$3" --overlong "$OVERLONG" --seed "$SEED")
case "$PACKING" in
  1) ;;
  0) arguments+=(--no-packing) ;;
  *) die "PACKING is '$PACKING': give 1 or 0" ;;
esac
[[ -z "$GROUP_KEY" ]] || arguments+=(--group-key "$GROUP_KEY")
[[ -z "$NUM_WORKERS" ]] || arguments+=(--num-workers "$NUM_WORKERS")
read -r -a columns <<<"$MAP_COLUMNS"
[[ ${#columns[@]} -eq 0 ]] || arguments+=(--map-column "${columns[@]}")

run_module tokenize "${arguments[@]}"
