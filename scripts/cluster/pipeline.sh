#!/usr/bin/env bash
# Convert, tokenise, train and export a recipe, one step after another, skipping finished steps.
#
#   bash scripts/cluster/pipeline.sh [--slurm | --only STEP] RECIPE
#
# --slurm      submit four dependent jobs: a failed step cancels the later ones, and no GPU is requested before training can start
# --only STEP  run only convert, tokenize, train or export, on this machine
#
# HF_DIR=FOLDER       the model (default ASSETS_DIR/checkpoints/MODEL, with the recipe's MODEL)
# DATA_FILE=FILE      the data (default ASSETS_DIR/data/DATA/DATA.json, with the recipe's DATA)
# EXPORT_PATH=FOLDER  the result (default ASSETS_DIR/checkpoints/export/RECIPE)
# The variables of 2_convert.sh, 3_tokenize.sh (OVERLONG, GROUP_KEY, ...) and 5_export.sh also apply.
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh" || exit 2

help_or_arguments 1 3 "$@"
recipe=${*: -1}
[[ -f $recipe ]] || die "recipe '$recipe' does not exist: give the path of a file such as scripts/sft/SFT_Quickstart.sh"
name=$(basename "$recipe" .sh)
settings=$(bash "$recipe" settings)

# of_recipe NAME: the recipe's value of that variable.
of_recipe() { sed -n "s/^$1=//p" <<<"$settings"; }

assets=$(of_recipe ASSETS_DIR) checkpoint=$(of_recipe PRETRAIN_CHECKPOINT_PATH) data=$(of_recipe DATA_PATH) length=$(of_recipe SEQ_LENGTH)
: "${HF_DIR:=$assets/checkpoints/$(of_recipe MODEL)}"
: "${DATA_FILE:=$assets/data/$(of_recipe DATA)/$(of_recipe DATA).json}"
: "${EXPORT_PATH:=$assets/checkpoints/export/$name}"
[[ -f $HF_DIR/config.json ]] || die "model folder $HF_DIR has no config.json: run scripts/1_download.sh, or set HF_DIR"
[[ -e $DATA_FILE ]] || die "data file $DATA_FILE does not exist: run scripts/1_download.sh, or set DATA_FILE"
[[ -n $length ]] || die "recipe $recipe does not set SEQ_LENGTH: set it to the row length to tokenise with"
steps=()
if [[ ! -f $checkpoint/latest_checkpointed_iteration.txt ]]; then steps+=(convert); fi
if [[ ! -f $data.json ]]; then steps+=(tokenize); fi
steps+=(train export)

# run_here STEP: run one step on this machine.
run_here() {
  case $1 in
    convert) bash "$ROOT/scripts/2_convert.sh" "$HF_DIR" "$(of_recipe TENSOR_PARALLEL_SIZE)" "$(of_recipe PIPELINE_PARALLEL_SIZE)" "$checkpoint" ;;
    tokenize)
      OUTPUT_PREFIX=$data bash "$ROOT/scripts/3_tokenize.sh" "$HF_DIR" "$DATA_FILE" "$length"
      # A run that cannot start fails here, before GPUs are allocated.
      bash "$recipe" plan
      ;;
    train) bash "$recipe" ;;
    export) bash "$ROOT/scripts/5_export.sh" "$(of_recipe OUTPUT_PATH)" "$HF_DIR" "$EXPORT_PATH" ;;
    *) die "unknown step '$1': write convert, tokenize, train or export" ;;
  esac
}

# submit_all: submit the steps as jobs, each depending on the one before.
submit_all() {
  local step job after=()
  export HF_DIR DATA_FILE EXPORT_PATH
  for step in "${steps[@]}"; do
    if [[ $step == train ]]; then
      # The plan's input may not exist yet; the step before runs the check.
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
  1,*)
    for step in "${steps[@]}"; do
      if [[ $step == export ]]; then unset SAY_NEXT; else export SAY_NEXT=0; fi
      echo "== $step" && run_here "$step"
    done
    ;;
  2,--slurm)
    # shellcheck source=scripts/cluster/submit.sh
    source "$ROOT/scripts/cluster/submit.sh"
    submit_all
    ;;
  3,--only) run_here "$2" ;;
  *) die "unknown option '$1': write bash scripts/cluster/pipeline.sh [--slurm | --only STEP] RECIPE" ;;
esac
