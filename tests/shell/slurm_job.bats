#!/usr/bin/env bats
# scripts/cluster/job.sh: what a job does before its step and after it. srun and scontrol here only write down what they are
# told; tests/process/test_slurm.py runs the same on a real SLURM.
# shellcheck disable=SC2016,SC2030,SC2031,SC2164 # the stubs expand their own; each test is a shell of its own
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
  [[ $(requeues) == 0 && $output == *"not requeued: the error above is to be put right first" ]]
  SAVES=10 ENDS=75 run -75 bash "$recipe"
  [[ $(requeues) == 1 && $output == *"stopped as asked; iteration 10 is saved: requeued to go on from there" ]]
}

@test "a crash is tried again, but not without end when nothing new is saved" {
  for start in 1 2; do
    ENDS=1 SAVES=7 run -1 bash "$recipe"
    [[ $(requeues) == "$start" ]]
  done
  ENDS=137 run -137 bash "$recipe"
  [[ $(requeues) == 3 && $output == *"the run ended with status 137; iteration 7 is saved: requeued"* ]]
  ENDS=1 run -2 bash "$recipe"
  [[ $(requeues) == 3 && $output == *"error: the run ended with status 1; 3 starts from iteration 7 saved nothing new: not requeued."* ]]
  # SLURM's own requeue, after a node is lost, is bounded alike.
  run -2 bash "$recipe"
  [[ $output == "error: 3 starts of job 30077 from iteration 7 saved nothing new: not tried again;"* ]]
  SLURM_JOB_ID=30078 SAVES=8 run -0 bash "$recipe"
}

@test "a crash after new checkpoints is requeued however often" {
  for iteration in 1 2 3 4 5 6; do
    ENDS=1 SAVES=$iteration run -1 bash "$recipe"
  done
  [[ $(requeues) == 6 ]]
}

@test "a folder that another job writes to is refused, that of a job which is over is not" {
  mkdir "$OUTPUT_PATH"
  echo "5 none n9" >"$OUTPUT_PATH/slurm_starts.txt"
  run -2 bash "$recipe"
  [[ $output == "error: OUTPUT_PATH $root/out is being written by job 5: wait for it, or set another OUTPUT_PATH" && ! -e $CALLS ]]
  echo "6 none n9" >"$OUTPUT_PATH/slurm_starts.txt"
  run -0 bash "$recipe"
}

@test "every node gets one launcher and the place to meet, which the job's number gives" {
  SLURM_GPUS_ON_NODE=4 SLURM_CPUS_PER_TASK=32 SLURM_RESTART_COUNT=2 run -0 bash "$recipe" train
  call=$(<"$CALLS")
  [[ $call == "[srun][--nodes=2][--ntasks=2][--ntasks-per-node=1][--mpi=none][--kill-on-bad-exit=0][--wait=60][--cpus-per-task=32][bash][$recipe] "* ]]
  [[ $call == *" 10.0.0.1:15077 30077-2 10.0.0.1 10.0.0.2 / 4 LR= $root/out" ]]
}

@test "the word of a first start is kept for it" {
  run -0 bash "$recipe" train
  [[ $(<"$CALLS") == *"[bash][$recipe][train] "* ]]
}

@test "sbatch's copy of a recipe is put where every node sees it, under the name that it was submitted with" {
  cp "$recipe" "$BATS_TEST_TMPDIR/slurm_script"
  run -0 bash "$BATS_TEST_TMPDIR/slurm_script"
  [[ $(<"$CALLS") == *"[bash][$root/outputs/slurm/30077/My recipe.sh] "* ]]
  cmp "$recipe" "$root/outputs/slurm/30077/My recipe.sh"
}

@test "a task of an array has its values and a folder of its own" {
  export ARRAY="LR=1e-5,5e-6 SEED=1,2,3"
  for task in 0 4; do SLURM_ARRAY_TASK_ID=$task run -0 bash "$recipe"; done
  [[ $(sed -n 1p "$CALLS") == *" LR=1e-5 $root/out/LR=1e-5_SEED=1" ]]
  [[ $(sed -n 2p "$CALLS") == *" LR=5e-6 $root/out/LR=5e-6_SEED=2" ]]
}

@test "USR1 to the job's shell reaches srun once, and its end is waited for" {
  program srun 'trap "echo told >>$CALLS; sleep 0.3; echo saved >>$CALLS; exit 75" USR1
echo started >>"$CALLS"; for _ in {1..100}; do sleep 0.1; done'
  bash "$recipe" >"$BATS_TEST_TMPDIR/log" 2>&1 &
  job=$!
  until grep -qx started "$CALLS" 2>/dev/null; do sleep 0.1; done
  kill -USR1 "$job"
  status=0 && wait "$job" || status=$?
  [[ $status == 75 && $(<"$CALLS") == $'started\ntold\nsaved\nscontrol requeue 30077' ]]
  grep -q "the time is nearly up" "$BATS_TEST_TMPDIR/log"
}

@test "inside a step, for a plan, and without SLURM the recipe runs where it is" {
  program python '[[ $2 == megatron.sft.options ]] || printf "[%s]" "$@"'
  export MEGATRON_SFT_PYTHON=$stubs/python
  SLURM_STEP_ID=0 run -0 bash "$recipe"
  [[ $output == *"[-m][megatron.sft.launch]"* ]]
  run -0 bash "$recipe" plan
  unset SLURM_JOB_ID
  run -0 bash "$recipe"
  [[ ! -e $CALLS ]]
}
