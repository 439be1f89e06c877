#!/usr/bin/env bats
# scripts/cluster/job.sh: what a job does before and after its step. srun and scontrol only record their arguments here;
# tests/process/test_slurm.py runs the same scripts on a real SLURM.
# shellcheck disable=SC2016,SC2030,SC2031,SC2164 # the stubs expand their own; each test is a separate shell
bats_require_minimum_version 1.5.0

setup() {
  load support
  clean_environment
  unset "${!SLURM@}" CONTAINER ARRAY STARTS_WITHOUT_PROGRESS GPUS_PER_NODE MEGATRON_SFT_DEVICE
  root=$(copied_repository "shared $ folder")
  stubs=$BATS_TEST_TMPDIR/stubs
  mkdir "$stubs"
  PATH=$stubs:$PATH
  export OUTPUT_PATH="$root/out" CALLS="$BATS_TEST_TMPDIR/calls"
  export SLURM_JOB_ID=30077 SLURM_NNODES=2 SLURM_JOB_NODELIST='n[1-2]' SLURM_SUBMIT_DIR="$root"
  # A step saves iteration $SAVES and ends with status $ENDS.
  program srun 'printf "[%s]" srun "$@" >>"$CALLS"; echo " $RDZV_ENDPOINT $RDZV_ID $NODE_ADDRESSES/ $GPUS_PER_NODE LR=${LR-} $OUTPUT_PATH" >>"$CALLS"
mkdir -p "$OUTPUT_PATH"; if [[ -n ${SAVES-} ]]; then echo "$SAVES" >"$OUTPUT_PATH/latest_checkpointed_iteration.txt"; fi
exit "${ENDS-0}"'
  program scontrol 'case "$1 $2" in
  "show hostnames") printf "n1\nn2\n" ;;
  "show node") echo "   NodeAddr=10.0.0.${3#n} NodeHostName=$3" ;;
  "show job") echo "   Command=/home/jo/My recipe.sh" ;;
  *) echo "scontrol $*" >>"$CALLS" ;;
esac'
  program squeue '[[ $* == *"--jobs 5 "* ]] && echo "5 running"'
  recipe="$root/scripts/sft/SFT_Quickstart.sh"
  cd "$root"
}

# program NAME BODY: a program of that name that comes first in PATH.
program() {
  printf '#!/usr/bin/env bash\n%s\n' "$2" >"$stubs/$1"
  chmod +x "$stubs/$1"
}

requeues() { grep -c '^scontrol requeue 30077$' "$CALLS" || true; }

@test "a finished run ends the job, a stopped one is requeued, a user's mistake is not" {
  run -0 bash "$recipe"
  [[ $(requeues) == 0 && $output == *"job 30077: start 1 of SFT_Quickstart.sh on n[1-2], output $root/out, checkpoint: none"*finished ]]
  ENDS=2 run -2 bash "$recipe"
  [[ $(requeues) == 0 && $output == *"not requeued: "* ]]
  SAVES=10 ENDS=75 run -75 bash "$recipe"
  [[ $(requeues) == 1 && $output == *"iteration 10 is saved: requeued"* ]]
}

@test "a run that was asked to stop by stop-now is not requeued" {
  mkdir -p "$OUTPUT_PATH" && touch "$OUTPUT_PATH/stopped-by-request"
  SAVES=10 ENDS=75 run -75 bash "$recipe"
  [[ $(requeues) == 0 && $output == *"submit again to resume"* ]]
}

@test "a crash is requeued, but only so often while nothing new is saved" {
  for start in 1 2; do
    ENDS=1 SAVES=7 run -1 bash "$recipe"
    [[ $(requeues) == "$start" ]]
  done
  ENDS=137 run -137 bash "$recipe"
  [[ $(requeues) == 3 && $output == *"the run ended with status 137; iteration 7 is saved: requeued"* ]]
  ENDS=1 run -2 bash "$recipe"
  [[ $(requeues) == 3 && $output == *"error: the run ended with status 1; 3 starts from iteration 7 "*"not requeued."* ]]
  # SLURM's own requeue, after a node is lost, has the same limit.
  run -2 bash "$recipe"
  [[ $output == "error: 3 starts of job 30077 from iteration 7 "* ]]
  SLURM_JOB_ID=30078 SAVES=8 run -0 bash "$recipe"
}

