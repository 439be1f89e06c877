# shellcheck shell=bash
# Shared by every script: strict mode, ROOT, messages, and starting Python modules. A script finds this file with the two lines
# below, which also work through a symbolic link and in the copy that sbatch makes of a script:
#
#   for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
#   source "$lib/common.sh" || exit 2
set -euo pipefail

ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
ASSETS_DIR=${ASSETS_DIR:-$ROOT/assets}
# Progress bars are noise in a log file.
[[ -t 2 ]] || export TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
# shellcheck source=scripts/lib/setup.sh
source "$ROOT/scripts/lib/setup.sh"

# With PYTHONPATH, another megatron, such as a clone of Megatron-LM has it, would take the place of the installed megatron-core.
if [[ -n ${PYTHONPATH-} ]]; then
  IFS=: read -r -a folders <<<"$PYTHONPATH"
  PYTHONPATH=''
  for name in "${folders[@]}"; do
    if [[ -z $name || $name -ef $ROOT ]]; then continue; fi
    if [[ -e $name/megatron ]]; then
      printf 'PYTHONPATH: %s is not used, as it has another megatron than the installed megatron-core\n' "$name" >&2
    else
      PYTHONPATH+=${PYTHONPATH:+:}$name
    fi
  done
fi
# Warnings as errors, and no assertions: meant for other programs.
[[ ${PYTHONWARNINGS-} != *error* ]] || unset PYTHONWARNINGS
unset PYTHONOPTIMIZE

# die MESSAGE: exit because of a user's mistake. The message gives the thing, its value and the next step.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# take_other_names: SAVE_INTERVAL is another name of SAVE_INTERVALS.
take_other_names() {
  if [[ -z ${SAVE_INTERVAL-} ]]; then return; fi
  [[ -z ${SAVE_INTERVALS-} || $SAVE_INTERVALS == "$SAVE_INTERVAL" ]] || die "SAVE_INTERVAL=$SAVE_INTERVAL and SAVE_INTERVALS=$SAVE_INTERVALS are one setting: set one of them"
  export SAVE_INTERVALS=$SAVE_INTERVAL
}
take_other_names # before a recipe gives its own

# usage: print the calling script's header comment.
usage() {
  sed -n '2,/^[^#]/{/^#/!q; /^# shellcheck /q; /^#SBATCH/d; s/^# \{0,1\}//p;}' "$0"
}

# help_or_arguments MINIMUM MAXIMUM "$@": -h prints the usage and exits; a wrong number of arguments exits with its first line.
help_or_arguments() {
  local minimum=$1 maximum=$2
  shift 2
  case ${1-} in -h | --help) usage && exit 0 ;; esac
  if (($# >= minimum && $# <= maximum)); then return; fi
  die "${0##*/} got $# arguments: write $(usage | sed -n 's/^  *bash /bash /p' | head -n 1) (-h explains them)"
}

# whole_numbers NAME...: die unless these variables are whole numbers or empty. In arithmetic, bash would run a $() in their values.
whole_numbers() {
  local name
  for name in "$@"; do
    [[ ${!name-} =~ ^[0-9]*$ ]] || die "$name is '${!name}': give a whole number"
  done
}

# run_module MODULE ARGUMENTS...: run a megatron.sft module in the user's folder, so that relative paths work as typed.
run_module() { run_python "megatron.sft.$1" "${@:2}"; }

# run_python MODULE ARGUMENTS...: the same for a full module name. The user's folder may have its own random.py, or a megatron.
run_python() {
  ensure_setup
  PYTHONSAFEPATH=1 PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m "$@"
}

# gpus_found: the number of usable GPUs of this machine, 0 without a driver.
gpus_found() {
  if [[ ${MEGATRON_SFT_DEVICE-} == cpu ]] || ! command -v nvidia-smi >/dev/null; then
    printf 0
  elif [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
    awk -F, '{printf "%d", NF}' <<<"$CUDA_VISIBLE_DEVICES"
  else
    nvidia-smi --list-gpus 2>/dev/null | wc -l
  fi
}

# launch PROCESSES MODULE ARGUMENTS...: start that many processes on this node with torchrun. It replaces the shell, so that
# signals reach torchrun: make it a script's last line. With NNODES > 1 the nodes meet at RDZV_ENDPOINT (host:port of any
# node) with RDZV_ID, or at MASTER_ADDR and MASTER_PORT with each node's NODE_RANK.
launch() {
  local processes=$1 module=$2 addresses meet=(--standalone --local-addr localhost)
  shift 2
  whole_numbers processes NNODES SLURM_NODEID
  if ((${NNODES:-1} > 1)); then
    if [[ -n ${RDZV_ENDPOINT-} ]]; then
      meet=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-megatron-sft}")
      # SLURM knows every node's address and which node is first; torch would guess both from host names.
      read -r -a addresses <<<"${NODE_ADDRESSES-}"
      if ((${#addresses[@]})); then meet+=(--local-addr "${addresses[SLURM_NODEID]}" --rdzv-conf "is_host=$((SLURM_NODEID == 0))"); fi
    else
      [[ -n ${MASTER_ADDR-} && -n ${NODE_RANK-} ]] || die "NNODES=$NNODES needs MASTER_ADDR and each node's NODE_RANK, or RDZV_ENDPOINT: set them"
      meet=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
  fi
  ensure_setup
  export PYTHONSAFEPATH=1 PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  # With 1, kernels run in the order they were issued, which tensor-parallel overlap relies on.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  if ((processes > 1)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
  exec "$PYTHON" -m megatron.sft.launch "${meet[@]}" --nproc-per-node "$processes" -m "megatron.sft.$module" "$@"
}
