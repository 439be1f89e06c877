#!/usr/bin/env bats
# scripts/cluster/container.sh and jobs in containers: what each container runtime is told. The runtimes here only write down
# their arguments; none of the real ones runs in CI.
# shellcheck disable=SC2016,SC2030,SC2031,SC2164 # the stubs expand their own; each test is a shell of its own
bats_require_minimum_version 1.5.0

setup() {
  load support
  clean_environment
  unset CONTAINER CONTAINER_IMAGE CONTAINER_MOUNTS CUDA_VISIBLE_DEVICES MEGATRON_SFT_DEVICE MEGATRON_SFT_PYTHON HF_HOME OUTPUT_PATH
  unset "${!SLURM@}" DOCKER_INFO
  root=$(copied_repository "my models")
  home="$root/.cache/container-home"
  stubs=$BATS_TEST_TMPDIR/stubs
  mkdir "$stubs"
  PATH=$stubs:$PATH
  for name in docker podman apptainer srun; do recorder "$name"; done
  program nvidia-smi 'echo "GPU 0: NVIDIA H100"'
  program id 'case $1 in -u | -g) echo 1234 ;; -un) echo jo ;; -G) echo "1234 27" ;; esac'
  cd "$root"
}

# program NAME BODY: a program of that name that comes first in PATH.
program() {
  printf '#!/usr/bin/env bash\n%s\n' "$2" >"$stubs/$1"
  chmod +x "$stubs/$1"
}

# recorder NAME: a program that prints its name and arguments, one a line in brackets, and the variables that a test looks for.
recorder() {
  program "$1" '
if [[ $1 == info ]]; then printf "%s\n" "${DOCKER_INFO-[name=seccomp]}" && exit; fi
printf "[%s]\n" "${0##*/}" "$@"
for name in APPTAINERENV_HF_TOKEN APPTAINERENV_USER PYTHONPATH MEGATRON_SFT_PYTHON TORCHINDUCTOR_CACHE_DIR; do
  printf "%s=%s\n" "$name" "${!name-}"
done'
}

# has LINE...: every line is in the output. has_not: none is.
has() {
  for line in "$@"; do grep -qxF -- "$line" <<<"$output" || { echo "missing: $line in: $output" && return 1; }; done
}
has_not() {
  for line in "$@"; do
    if grep -qF -- "$line" <<<"$output"; then echo "not wanted: $line in: $output" && return 1; fi
  done
}

# option NAME VALUE: that option is followed by that value.
option() {
  grep -xFA1 -- "[$1]" <<<"$output" | grep -qxF -- "[$2]" || { echo "no $1 $2 in: $output" && return 1; }
}

in_container() { CONTAINER=$1 bash "$root/scripts/cluster/container.sh" "${@:2}"; }

@test "docker gets the GPUs, the shared memory, the limits, the folders and the user" {
  export OUTPUT_PATH="$BATS_TEST_TMPDIR/new runs/a" HF_HOME="$BATS_TEST_TMPDIR/hf home"
  run -0 in_container docker python -c 'print("a b")'
  [[ ${lines[0]} == "[docker]" && ${lines[1]} == "[run]" ]]
  has "[--rm]" "[--init]" "[--ipc=host]" "[--network=host]"
  option --gpus all
  option --ulimit memlock=-1
  option --ulimit stack=67108864
  option --user 1234:1234
  option --group-add 27
  option --workdir "$root"
  option --volume "$root:$root"
  option --volume "$HF_HOME:$HF_HOME"
  option --volume "$BATS_TEST_TMPDIR:$BATS_TEST_TMPDIR" # the output folder is not there yet
  option --volume "$home/passwd:/etc/passwd:ro"
  [[ $output == *$'[megatron-sft]\n[python]\n[-c]\n[print("a b")]'* ]]
  [[ ! -e $OUTPUT_PATH && $(grep ^jo "$home/passwd") == "jo:x:1234:1234::$home:/bin/bash" ]]
}

