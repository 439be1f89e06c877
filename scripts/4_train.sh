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
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh" || exit 2

help_or_arguments 0 1 "$@"
mode=${1-}
case $mode in
  '' | train | resume | plan) ;;
  *) die "unknown word '$mode': say train, resume or plan" ;;
esac
if [[ $(readlink -f "$0") != "$(readlink -f "${BASH_SOURCE[0]}")" ]]; then
  RECIPE=$(readlink -f "$0")
  export RECIPE # found by its name in the loop below
fi

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

processes=${GPUS_PER_NODE:-$(gpus_found)}
if ((processes == 0)); then processes=$(model_processes); fi

arguments=()
ensure_setup
while read -r variable flag; do
  if [[ -n ${!variable-} ]]; then arguments+=("$flag" "${!variable}"); fi
done < <(run_module options)

if [[ $mode == plan ]]; then
  WORLD_SIZE=$((processes * ${NNODES:-1})) run_module train plan "${arguments[@]}"
  exit
fi
launch "$processes" train ${mode:+"$mode"} "${arguments[@]}"
