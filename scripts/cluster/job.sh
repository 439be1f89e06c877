# shellcheck shell=bash
# A training job inside its SLURM allocation: starts one launcher per node and requeues the job if the run ends early. 4_train.sh
# sources it with the recipe's variables set; it does not return.
#
# A requeued job resumes from the newest checkpoint. It is not requeued after a user's mistake, or after
# STARTS_WITHOUT_PROGRESS starts in a row from the same checkpoint.
requested_gpus=${SLURM_GPUS_ON_NODE:-${GPUS_PER_NODE-}}
# shellcheck source=scripts/cluster/cluster.env
source "$ROOT/scripts/cluster/cluster.env"
# shellcheck source=scripts/cluster/array.sh
source "$ROOT/scripts/cluster/array.sh"
# shellcheck source=scripts/cluster/containers.sh
source "$ROOT/scripts/cluster/containers.sh"
readonly RESUME_ME=75 # exit status of a run that saved on request

# say MESSAGE: write a line with the time to the job's log.
say() { printf '[%(%F %T)T] job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }

# saved_iteration: the iteration of the newest checkpoint of this run, or none.
saved_iteration() { cat "$OUTPUT_PATH/latest_checkpointed_iteration.txt" 2>/dev/null || echo none; }

# starts_from ITERATION: the number of most recent starts of this job in a row that began from that checkpoint.
starts_from() {
  awk -v job="$SLURM_JOB_ID" -v from="$1" '{n = $1 == job && $2 == from ? n + 1 : 0} END {print n + 0}' "$starts"
}

# claim_output: refuse a folder that another job is writing to, and record this start.
claim_output() {
  local owner
  mkdir -p "$OUTPUT_PATH"
  touch "$starts"
  owner=$(tail -n 1 "$starts" | cut -d' ' -f1)
  if [[ -n $owner && $owner != "$SLURM_JOB_ID" && -n $(squeue --noheader --jobs "$owner" --states RUNNING,COMPLETING 2>/dev/null) ]]; then
    die "OUTPUT_PATH $OUTPUT_PATH is being written by job $owner: wait for it, or set another OUTPUT_PATH"
  fi
  if (($(starts_from "$before") >= STARTS_WITHOUT_PROGRESS)); then
    die "$STARTS_WITHOUT_PROGRESS starts of job $SLURM_JOB_ID from iteration $before saved nothing new: not started again; see the messages above"
  fi
  printf '%s %s %s\n' "$SLURM_JOB_ID" "$before" "$SLURM_JOB_NODELIST" >>"$starts"
}

# meeting_point: the launchers meet at the first node, on a port derived from the job id.
meeting_point() {
  local name
  NNODES=$SLURM_NNODES GPUS_PER_NODE=$requested_gpus NODE_ADDRESSES=''
  while IFS= read -r name; do
    NODE_ADDRESSES+="$(scontrol show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') "
  done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  RDZV_ENDPOINT=${NODE_ADDRESSES%% *}:$((15000 + SLURM_JOB_ID % 15000))
  RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  export NNODES GPUS_PER_NODE NODE_ADDRESSES RDZV_ENDPOINT RDZV_ID
}

# shared_recipe: the path of the recipe on storage shared by all nodes. sbatch's copy exists on the first node only, so it is
# copied to outputs/slurm/JOB under the name it was submitted with.
shared_recipe() {
  local folder=$ROOT/outputs/slurm/$SLURM_JOB_ID command
  if [[ $RECIPE == "$ROOT"/* ]]; then echo "$RECIPE" && return; fi
  command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
  mkdir -p "$folder"
  cp "$RECIPE" "$folder/$(basename "${command%.sh}").sh"
  printf '%s\n' "$folder/$(basename "${command%.sh}").sh"
}

# run_step: run the recipe on every node, one launcher each; sets status.
run_step() {
  local step=(srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=0 --wait="$STEP_WAIT")
  if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
  if ((stopping)); then requeue "stopped before it started"; fi
  "${step[@]}" "${CONTAINER_SRUN[@]}" "${CONTAINER_PREFIX[@]}" bash "$recipe" ${mode:+"$mode"} &
  step_pid=$!
  status=138 # 128 + USR1: wait was interrupted
  while ((status == 138)); do status=0 && wait "$step_pid" || status=$?; done
}

# ask_to_stop: handles USR1, which SLURM sends to this shell before the time limit. srun forwards it to the step's processes.
ask_to_stop() {
  say "time limit approaching: asking the run to save and stop"
  stopping=1
  if [[ -n $step_pid ]]; then kill -USR1 "$step_pid"; fi
}

# requeue REASON: requeue this job, unless it makes no progress.
requeue() {
  local after
  after=$(saved_iteration)
  if [[ $after == "$before" ]] && (($(starts_from "$before") >= STARTS_WITHOUT_PROGRESS)); then
    die "$1; $STARTS_WITHOUT_PROGRESS starts from iteration $before saved nothing new: not requeued. Fix the cause and submit again"
  fi
  say "$1; iteration $after is saved: requeued to resume from it"
  scontrol requeue "$SLURM_JOB_ID" || die "job $SLURM_JOB_ID could not be requeued: submit the recipe again to resume from iteration $after"
  exit "$status"
}

stopping=0 status=0 step_pid=''
trap ask_to_stop USR1
[[ -n ${OUTPUT_PATH-} ]] || die "OUTPUT_PATH is not set: set it to the folder of this run"
if [[ -n ${ARRAY-} && -n ${SLURM_ARRAY_TASK_ID-} ]]; then use_array_task "$SLURM_ARRAY_TASK_ID"; fi
# A restart resumes: it would refuse the argument train, as the first start has saved checkpoints.
if ((${SLURM_RESTART_COUNT:-0})) && [[ $mode != reference ]]; then mode=''; fi
starts=$OUTPUT_PATH/slurm_starts.txt
before=$(saved_iteration)
claim_output
meeting_point
RECIPE=${RECIPE:-$ROOT/scripts/4_train.sh}
recipe=$(shared_recipe)
container_command
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) of ${recipe##*/} on $SLURM_JOB_NODELIST, output $OUTPUT_PATH, checkpoint: $before"
run_step
case $status in
  0) say "finished" && exit 0 ;;
  2) say "not requeued: fix the error above first" && exit 2 ;;
  "$RESUME_ME")
    if [[ -e $OUTPUT_PATH/stopped-by-request ]]; then say "stopped by stop-now: not requeued, submit again to resume" && exit 75; fi
    requeue "saved and stopped on request"
    ;;
  *) requeue "the run ended with status $status" ;;
esac