@test "torch's caches, the home and the name of the user go in, and a secret by its name alone" {
  export HF_TOKEN=hf_secret LR=2e-5 PATH LD_LIBRARY_PATH=/x PYTHONPATH=/y MEGATRON_SFT_PYTHON=/z/python CUDA_HOME=/cuda
  for runtime in docker podman; do
    run -0 in_container "$runtime" true
    for setting in "HOME=$home" USER=jo LOGNAME=jo "TORCHINDUCTOR_CACHE_DIR=$home/.cache/torchinductor" "TRITON_CACHE_DIR=$home/.cache/triton" HF_TOKEN LR; do
      option --env "$setting"
    done
    has_not hf_secret "[PATH]" "[LD_LIBRARY_PATH]" "[PYTHONPATH]" "[MEGATRON_SFT_PYTHON]" "[CUDA_HOME]"
  done
}

@test "rootless docker: root inside is the user, so no id is given" {
  export DOCKER_INFO='[name=seccomp,profile=builtin name=rootless name=cgroupns]'
  run -0 in_container docker true
  has_not "[--user]" "[--group-add]" "/etc/passwd"
  option --gpus all
  option --env "HOME=$home"
}

@test "podman keeps the id, takes the shell's limits and gets the GPUs by their CDI names" {
  CUDA_VISIBLE_DEVICES=0,2 run -0 in_container podman true
  [[ ${lines[0]} == "[podman]" && ${lines[1]} == "[run]" ]]
  has "[--userns=keep-id]" "[--ipc=host]"
  option --group-add keep-groups
  option --ulimit host
  option --device nvidia.com/gpu=0
  option --device nvidia.com/gpu=2
  option --volume "$root:$root"
  has_not "[--gpus]" "memlock" "[CUDA_VISIBLE_DEVICES]"
}

@test "apptainer gets a clean environment, into which variables go without standing on the command line" {
  export HF_TOKEN=hf_secret
  CONTAINER_IMAGE="$BATS_TEST_TMPDIR/my image.sif" run -0 bash "$root/scripts/cluster/container.sh" bash -c "echo a"
  [[ ${lines[0]} == "[apptainer]" && ${lines[1]} == "[exec]" ]]
  has "[--nv]" "[--cleanenv]" "[--writable-tmpfs]" "APPTAINERENV_HF_TOKEN=hf_secret" APPTAINERENV_USER=jo
  has_not "[hf_secret"
  option --home "$home"
  option --pwd "$root"
  option --bind "$root:$root"
  [[ $output == *"[$BATS_TEST_TMPDIR/my image.sif]"$'\n[bash]\n[-c]\n[echo a]'* ]]
}

@test "the GPUs are those of the SLURM job, and none where there is none" {
  SLURM_STEP_GPUS=4,5 CUDA_VISIBLE_DEVICES=0,1 run -0 in_container docker true
  option --gpus '"device=4,5"'
  has_not "[CUDA_VISIBLE_DEVICES]"
  MEGATRON_SFT_DEVICE=cpu run -0 in_container docker true
  has_not "[--gpus]"
  option --env MEGATRON_SFT_DEVICE
}

@test "the first runtime that answers is taken" {
  run -0 bash "$root/scripts/cluster/container.sh" true
  [[ ${lines[0]} == "[docker]" ]]
  program docker 'exit 1'
  run -0 bash "$root/scripts/cluster/container.sh" true
  [[ ${lines[0]} == "[podman]" ]]
}

@test "folders behind links and more folders are mounted; one that is missing is named" {
  mkdir -p "$BATS_TEST_TMPDIR/big disk/checkpoints" "$root/assets" "$BATS_TEST_TMPDIR/x y"
  ln -s "$BATS_TEST_TMPDIR/big disk/checkpoints" "$root/assets/checkpoints"
  CONTAINER_MOUNTS="$BATS_TEST_TMPDIR/x y:/data:ro"$'\n'/etc run -0 in_container docker true
  option --volume "$BATS_TEST_TMPDIR/big disk/checkpoints:$BATS_TEST_TMPDIR/big disk/checkpoints"
  option --volume "$BATS_TEST_TMPDIR/x y:/data:ro"
  option --volume /etc:/etc
  CONTAINER_MOUNTS=/no/such run -2 in_container docker true
  [[ $output == "error: CONTAINER_MOUNTS: /no/such does not exist: make it, or take it out" ]]
}

