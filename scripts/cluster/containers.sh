# shellcheck shell=bash
# Shared by all container runtimes: the folders to mount, the variables to pass on, and a writable home folder.

# Variables that stay outside a container, as regular expressions of whole names.
HOST_VARIABLES=(
  _ PWD OLDPWD SHELL SHLVL HOSTNAME 'BASH_.*' '__.*'                                   # the shell
  TMPDIR TMP TEMP LANG LANGUAGE 'LC_.*' 'XDG_.*' 'SSH_.*' 'DBUS_.*' DISPLAY XAUTHORITY # the session
  PATH 'LD_.*' MANPATH INFOPATH CPATH LIBRARY_PATH 'MODULE.*' 'LMOD.*'                 # where the host's programs are
  'PYTHON.*' 'PIP_.*' 'VIRTUAL_ENV.*' 'CONDA.*' '_CE_.*' 'MAMBA.*' 'MEGATRON_SFT_(PYTHON|VENV)'
  'NVIDIA_.*' 'CUDA_(HOME|PATH|ROOT|VERSION)' NCCL_VERSION # the image has its own
  'DOCKER_.*' 'BUILDKIT_.*' '(APPTAINER|SINGULARITY|ENROOT|PODMAN).*' 'CONTAINER.*'
  HOME USER LOGNAME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR MPLCONFIGDIR # set by container_settings
)

# container_names: the exported variables that are passed into a container, one name per line.
container_names() {
  compgen -e | grep -vxE "$(IFS='|' && printf '%s' "${HOST_VARIABLES[*]}")"
}

# container_settings: a user name, a home folder in the repository and caches in it, as NAME=VALUE lines. A user id unknown to
# the image has no name and no home, and torch does not start without them.
container_settings() {
  local home=$ROOT/.cache/container-home user
  user=$(id -un 2>/dev/null) || user=user
  mkdir -p "$home/.cache"
  printf '%s\n' "HOME=$home" "USER=$user" "LOGNAME=$user" "XDG_CACHE_HOME=$home/.cache" "MPLCONFIGDIR=$home/.cache/matplotlib" \
    "TORCHINDUCTOR_CACHE_DIR=$home/.cache/torchinductor" "TRITON_CACHE_DIR=$home/.cache/triton"
}

# nearest_folder PATH: the nearest existing folder at or above an absolute path. Docker would create a missing one as root.
nearest_folder() {
  local path=$1
  [[ $path == /* ]] || return 0
  while [[ ! -d $path ]]; do path=$(dirname "$path"); done
  [[ $path == / ]] || printf '%s\n' "$path"
}

# container_folders: the folders that a run reads and writes, one per line: the repository, the current folder, the targets of
# links in the repository, and the folders in the settings.
container_folders() {
  local path
  {
    printf '%s\n' "$ROOT" "$PWD"
    for path in "$ROOT"/{assets,outputs}{,/checkpoints,/data,/slurm}; do readlink -e "$path" || true; done
    if [[ -n ${HF_HOME-} ]]; then mkdir -p "$HF_HOME"; fi
    for path in "$ASSETS_DIR" "${HF_HOME-}" "${PRETRAIN_CHECKPOINT_PATH-}" "${DATA_PATH-}" "${OUTPUT_PATH-}"; do nearest_folder "$path"; done
  } | awk -v root="$ROOT/" '!seen[$0]++ && (index($0 "/", root) != 1 || $0 "/" == root)'
}

# container_mounts: these folders and those of CONTAINER_MOUNTS, as FROM:TO lines.
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
    [[ -e ${path%%:*} ]] || die "CONTAINER_MOUNTS: ${path%%:*} does not exist: create it, or remove it from CONTAINER_MOUNTS"
    printf '%s\n' "$path"
  done <<<"$more"
}

# container_command: how a job step enters its container: sets CONTAINER_SRUN to options of srun (pyxis) and CONTAINER_PREFIX to
# the start of the command (the others).
# shellcheck disable=SC2034 # used by the callers
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
      # In pyxis, the image's variables override the job's unless they are named.
      CONTAINER_SRUN+=(--container-env="${names//$'\n'/,}")
      ;;
    *) die "CONTAINER=$CONTAINER: write none, pyxis, apptainer, docker or podman" ;;
  esac
}
