#!/usr/bin/env bash
# All five steps on a tiny model and data set from this repository: a few minutes on two CPU cores, with no downloads once the
# environment is installed. Results go to outputs/quickstart; an earlier run is moved to outputs/quickstart.1, .2, ...
#
#   bash scripts/quickstart.sh
#
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/lib/common.sh" || exit 2

help_or_arguments 0 0 "$@"
ensure_setup
cd "$ROOT"
started=$(date +%s)
export MEGATRON_SFT_DEVICE=cpu HF_HUB_OFFLINE=1
export SAY_NEXT=0 # the steps follow each other by themselves
model=assets/checkpoints/quickstart
data=assets/data/quickstart/quickstart.json
out=outputs/quickstart

step() { printf '\n== %s\n' "$*"; }

# evaluate MODEL RESULT: exact match on held-out questions, in both modes.
evaluate() {
  CONTROL="<short> <think>" MAX_NEW_TOKENS=64 BATCH_SIZE=128 OUTPUT=$2 bash scripts/7_evaluate.sh "$1" assets/quickstart/heldout.json
}

if [[ -e $out ]]; then
  number=1
  while [[ -e $out.$number ]]; do number=$((number + 1)); done
  mv "$out" "$out.$number"
  echo "the earlier run is now in $out.$number"
fi
mkdir -p "$out" "$(dirname "$data")"

step "Step 1 of 5: get a model and data (generated from a seed here; a real run downloads them)"
run_module quickstart model "$model"
cp assets/quickstart/train.json "$data"
echo "before training, on held-out questions (the weights are random: nothing can be right yet):"
evaluate "$model" "$out/before.json"

step "Step 2 of 5: convert the model to Megatron's format, with each layer split over two processes"
bash scripts/2_convert.sh "$model" 2 1

step "Step 3 of 5: tokenise the data and pack it into rows of 256 tokens"
bash scripts/3_tokenize.sh "$model" "$data" 256

step "Step 4 of 5: train, one to two minutes"
bash scripts/sft/SFT_Quickstart.sh train
run_module plot "$out/checkpoints" --output "$out/loss.png" --title "Quickstart: sorting names"

step "Step 5 of 5: export the trained model to Hugging Face, and ask it the same questions again"
bash scripts/5_export.sh "$out/checkpoints" "$model" "$out/export"
evaluate "$out/export" "$out/after.json"
bash tools/show_sample "${data%/*}/Tokenized-quickstart-quickstart-256_text_document" 0 --html "$out/trained_tokens.html" >/dev/null

step "Done"
run_module quickstart report --before "$out/before.json" --after "$out/after.json" --metrics "$out/checkpoints/metrics.jsonl" \
  --export "$out/export" --started "$started" --output "$out/report.json"
