#!/usr/bin/env bash
# Train with the settings in shell variables, or from a recipe in scripts/sft/, whose last line hands over to this script.
#
#   bash scripts/4_train.sh [train|resume|plan]
#   bash scripts/sft/RECIPE.sh [train|resume|plan]
#
# train   start, and refuse an OUTPUT_PATH that has checkpoints
# resume  continue, and refuse one that has none
# plan    work everything out and print it, start nothing
# (none)  resume if there is something to resume, else train: what a requeued job runs
#
# Needed: PRETRAIN_CHECKPOINT_PATH (2_convert.sh), DATA_PATH (3_tokenize.sh), OUTPUT_PATH. Every other setting has a default:
# docs/options.md lists them. GPUS_PER_NODE (all that are found; on CPU TP x PP x CP) and NNODES say how many processes.
#
# SIGTERM, SIGINT, SIGHUP and SIGUSR1, to this script or to any process of the run, save at the next step and end it; a second
# one ends it at once. EXIT_AFTER_MINUTES does it by the clock. STOP_MINUTES=30 is how long the save may take. MAX_RESTARTS=0 is
# how often a run that fails starts again by itself, from its last checkpoint. Exit status (docs/reliability.md):
#
#   0   finished           75  saved as asked: the same command goes on     2  a mistake to be put right, named in the last line
#   1   an error, shown    124 stood still, the last line says where     128+n ended by signal n, the last checkpoint is good
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh" || exit 2

help_or_arguments 0 1 "$@"
mode=${1-}
case $mode in
  '' | train | resume | plan | settings) ;;
  *) die "unknown word '$mode': say train, resume or plan" ;;
esac
if [[ $(readlink -f "$0") != "$(readlink -f "${BASH_SOURCE[0]}")" ]]; then
  RECIPE=$(readlink -f "$0")
  export RECIPE # found by its name in the loop below
fi
# In a SLURM job, but not yet in one of its steps: run one of those on every node. It does not come back.
if [[ $mode != plan && $mode != settings && -n ${SLURM_JOB_ID-} && -z ${SLURM_STEP_ID-} ]] && command -v srun >/dev/null; then
  # shellcheck source=scripts/cluster/job.sh
  source "$ROOT/scripts/cluster/job.sh"
fi

export MEGATRON_SFT_STARTED=${MEGATRON_SFT_STARTED:-$EPOCHSECONDS} # EXIT_AFTER_MINUTES counts from here
trap 'exit 75' TERM INT HUP USR1                                   # until the launcher takes the signals

# model_processes: how many hold one copy of the model; more copies where the experts need more processes.
model_processes() {
  local stage=$((${TENSOR_PARALLEL_SIZE:-1} * ${CONTEXT_PARALLEL_SIZE:-1}))
  if ((stage % ${EXPERT_PARALLEL_SIZE:-1})); then stage=$((stage * EXPERT_PARALLEL_SIZE)); fi
  printf '%s' $((stage * ${PIPELINE_PARALLEL_SIZE:-1}))
}

# gpus_found: the number of GPUs of this machine that may be used, 0 without a driver.
gpus_found() {
  if [[ ${MEGATRON_SFT_DEVICE-} == cpu ]] || ! command -v nvidia-smi >/dev/null; then
    printf 0
  elif [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
    awk -F, '{printf "%d", NF}' <<<"$CUDA_VISIBLE_DEVICES"
  else
    nvidia-smi --list-gpus 2>/dev/null | wc -l
  fi
}

whole_numbers GPUS_PER_NODE NNODES TENSOR_PARALLEL_SIZE CONTEXT_PARALLEL_SIZE EXPERT_PARALLEL_SIZE PIPELINE_PARALLEL_SIZE
processes=${GPUS_PER_NODE:-$(gpus_found)}
if ((processes == 0)); then processes=$(model_processes); fi

arguments=()
ensure_setup
while read -r variable flag; do
  if [[ -n ${!variable-} ]]; then arguments+=("$flag" "${!variable}"); fi
  if [[ $mode == settings && -n ${!variable-} ]]; then printf '%s=%s\n' "$variable" "${!variable}"; fi
done < <(run_module options)
if [[ $mode == settings ]]; then # what scripts/cluster/ has to know of a recipe
  printf '%s=%s\n' MODEL "${MODEL-}" DATA "${DATA-}" ASSETS_DIR "$ASSETS_DIR"
  exit
fi

if [[ $mode == plan ]]; then
  SETTINGS_FROM_ENVIRONMENT=$(compgen -e | tr '\n' ' ') WORLD_SIZE=$((processes * ${NNODES:-1})) run_module plan "${arguments[@]}"
  exit
fi
launch "$processes" train ${mode:+"$mode"} "${arguments[@]}"
