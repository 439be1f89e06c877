#!/usr/bin/env bash
# Run a command in the project's container with this machine's GPUs, the repository and the model folders. It runs as you, so
# the files it writes are yours. Without a command, open a shell.
#
#   bash scripts/cluster/container.sh [COMMAND ARGUMENT...]
#
# CONTAINER=docker          docker, podman or apptainer (default: the first one available)
# CONTAINER_IMAGE=IMAGE     default megatron-sft (docker build -t megatron-sft .); for apptainer, a .sif file
# CONTAINER_MOUNTS="A B:C"  more folders, separated by spaces, or by newlines if the paths have spaces
#
# Exported variables are passed by name, so that no secret appears on the command line, except those set by the image (PATH, ...).
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/../lib/common.sh" || exit 2
# shellcheck source=scripts/cluster/containers.sh
source "$ROOT/scripts/cluster/containers.sh"

case ${1-} in -h | --help) usage && exit 0 ;; esac
if (($# == 0)); then set -- bash; fi

# runtime: the first one available. A docker client without a running daemon does not count.
runtime() {
  local name
  if [[ ${CONTAINER_IMAGE-} == *.sif ]]; then echo apptainer && return; fi
  if docker info >/dev/null 2>&1; then echo docker && return; fi
  for name in podman apptainer; do
    if command -v "$name" >/dev/null; then echo "$name" && return; fi
  done
  die "docker (with a running daemon), podman and apptainer are all missing: install or start one, or set CONTAINER"
}

# gpus: the GPUs of the container: those of the SLURM job, those in CUDA_VISIBLE_DEVICES, or all; empty on a machine without GPUs.
gpus() {
  if command -v nvidia-smi >/dev/null && [[ ${MEGATRON_SFT_DEVICE-} != cpu ]]; then
    printf '%s' "${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-${CUDA_VISIBLE_DEVICES:-all}}}"
  fi
}

# engine_options: sets OPTIONS to the options common to docker and podman.
engine_options() {
  local line
  OPTIONS=(--rm --init --interactive --ipc=host --network=host --workdir "$PWD")
  if [[ -t 0 && -t 1 ]]; then OPTIONS+=(--tty); fi
  if [[ -d /dev/infiniband ]]; then OPTIONS+=(--device /dev/infiniband); fi
  while IFS= read -r line; do OPTIONS+=(--volume "$line"); done <<<"$MOUNTS"
  # The engine renumbers the GPUs it passes on from 0.
  while IFS= read -r line; do OPTIONS+=(--env "$line"); done < <(container_settings && container_names | grep -vx CUDA_VISIBLE_DEVICES)
}

# docker_identity: adds the user's id, groups and name to OPTIONS. Not in rootless docker, where root inside is the user outside.
docker_identity() {
  local files=$ROOT/.cache/container-home user group
  if [[ $(docker info --format '{{.SecurityOptions}}' 2>/dev/null) == *rootless* ]]; then return; fi
  user=$(id -un 2>/dev/null) || user=user
  printf 'root:x:0:0:root:/root:/bin/bash\n%s:x:%s:%s::%s:/bin/bash\n' "$user" "$(id -u)" "$(id -g)" "$files" >"$files/passwd"
  printf 'root:x:0:\n%s:x:%s:\n' "$user" "$(id -g)" >"$files/group"
  OPTIONS+=(--user "$(id -u):$(id -g)" --volume "$files/passwd:/etc/passwd:ro" --volume "$files/group:/etc/group:ro")
  for group in $(id -G); do OPTIONS+=(--group-add "$group"); done
}

run_docker() {
  local gpus
  gpus=$(gpus)
  engine_options
  OPTIONS+=(--ulimit memlock=-1 --ulimit stack=67108864)
  case $gpus in
    '') ;;
    all) OPTIONS+=(--gpus all) ;;
    *) OPTIONS+=(--gpus "\"device=$gpus\"") ;;
  esac
  docker_identity
  exec docker run "${OPTIONS[@]}" "$IMAGE" "$@"
}

run_podman() {
  local gpu
  engine_options
  # Without root, limits cannot be raised: the container gets those of this shell.
  OPTIONS+=(--ulimit host --security-opt label=disable)
  for gpu in $(gpus | tr , ' '); do OPTIONS+=(--device "nvidia.com/gpu=$gpu"); done
  if (($(id -u))); then OPTIONS+=(--userns=keep-id --group-add keep-groups); fi
  exec podman run "${OPTIONS[@]}" "$IMAGE" "$@"
}

run_apptainer() {
  local line
  OPTIONS=(--cleanenv --home "$ROOT/.cache/container-home" --writable-tmpfs --pwd "$PWD")
  if [[ -n $(gpus) ]]; then OPTIONS+=(--nv); fi
  while IFS= read -r line; do OPTIONS+=(--bind "$line"); done <<<"$MOUNTS"
  while IFS= read -r line; do export "APPTAINERENV_$line=${!line}"; done < <(container_names)
  while IFS= read -r line; do export "APPTAINERENV_$line"; done < <(container_settings | grep -v ^HOME=)
  exec apptainer exec "${OPTIONS[@]}" "$IMAGE" "$@"
}

case ${CONTAINER:-none} in none | pyxis) CONTAINER=$(runtime) ;; esac
IMAGE=${CONTAINER_IMAGE:-megatron-sft}
case $CONTAINER in docker | podman)
  if [[ $IMAGE != */* ]] && ! "$CONTAINER" image inspect "$IMAGE" >/dev/null 2>&1; then
    die "image $IMAGE is not on this machine: build it with $CONTAINER build -t $IMAGE $ROOT, or set CONTAINER_IMAGE"
  fi
  ;;
esac
MOUNTS=$(container_mounts)
container_settings >/dev/null # creates the home folder
case $CONTAINER in
  docker | podman | apptainer) "run_$CONTAINER" "$@" ;;
  *) die "CONTAINER=$CONTAINER: write docker, podman or apptainer" ;;
esac