@test "a crash after new checkpoints is requeued however often" {
  for iteration in 1 2 3 4 5 6; do
    ENDS=1 SAVES=$iteration run -1 bash "$recipe"
  done
  [[ $(requeues) == 6 ]]
}

@test "a folder that another job writes to is refused, the folder of a finished job is not" {
  mkdir "$OUTPUT_PATH"
  echo "5 none n9" >"$OUTPUT_PATH/slurm_starts.txt"
  run -2 bash "$recipe"
  [[ $output == "error: OUTPUT_PATH $root/out is being written by job 5: wait for it, or set another OUTPUT_PATH" && ! -e $CALLS ]]
  echo "6 none n9" >"$OUTPUT_PATH/slurm_starts.txt"
  run -0 bash "$recipe"
}

@test "every node gets one launcher and a meeting point derived from the job id" {
  SLURM_GPUS_ON_NODE=4 SLURM_CPUS_PER_TASK=32 SLURM_RESTART_COUNT=2 run -0 bash "$recipe" train
  call=$(<"$CALLS")
  [[ $call == "[srun][--nodes=2][--ntasks=2][--ntasks-per-node=1][--mpi=none][--kill-on-bad-exit=0][--wait=60][--cpus-per-task=32][bash][$recipe] "* ]]
  [[ $call == *" 10.0.0.1:15077 30077-2 10.0.0.1 10.0.0.2 / 4 LR= $root/out" ]]
}

@test "train is passed on by the first start only" {
  run -0 bash "$recipe" train
  [[ $(<"$CALLS") == *"[bash][$recipe][train] "* ]]
}

@test "sbatch's copy of a recipe is copied to shared storage under the name it was submitted with" {
  cp "$recipe" "$BATS_TEST_TMPDIR/slurm_script"
  run -0 bash "$BATS_TEST_TMPDIR/slurm_script"
  [[ $(<"$CALLS") == *"[bash][$root/outputs/slurm/30077/My recipe.sh] "* ]]
  cmp "$recipe" "$root/outputs/slurm/30077/My recipe.sh"
}

@test "a task of an array has its own values and folder, and one outside ARRAY is refused" {
  export ARRAY="LR=1e-5,5e-6 SEED=1,2,3"
  for task in 0 4; do SLURM_ARRAY_TASK_ID=$task run -0 bash "$recipe"; done
  [[ $(sed -n 1p "$CALLS") == *" LR=1e-5 $root/out/LR=1e-5_SEED=1" ]]
  [[ $(sed -n 2p "$CALLS") == *" LR=5e-6 $root/out/LR=5e-6_SEED=2" ]]
  SLURM_ARRAY_TASK_ID=6 run -2 bash "$recipe"
  [[ $output == "error: ARRAY has 6 tasks, numbered from 0, and no task 6: "* ]]
}

@test "USR1 to the job's shell reaches srun once, and the job waits for it" {
  program srun 'trap "echo asked >>$CALLS; sleep 0.3; echo saved >>$CALLS; exit 75" USR1
echo started >>"$CALLS"; for _ in {1..100}; do sleep 0.1; done'
  bash "$recipe" >"$BATS_TEST_TMPDIR/log" 2>&1 &
  job=$!
  until grep -qx started "$CALLS" 2>/dev/null; do sleep 0.1; done
  kill -USR1 "$job"
  status=0 && wait "$job" || status=$?
  [[ $status == 75 && $(<"$CALLS") == $'started\nasked\nsaved\nscontrol requeue 30077' ]]
  grep -q "asking the run to save and stop" "$BATS_TEST_TMPDIR/log"
}

@test "inside a step, for a plan, and without SLURM the recipe runs on this machine" {
  program python '[[ $2 == megatron.sft.options ]] || printf "[%s]" "$@"'
  export MEGATRON_SFT_PYTHON=$stubs/python
  SLURM_STEP_ID=0 run -0 bash "$recipe"
  [[ $output == *"[-m][megatron.sft.launch]"* ]]
  run -0 bash "$recipe" plan
  unset SLURM_JOB_ID
  run -0 bash "$recipe"
  [[ ! -e $CALLS ]]
}
