# shellcheck shell=bash
# Submitting jobs to SLURM. Sourced by train.sbatch, pipeline.sh and interactive.sh.
# shellcheck source=scripts/cluster/cluster.env
source "$ROOT/scripts/cluster/cluster.env"
LOGS=$ROOT/outputs/slurm

command -v sbatch >/dev/null || die "sbatch is not installed: this script is for a SLURM cluster; on one machine, run the recipe itself"

# job_options NAME PARTITION: sets JOB_OPTIONS to the options common to all jobs.
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

# gpu_options: the GPUs and processors of a node that trains, one option per line.
gpu_options() {
  if [[ ${MEGATRON_SFT_DEVICE-} == cpu ]]; then return; fi
  printf '%s\n' "${GPU_REQUEST:---gpus-per-node=$GPUS_PER_NODE}" "--cpus-per-task=$((GPUS_PER_NODE * CPUS_PER_GPU))"
}

# submit OPTION... SCRIPT ARGUMENT...: submit and print the job id. A batch script finds the repository through the folder it is
# submitted from (ROOT); the job itself starts in the caller's folder.
submit() {
  local answer
  answer=$(cd "$ROOT" && sbatch --parsable --chdir="$OLDPWD" "$@") || die "sbatch rejected the job: see its message above"
  printf '%s\n' "${answer%%;*}"
}
