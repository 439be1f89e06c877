#!/usr/bin/env bash
# Download a model or a data set from the model hub, or bring in a folder or file that is on this machine.
#
#   bash scripts/1_download.sh model|dataset ID|PATH [OPTION...]
#
# A model goes to assets/checkpoints/<id, with / and - turned to _>, in the precision it is published in; a data set to
# assets/data/<id, with / turned to ->/<the same>.json, as JSON lines. What is there already is not fetched again; an
# interrupted download goes on where it was.
#
# ASSETS_DIR      another folder than assets          REVISION  a branch, tag or commit (option --revision)
# SPLIT, CONFIG   which rows of a data set (--split, default train; --config)
# MAP_COLUMNS     new names of its columns, as "problem=instruction solution=output" (--map-column problem=instruction)
# DATA_NAME       a name for a data set instead of its id's, for a second split of one (--name)
# HF_TOKEN        for private and gated repositories  HF_ENDPOINT  the address of a mirror
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 2 99 "$@"
kind=$1
[[ $kind == model || $kind == dataset ]] || die "1_download.sh fetches a model or a dataset, not $kind: write model or dataset first"
options=(--assets-dir "$ASSETS_DIR" ${REVISION:+--revision "$REVISION"})
if [[ $kind == dataset ]]; then
  options+=(${SPLIT:+--split "$SPLIT"} ${CONFIG:+--config "$CONFIG"} ${DATA_NAME:+--name "$DATA_NAME"})
  read -ra columns <<<"${MAP_COLUMNS-}"
  for column in "${columns[@]}"; do options+=(--map-column "$column"); done
fi
run_module download "$kind" "${options[@]}" "${@:2}"