# job: the recipe as a batch script on two nodes, with a recording srun; what it ran.
job() {
  program scontrol 'if [[ $2 == hostnames ]]; then printf "n1\nn2\n"; else echo "   NodeAddr=addr-$3 NodeHostName=$3"; fi'
  program squeue true
  export SLURM_JOB_ID=77 SLURM_NNODES=2 SLURM_JOB_NODELIST='n[1-2]' SLURM_GPUS_ON_NODE=8 SLURM_CPUS_PER_TASK=64
  OUTPUT_PATH=$root/out bash "$root/scripts/sft/SFT_Quickstart.sh"
}

@test "pyxis: srun makes the container, and the job's variables win over the image's" {
  export CONTAINER=pyxis CONTAINER_IMAGE='nvcr.io#nvidia/pytorch:26.06-py3' HF_TOKEN=hf_secret PYTHONPATH=/y MEGATRON_SFT_PYTHON=/z
  run -0 job
  has "[srun]" "[--nodes=2]" "[--ntasks=2]" "[--ntasks-per-node=1]" "[--cpus-per-task=64]" "[--container-image=nvcr.io#nvidia/pytorch:26.06-py3]" \
    "[--container-mounts=$root:$root]" "[--container-workdir=$root]" "[--no-container-mount-home]" \
    "PYTHONPATH=" "MEGATRON_SFT_PYTHON=" "TORCHINDUCTOR_CACHE_DIR=$home/.cache/torchinductor"
  names=$(sed -n 's/^\[--container-env=\(.*\)\]$/,\1,/p' <<<"$output")
  for name in HF_TOKEN RDZV_ENDPOINT NODE_ADDRESSES NNODES GPUS_PER_NODE NCCL_DEBUG HOME USER TORCHINDUCTOR_CACHE_DIR; do
    [[ $names == *,$name,* ]] || { echo "$name is not in $names" && return 1; }
  done
  has_not hf_secret
}

@test "the other runtimes: container.sh runs on every node, without a container the recipe itself" {
  CONTAINER=apptainer CONTAINER_IMAGE=/images/sft.sif run -0 job
  [[ $output == *$'\n[bash]\n'"[$root/scripts/cluster/container.sh]"$'\n[bash]\n'"[$root/scripts/sft/SFT_Quickstart.sh]"* ]]
  has_not "[--container"
  run -0 job
  [[ $output == *$'\n[bash]\n'"[$root/scripts/sft/SFT_Quickstart.sh]"* ]]
  CONTAINER=lxc run -2 job
  [[ $output == *"error: CONTAINER=lxc: write none, pyxis, apptainer, docker or podman" ]]
}

@test "with these settings an id that the machine does not know has a name, which torch asks for, and a home to write to" {
  [[ $EUID == 0 ]] || skip "needs root to take another id"
  rm "$stubs/id"
  chmod a+rX "$BATS_RUN_TMPDIR" "$BATS_RUN_TMPDIR/test"
  chmod -R a+rwX "$BATS_TEST_TMPDIR"
  settings=$(bash -c 'source "$0/scripts/lib/common.sh" && source "$ROOT/scripts/cluster/containers.sh" && container_settings' "$root")
  chmod -R a+rwX "$home"
  mapfile -t settings <<<"$settings"
  as_stranger=(setpriv --reuid=54321 --regid=54321 --clear-groups env -i "PATH=/usr/bin:/bin")
  name='import getpass; print(getpass.getuser())'
  run -1 "${as_stranger[@]}" python3 -c "$name"
  run -0 "${as_stranger[@]}" "${settings[@]}" python3 -c "$name; open('$home/.cache/mine', 'w')"
}
