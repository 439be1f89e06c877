#!/usr/bin/env bash
# Train with settings from shell variables, or from a recipe in scripts/sft/, which ends by running this script.
#
#   bash scripts/4_train.sh [train|resume|plan|plan all|reference]
#   bash scripts/sft/RECIPE.sh [train|resume|plan|plan all|reference]
#
# train      start a new run; refused if OUTPUT_PATH has checkpoints
# resume     continue a run; refused if OUTPUT_PATH has none
# plan       print everything about the run without starting it; plan all: with every default
# reference  make the reference's log-probabilities of OBJECTIVE=dpo (again); the others make them if they are missing
# (none)     resume if there is a checkpoint, otherwise train: what a requeued job does
#
# Required: PRETRAIN_CHECKPOINT_PATH (2_convert.sh), DATA_PATH (3_tokenize.sh) and OUTPUT_PATH. Every other setting has a default,
# listed in docs/options.md. GPUS_PER_NODE (default: every GPU found; on CPU, TP x PP x CP) and NNODES set the number of processes.
#
# SIGTERM, SIGINT, SIGHUP or SIGUSR1, sent to this script or to any process of the run, makes the run save at the next step and
# stop; a second signal stops it immediately. EXIT_AFTER_MINUTES does the same after a given time. The save may take up to
# STOP_MINUTES=30. Exit status (docs/reliability.md):
#
#   0   finished           75  saved on request: the same command resumes   2  a user's mistake, named in the last line
#   1   an error, shown    124 hung; the last line says where           128+n killed by signal n, the last checkpoint is good
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh" || exit 2

help_or_arguments 0 2 "$@"
mode=${1-}
if (($# == 2)) && [[ $1,$2 != plan,all ]]; then die "unknown arguments '$1 $2': write train, resume, plan, plan all or reference"; fi
case $mode in
  '' | train | resume | plan | reference | settings) ;;
  *) die "unknown argument '$mode': write train, resume, plan or reference" ;;
esac
if [[ ${MAX_RESTARTS:-0} != 0 ]]; then
  die "MAX_RESTARTS is '$MAX_RESTARTS': a failed run is no longer restarted in place. Unset it; SLURM jobs are requeued, elsewhere the same command resumes the run (docs/reliability.md)"
fi
if [[ $(readlink -f "$0") != "$(readlink -f "${BASH_SOURCE[0]}")" ]]; then
  RECIPE=$(readlink -f "$0")
  export RECIPE # read by name in the loop below
fi
# In a SLURM job, but not yet in one of its steps: start a step on every node. job.sh does not return.
if [[ $mode != plan && $mode != settings && -n ${SLURM_JOB_ID-} && -z ${SLURM_STEP_ID-} ]] && command -v srun >/dev/null; then
  # shellcheck source=scripts/cluster/job.sh
  source "$ROOT/scripts/cluster/job.sh"
fi

export MEGATRON_SFT_STARTED=${MEGATRON_SFT_STARTED:-$(date +%s)} # EXIT_AFTER_MINUTES counts from here
trap '' PIPE                                                     # a reader that is gone, as after | head, ends nothing
trap 'exit 75' TERM INT HUP USR1                                 # until the launcher handles the signals

exported=" $(compgen -e | tr '\n' ' ')"
# A recipe's number of steps gives way to EPOCHS that the user has typed.
if [[ -n ${EPOCHS-} && ${TRAIN_ITERS:-0} != 0 && $exported == *" EPOCHS "* && $exported != *" TRAIN_ITERS "* ]]; then
  printf 'EPOCHS=%s from the environment takes the place of TRAIN_ITERS=%s in the recipe\n' "$EPOCHS" "$TRAIN_ITERS"
  TRAIN_ITERS=''
fi

# model_processes: the processes that hold one copy of the model, or several copies if the experts need more processes.
model_processes() {
  local stage=$((${TENSOR_PARALLEL_SIZE:-1} * ${CONTEXT_PARALLEL_SIZE:-1}))
  if ((stage % ${EXPERT_PARALLEL_SIZE:-1})); then stage=$((stage * EXPERT_PARALLEL_SIZE)); fi
  printf '%s' $((stage * ${PIPELINE_PARALLEL_SIZE:-1}))
}

whole_numbers GPUS_PER_NODE NNODES TENSOR_PARALLEL_SIZE CONTEXT_PARALLEL_SIZE EXPERT_PARALLEL_SIZE PIPELINE_PARALLEL_SIZE
processes=${GPUS_PER_NODE:-$(gpus_found)}
if ((processes == 0)); then processes=$(model_processes); fi

arguments=()
ensure_setup
take_other_names
while read -r variable flag; do
  if [[ -n ${!variable-} ]]; then arguments+=("$flag" "${!variable}"); fi
  if [[ $mode == settings && -n ${!variable-} ]]; then printf '%s=%s\n' "$variable" "${!variable}"; fi
done < <(run_module options)
if [[ $mode == settings ]]; then # what scripts/cluster/ needs to know about a recipe
  printf '%s=%s\n' MODEL "${MODEL-}" DATA "${DATA-}" ASSETS_DIR "$ASSETS_DIR"
  exit
fi

if [[ $mode == plan ]]; then
  SETTINGS_FROM_ENVIRONMENT=$exported VARIABLES_SET=$(compgen -v | tr '\n' ' ') PLANNED_PROCESSES=$((processes * ${NNODES:-1})) run_module plan "${@:2}" "${arguments[@]}"
  exit
fi
SETTINGS_FROM_ENVIRONMENT=$exported VARIABLES_SET=$(compgen -v | tr '\n' ' ')
export SETTINGS_FROM_ENVIRONMENT VARIABLES_SET
launch "$processes" train ${mode:+"$mode"} "${arguments[@]}"
