# shellcheck shell=bash
# What every container runtime is told: the folders it sees, the variables that go in, and a home that the user may write.

# container_names: the exported variables that go into a container, a name a line. Left out is what the image decides, and what
# container_settings sets.
container_names() {
  compgen -e | grep -vxE '_|PATH|PWD|OLDPWD|SHELL|SHLVL|HOSTNAME|TMPDIR|TMP|TEMP|LANG|LANGUAGE|LC_.*|LD_.*|MANPATH|INFOPATH|CPATH|LIBRARY_PATH|PYTHON.*|PIP_.*|VIRTUAL_ENV.*|CONDA.*|_CE_.*|MAMBA.*|MEGATRON_SFT_(PYTHON|VENV)|NVIDIA_.*|CUDA_(HOME|PATH|ROOT|VERSION)|NCCL_VERSION|XDG_.*|SSH_.*|DBUS_.*|DISPLAY|XAUTHORITY|MODULE.*|LMOD.*|__.*|BASH_.*|DOCKER_.*|BUILDKIT_.*|(APPTAINER|SINGULARITY|ENROOT|PODMAN).*|CONTAINER.*|HOME|USER|LOGNAME|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|MPLCONFIGDIR'
}

# container_settings: a home inside the repository and the caches of torch and others in it, a NAME=VALUE a line. An id that
# the image does not know has neither a home nor a name, without which torch does not start.
container_settings() {
  local home=$ROOT/.cache/container-home user
  user=$(id -un 2>/dev/null) || user=user
  mkdir -p "$home/.cache"
  printf '%s\n' "HOME=$home" "USER=$user" "LOGNAME=$user" "XDG_CACHE_HOME=$home/.cache" "MPLCONFIGDIR=$home/.cache/matplotlib" \
    "TORCHINDUCTOR_CACHE_DIR=$home/.cache/torchinductor" "TRITON_CACHE_DIR=$home/.cache/triton"
}

# nearest_folder PATH: the nearest folder at or above an absolute path that exists. Docker would make a missing one as root.
nearest_folder() {
  local path=$1
  [[ $path == /* ]] || return 0
  while [[ ! -d $path ]]; do path=$(dirname "$path"); done
  [[ $path == / ]] || printf '%s\n' "$path"
}

# container_folders: what a run reads and writes, a folder a line: the repository, the current folder, where links in the
# repository lead, and what the settings name.
container_folders() {
  local path
  {
    printf '%s\n' "$ROOT" "$PWD"
    for path in "$ROOT"/{assets,outputs}{,/checkpoints,/data,/slurm}; do readlink -e "$path" || true; done
    if [[ -n ${HF_HOME-} ]]; then mkdir -p "$HF_HOME"; fi
    for path in "$ASSETS_DIR" "${HF_HOME-}" "${PRETRAIN_CHECKPOINT_PATH-}" "${DATA_PATH-}" "${OUTPUT_PATH-}"; do nearest_folder "$path"; done
  } | awk -v root="$ROOT/" '!seen[$0]++ && (index($0 "/", root) != 1 || $0 "/" == root)'
}

# container_mounts: the same as FROM:TO lines, with those of CONTAINER_MOUNTS.
container_mounts() {
  local path folders more
  folders=$(container_folders)
  while IFS= read -r path; do
    [[ $path != *[:,]* ]] || die "folder '$path' cannot be mounted into a container: rename it without ':' and ','"
    printf '%s:%s\n' "$path" "$path"
  done <<<"$folders"
  more=${CONTAINER_MOUNTS-}
  if [[ $more != *$'\n'* ]]; then more=${more// /$'\n'}; fi
  while IFS= read -r path; do
    if [[ -z $path ]]; then continue; fi
    [[ $path == *:* ]] || path=$path:$path
    [[ -e ${path%%:*} ]] || die "CONTAINER_MOUNTS: ${path%%:*} does not exist: make it, or take it out"
    printf '%s\n' "$path"
  done <<<"$more"
}

# container_command: how a step of a job gets into its container: sets CONTAINER_SRUN to srun's options (pyxis) and
# CONTAINER_PREFIX to what goes before the command (the others).
# shellcheck disable=SC2034 # used by those who call it
container_command() {
  local mounts names setting
  CONTAINER_SRUN=() CONTAINER_PREFIX=()
  case $CONTAINER in
    none) ;;
    apptainer | docker | podman)
      CONTAINER_PREFIX=(bash "$ROOT/scripts/cluster/container.sh")
      export CONTAINER CONTAINER_IMAGE CONTAINER_MOUNTS
      ;;
    pyxis)
      mounts=$(container_mounts)
      names=$(container_names && container_settings | cut -d= -f1)
      while IFS= read -r setting; do export "${setting?}"; done < <(container_settings)
      unset "${!PYTHON@}" MEGATRON_SFT_PYTHON MEGATRON_SFT_VENV
      CONTAINER_SRUN=(--container-image="$CONTAINER_IMAGE" --container-mounts="${mounts//$'\n'/,}")
      CONTAINER_SRUN+=(--container-workdir="$PWD" --no-container-mount-home)
      # What the image sets wins over the job's environment in pyxis, unless it is named.
      CONTAINER_SRUN+=(--container-env="${names//$'\n'/,}")
      ;;
    *) die "CONTAINER=$CONTAINER: write none, pyxis, apptainer, docker or podman" ;;
  esac
}
