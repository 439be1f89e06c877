#!/usr/bin/env bash
# Download a model or a data set from the Hugging Face hub, or import a local folder or file.
#
#   bash scripts/1_download.sh model|dataset ID|PATH [OPTION...]
#
# A model goes to assets/checkpoints/NAME, where NAME is its id with / and - replaced by _, in the precision of the published
# weights. A data set goes to assets/data/NAME/NAME.json as JSON lines, where NAME is its id with / replaced by -. Files that
# are already there are not downloaded again; an interrupted download resumes.
#
# ASSETS_DIR      a folder instead of assets
# REVISION        a branch, tag or commit (or --revision)
# SPLIT, CONFIG   the split (default train) and configuration of a data set (or --split, --config)
# MAP_COLUMNS     renames columns: "problem=instruction solution=output" (or --map-column problem=instruction)
# DATA_NAME       names a data set, for a second split of the same id (or --name)
# HF_TOKEN        for private and gated repositories
# HF_ENDPOINT     the address of a mirror
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 2 99 "$@"
kind=$1
[[ $kind == model || $kind == dataset ]] || die "1_download.sh downloads a model or a dataset, not '$kind': write model or dataset first"
options=(--assets-dir "$ASSETS_DIR" ${REVISION:+--revision "$REVISION"})
if [[ $kind == dataset ]]; then
  options+=(${SPLIT:+--split "$SPLIT"} ${CONFIG:+--config "$CONFIG"} ${DATA_NAME:+--name "$DATA_NAME"})
  read -ra columns <<<"${MAP_COLUMNS-}"
  for column in "${columns[@]}"; do options+=(--map-column "$column"); done
fi
run_module download "$kind" "${options[@]}" "${@:2}"
