#!/usr/bin/env bash
# Open a shell, or run one command, on a node of the cluster with GPUs, in the container set in scripts/cluster/cluster.env.
#
#   bash scripts/cluster/interactive.sh [COMMAND ARGUMENT...]
#
#   TIME_LIMIT=1:00:00 GPUS_PER_NODE=1 bash scripts/cluster/interactive.sh
#
# A recipe started in that shell runs on that node.
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh" || exit 2

case ${1-} in -h | --help) usage && exit 0 ;; esac
: "${TIME_LIMIT:=2:00:00}"
# shellcheck source=scripts/cluster/submit.sh
source "$ROOT/scripts/cluster/submit.sh"
# shellcheck source=scripts/cluster/containers.sh
source "$ROOT/scripts/cluster/containers.sh"

if (($# == 0)); then set -- bash; fi
srun_options=(--job-name interactive --nodes=1 --ntasks=1 --mpi=none --time="$TIME_LIMIT")
if [[ -t 0 && -t 1 ]]; then srun_options+=(--pty); fi
job_options interactive "$PARTITION"
for option in "${JOB_OPTIONS[@]}"; do
  # A batch job's log file would replace the terminal.
  [[ $option == --output=* ]] || srun_options+=("$option")
done
mapfile -t gpus < <(gpu_options)
container_command
exec srun "${srun_options[@]}" "${gpus[@]}" "${CONTAINER_SRUN[@]}" "${CONTAINER_PREFIX[@]}" "$@"
