#!/usr/bin/env bats
# scripts/lib/common.sh: finding the repository, messages, and the arguments of Python.
# shellcheck disable=SC2016,SC2164 # bash -c expands its own; bats ends a test at the first failure
bats_require_minimum_version 1.5.0

setup() {
  load support
  clean_environment
  recording_python
}

@test "a script finds the repository by any path, through a link and in sbatch's copy" {
  root=$(copied_repository "a b's \$(c)")
  mkdir -p "$root/scripts/sft"
  ln -s "$root/scripts/2_convert.sh" "$BATS_TEST_TMPDIR/link"
  cp "$root/scripts/2_convert.sh" "$BATS_TEST_TMPDIR/slurm_script"
  cd "$root/scripts/sft"
  for script in "$root/scripts/2_convert.sh" ../2_convert.sh "$BATS_TEST_TMPDIR/link"; do
    run -0 bash "$script" model
    [[ ${lines[0]} == "in $root/scripts/sft with $root" ]]
  done
  for submitted_from in "$root" "$root/scripts" "$root/scripts/sft"; do
    SLURM_SUBMIT_DIR=$submitted_from run -0 bash "$BATS_TEST_TMPDIR/slurm_script" model
    [[ ${lines[0]} == *" with $root" ]]
  done
}

@test "no other megatron is imported, nor a module of the folder where a script is started" {
  mkdir -p "$BATS_TEST_TMPDIR"/{clone,other,started/megatron}
  mkdir "$BATS_TEST_TMPDIR/clone/megatron"
  touch "$BATS_TEST_TMPDIR"/started/{random,megatron/__init__}.py
  cd "$BATS_TEST_TMPDIR/started"
  sed -i '2i echo "safe $PYTHONSAFEPATH, warnings ${PYTHONWARNINGS-no}, optimize ${PYTHONOPTIMIZE-no}"' "$MEGATRON_SFT_PYTHON"
  export PYTHONPATH=":$BATS_TEST_TMPDIR/clone:$REPOSITORY:$BATS_TEST_TMPDIR/other" PYTHONWARNINGS=error PYTHONOPTIMIZE=2
  run -0 bash "$REPOSITORY/scripts/2_convert.sh" model
  [[ ${lines[0]} == "PYTHONPATH: $BATS_TEST_TMPDIR/clone is not used"* ]]
  [[ ${lines[1]} == "safe 1, warnings no, optimize no" && ${lines[2]} == *" with $REPOSITORY:$BATS_TEST_TMPDIR/other" ]]
  MEGATRON_SFT_PYTHON=$(type -P python3) run -0 bash -c 'source "$0/scripts/lib/common.sh"; run_python megatron.sft || true' "$REPOSITORY"
  [[ $output == *"No module named megatron.sft.__main__"* ]]
}

@test "outside a repository a copied script fails" {
  cp "$REPOSITORY/scripts/2_convert.sh" "$BATS_TEST_TMPDIR/slurm_script"
  cd "$BATS_TEST_TMPDIR"
  run -2 bash slurm_script model
}

@test "arguments reach Python as they were typed" {
  cd "$BATS_TEST_TMPDIR"
  run -0 bash "$REPOSITORY/scripts/2_convert.sh" "my model's/\$(touch bad) \"x\" *" 2 1
  [[ ${lines[1]} == "[-m][megatron.sft.convert][--source][my model's/\$(touch bad) \"x\" *][--tensor-model-parallel-size][2]"* ]]
  [[ ${lines[1]} == *"[--output][my model's/\$(touch bad) \"x\" *_Megatron_TP2PP1]"* ]]
  [[ ! -e bad ]]
}

@test "-h shows the header of every script" {
  for script in "$REPOSITORY"/scripts/[1235]_*.sh "$REPOSITORY"/scripts/checkpoints/*.sh; do
    run -0 bash "$script" -h
    [[ $output == *"bash scripts/"* && $output != *"#!"* && $output != *shellcheck* ]]
  done
}

@test "a wrong number of arguments is one line with the right form" {
  run -2 --separate-stderr bash "$REPOSITORY/scripts/5_export.sh" only
  [[ $stderr == "error: 5_export.sh got 1 arguments: write bash scripts/5_export.sh CKPT HF_DIR OUT [ITERATION] (-h explains them)" ]]
  [[ -z $output ]]
}

@test "a Python that does not exist is named" {
  MEGATRON_SFT_PYTHON=/no/python run -2 bash "$REPOSITORY/scripts/2_convert.sh" model
  [[ $output == "error: MEGATRON_SFT_PYTHON=/no/python is not a program: "* ]]
}

# launched N ARGUMENTS...: what launch hands to Python.
launched() {
  bash -c 'source "$0/scripts/lib/common.sh"; launch "$@"' "$REPOSITORY" "$@" | tail -n 1
}

@test "launch starts the processes of one node on a free port" {
  run -0 launched 2 train --lr "1e-5 x"
  [[ $output == "[-m][megatron.sft.launch][--standalone]"*"[--nproc-per-node][2][-m][megatron.sft.train][--lr][1e-5 x]" ]]
}

@test "launch joins several nodes, by the first node's address or by rendezvous" {
  NNODES=2 NODE_RANK=1 MASTER_ADDR=first run -0 launched 8 train
  [[ $output == *"[--nnodes][2][--node-rank][1][--master-addr][first][--master-port][29500]"* ]]
  NNODES=4 RDZV_ENDPOINT=first:29400 RDZV_ID=77 run -0 launched 8 train
  [[ $output == *"[--nnodes][4][--rdzv-backend][c10d][--rdzv-endpoint][first:29400][--rdzv-id][77]"* ]]
  NNODES=2 run -2 bash -c 'source "$0/scripts/lib/common.sh"; launch 8 train' "$REPOSITORY"
  [[ $output == "error: NNODES=2 needs MASTER_ADDR"* ]]
}

@test "MAX_RESTARTS is refused before anything starts, 0 and empty are not" {
  for mode in train resume plan ''; do
    MAX_RESTARTS=3 run -2 bash "$REPOSITORY/scripts/4_train.sh" ${mode:+"$mode"}
    [[ ${#lines[@]} == 1 && $output == "error: MAX_RESTARTS is '3': "*docs/reliability.md* ]]
  done
  # Python's table of settings is empty here.
  sed -i '2i [[ $2 != megatron.sft.options ]] || exit 0' "$MEGATRON_SFT_PYTHON"
  for value in '' 0; do
    MAX_RESTARTS=$value run -0 bash "$REPOSITORY/scripts/4_train.sh" train
    [[ $output == *"[-m][megatron.sft.launch]"* && $output != *restarts* ]]
  done
}
