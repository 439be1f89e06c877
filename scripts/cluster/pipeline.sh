#!/usr/bin/env bash
# Convert, tokenise, train and export what a recipe names, each step after the one before; what is finished is left out.
#
#   bash scripts/cluster/pipeline.sh [--slurm | --only STEP] RECIPE
#
# --slurm      four dependent jobs: a step that fails cancels those after it, and no GPU is asked for before training can start
# --only STEP  convert, tokenize, train or export alone, here
#
# HF_DIR=FOLDER       the model; <assets>/checkpoints/<the recipe's MODEL> unless given
# DATA_FILE=FILE      the chats; <assets>/data/<the recipe's DATA>/<DATA>.json unless given
# EXPORT_PATH=FOLDER  the result; <assets>/checkpoints/export/<the recipe's name> unless given
# and the variables of 2_convert.sh, 3_tokenize.sh (OVERLONG, GROUP_KEY, ...) and 5_export.sh
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh" || exit 2

help_or_arguments 1 3 "$@"
recipe=${*: -1}
[[ -f $recipe ]] || die "recipe '$recipe' does not exist: give the path of a file such as scripts/sft/SFT_Quickstart.sh"
name=$(basename "$recipe" .sh)
settings=$(bash "$recipe" settings)

# of_recipe NAME: what the recipe sets it to.
of_recipe() { sed -n "s/^$1=//p" <<<"$settings"; }

assets=$(of_recipe ASSETS_DIR) checkpoint=$(of_recipe PRETRAIN_CHECKPOINT_PATH) data=$(of_recipe DATA_PATH) length=$(of_recipe SEQ_LENGTH)
: "${HF_DIR:=$assets/checkpoints/$(of_recipe MODEL)}"
: "${DATA_FILE:=$assets/data/$(of_recipe DATA)/$(of_recipe DATA).json}"
: "${EXPORT_PATH:=$assets/checkpoints/export/$name}"
[[ -f $HF_DIR/config.json ]] || die "model folder $HF_DIR has no config.json: run scripts/1_download.sh, or set HF_DIR"
[[ -e $DATA_FILE ]] || die "data file $DATA_FILE does not exist: run scripts/1_download.sh, or set DATA_FILE"
[[ -n $length ]] || die "recipe $recipe sets no SEQ_LENGTH: it is the row length to tokenise with"
steps=()
if [[ ! -f $checkpoint/latest_checkpointed_iteration.txt ]]; then steps+=(convert); fi
if [[ ! -f $data.json ]]; then steps+=(tokenize); fi
steps+=(train export)

# run_here STEP: one step in this shell.
run_here() {
  case $1 in
    convert) bash "$ROOT/scripts/2_convert.sh" "$HF_DIR" "$(of_recipe TENSOR_PARALLEL_SIZE)" "$(of_recipe PIPELINE_PARALLEL_SIZE)" "$checkpoint" ;;
    tokenize)
      OUTPUT_PREFIX=$data bash "$ROOT/scripts/3_tokenize.sh" "$HF_DIR" "$DATA_FILE" "$length"
      # A run that could not start is found out here, before a GPU waits for it.
      bash "$recipe" plan
      ;;
    train) bash "$recipe" ;;
    export) bash "$ROOT/scripts/5_export.sh" "$(of_recipe OUTPUT_PATH)" "$HF_DIR" "$EXPORT_PATH" ;;
    *) die "step '$1' is none of convert, tokenize, train and export" ;;
  esac
}

# submit_all: the steps as jobs that wait for each other.
submit_all() {
  local step job after=()
  export HF_DIR DATA_FILE EXPORT_PATH
  for step in "${steps[@]}"; do
    if [[ $step == train ]]; then
      # What the plan reads may not be there yet; the step before checks it.
      if ((${#after[@]})); then export CHECK=0; fi
      job=$(bash "$ROOT/scripts/cluster/train.sbatch" "${after[@]}" "$recipe")
    else
      job_options "$name-$step" "$CPU_PARTITION"
      job=$(submit "${JOB_OPTIONS[@]}" "${after[@]}" --time="$TIME_LIMIT" "$ROOT/scripts/cluster/step.sbatch" \
        bash "$ROOT/scripts/cluster/pipeline.sh" --only "$step" "$(readlink -f "$recipe")")
    fi
    echo "$step: job $job"
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
  done
  echo "logs: $LOGS; the result: $EXPORT_PATH"
}

case $#,$1 in
  1,*) for step in "${steps[@]}"; do echo "== $step" && run_here "$step"; done ;;
  2,--slurm)
    # shellcheck source=scripts/cluster/submit.sh
    source "$ROOT/scripts/cluster/submit.sh"
    submit_all
    ;;
  3,--only) run_here "$2" ;;
  *) die "pipeline.sh does not know '$1': write bash scripts/cluster/pipeline.sh [--slurm | --only STEP] RECIPE" ;;
esac
