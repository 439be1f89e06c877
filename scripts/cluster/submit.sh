# shellcheck shell=bash
# Handing jobs to SLURM; used by train.sbatch, pipeline.sh and interactive.sh.
# shellcheck source=scripts/cluster/cluster.env
source "$ROOT/scripts/cluster/cluster.env"
LOGS=$ROOT/outputs/slurm

command -v sbatch >/dev/null || die "sbatch is not there: this is for a SLURM cluster; on one machine run the recipe itself"

# job_options NAME PARTITION: what every job is told, into JOB_OPTIONS.
job_options() {
  local more
  whole_numbers NNODES GPUS_PER_NODE CPUS_PER_GPU
  mkdir -p "$LOGS"
  JOB_OPTIONS=(--job-name "$1" --export=ALL --output="$LOGS/%x-%j.out")
  if [[ -n $2 ]]; then JOB_OPTIONS+=(--partition "$2"); fi
  if [[ -n $ACCOUNT ]]; then JOB_OPTIONS+=(--account "$ACCOUNT"); fi
  read -r -a more <<<"$SBATCH_OPTIONS"
  JOB_OPTIONS+=("${more[@]}")
}

# gpu_options: what a step that trains asks of a node.
gpu_options() {
  if [[ ${MEGATRON_SFT_DEVICE-} == cpu ]]; then return; fi
  printf '%s\n' "--gpus-per-node=$GPUS_PER_NODE" "--cpus-per-task=$((GPUS_PER_NODE * CPUS_PER_GPU))"
}

# submit OPTION... SCRIPT ARGUMENT...: prints the job's number. A batch script finds the repository from the folder it was
# submitted from; the job itself starts in the caller's.
submit() {
  local answer
  answer=$(cd "$ROOT" && sbatch --parsable --chdir="$OLDPWD" "$@") || die "sbatch refused the job: its reason is above"
  printf '%s\n' "${answer%%;*}"
}
