# shellcheck shell=bash
# Creates or updates the environment. Sourced by setup.sh only.

TORCH=torch==2.13.0
CPU_BUILDS=https://download.pytorch.org/whl/cpu # of torch; PyPI's x86-64 wheels bring some GB of CUDA
SUITABLE='import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13)'

# install_failed WHAT: print the end of the log and exit. An environment created in this run is removed; an older one stays in
# use if pip failed before changing it.
install_failed() {
  grep -v '^WARNING:\|^Ignoring ' "$SETUP_STATE/install.log" | tail -n 8 | sed 's/^/  | /' >&2
  # The log may have had no room either.
  df -Pm "$SETUP_STATE" | awk 'NR == 2 && $4 < 50 {print "  | the disk is full: " $6 " has " $4 " MB left"}' >&2
  if [[ -n ${made_with-} ]]; then
    # Of a link to another disk the target stays, empty.
    find "$VENV/" -mindepth 1 -delete && { [[ -L $VENV ]] || rmdir "$VENV"; } && rm -f "$SETUP_STATE/unfinished"
  elif ! grep -q '^Installing collected packages' "$SETUP_STATE/install.log"; then
    rm -f "$SETUP_STATE/unfinished"
  fi
  local newer=''
  if [[ -n ${tested-} ]]; then newer="; if it has no such version, MEGATRON_SFT_CONSTRAINTS=none takes others than those of $tested"; fi
  die "$1 (log: $SETUP_STATE/install.log): fix the problem shown above and run the same command again; offline, set PIP_INDEX_URL to a mirror or MEGATRON_SFT_PYTHON to a Python with requirements.txt installed$newer"
}

# base_python TEST: the first suitable Python that passes the test: an active conda environment's, then the usual names.
base_python() {
  local candidate
  for candidate in ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} python3.12 python3.13 python3.11 python3 python; do
    if "$candidate" -sc "$SUITABLE; $1" 2>/dev/null; then
      type -P "$candidate" && return
    fi
  done
  return 1
}

# python_advice: what to type on this machine to get a Python that can create environments.
python_advice() {
  local base version without_root="conda create -n sft python=3.12 and conda activate sft"
  if ! type -P apt-get >/dev/null; then
    if type -P dnf >/dev/null; then
      echo "as root: dnf install python3.12 (or, without root, $without_root)"
    elif type -P zypper >/dev/null; then
      echo "as root: zypper install python312 (or, without root, $without_root)"
    else
      echo "for example with $without_root"
    fi
    return
  fi
  # Debian and Ubuntu have venv in a separate package.
  if base=$(base_python pass); then
    echo "as root: apt-get install python$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    return
  fi
  for version in 3.12 3.13 3.11; do
    if apt-cache show "python$version-venv" >/dev/null 2>&1; then
      echo "as root: apt-get install python$version-venv (or, without root, $without_root)"
      return
    fi
  done
  if apt-cache show python3 >/dev/null 2>&1; then
    echo "this release of the system has none of them, so $without_root"
  else
    echo "as root: apt-get update && apt-get install python3-venv"
  fi
}

# make_venv: create the environment, preferably on a Python that has torch (a container's), whose torch is then kept.
make_venv() {
  local base flags=(--clear) has_venv='import venv, ensurepip'
  local has_torch="$has_venv"'; assert sys.prefix == sys.base_prefix; import torch; assert [int(n) for n in torch.__version__.split(".")[:2]] >= [2, 6]'
  if base=$(base_python "$has_torch"); then
    flags+=(--system-site-packages)
  else
    base=$(base_python "$has_venv") || die "no Python 3.11, 3.12 or 3.13 with the venv module ($(python3 --version 2>/dev/null || echo "there is no python3")): install one, $(python_advice); or set MEGATRON_SFT_PYTHON to a Python with requirements.txt installed"
  fi
  if [[ -d $VENV && -n $(ls -A "$VENV") && ! -e $SETUP_STATE/unfinished && ! -e $VENV/requirements.txt.stamp ]]; then
    die "$VENV has no working Python 3.11, 3.12 or 3.13 with pip and was not created by this project: move it away, or set MEGATRON_SFT_VENV to another folder"
  fi
  touch "$SETUP_STATE/unfinished"
  made_with=$base
  # venv refuses a link.
  "$base" -m venv "${flags[@]}" "$(readlink -f "$VENV")" >"$SETUP_STATE/install.log" 2>&1 || install_failed "could not create $VENV with $base"
}

# is_cluster: true where jobs are submitted: the environment is for the GPUs of other nodes.
is_cluster() { [[ -n $(type -P sbatch qsub bsub) ]]; }

# chosen_core VERSION: the version of megatron-core for this version of Python.
chosen_core() {
  local core=${MEGATRON_CORE_VERSION-} image=${NVIDIA_PYTORCH_VERSION:-99.99}
  if [[ -z $core ]]; then
    core=0.19.2
    # An nvcr image, such as 25.11, has the Transformer Engine that one of them was released with.
    if [[ $1 == 3.11 ]] || ((10#${image//[!0-9]/} < 2606)); then core=0.16.1; fi
  fi
  [[ $core == 0.16.1 || $core == 0.19.2 ]] || die "MEGATRON_CORE_VERSION is '$core': give 0.16.1 or 0.19.2, or unset it"
  [[ $core == 0.16.1 || $1 != 3.11 ]] || die "MEGATRON_CORE_VERSION=$core needs Python 3.12 or 3.13, and $VENV has $1: take 0.16.1, or remove $VENV and put a newer Python first in PATH"
  echo "$core"
}

# is_reachable URL: true if it answers within seconds.
is_reachable() {
  [[ -z ${PIP_NO_INDEX-} ]] && "$VENV/bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5).close()' "$1" 2>/dev/null
}

# choose_torch: sets torch and what there is to say of it, and adds its index to pip's options in extra.
choose_torch() {
  torch=$(grep -i '^torch==' "$SETUP_STATE/constraints.txt") && about=', which is here already' && return
  torch=$TORCH about=''
  if [[ -n ${TORCH_INDEX_URL-} ]]; then
    extra+=(--extra-index-url "$TORCH_INDEX_URL")
  elif ! has_gpu; then
    if is_cluster; then
      about=' with CUDA for the nodes of this cluster'
    elif is_reachable "$CPU_BUILDS/torch/"; then
      extra+=(--extra-index-url "$CPU_BUILDS") about=', the CPU build as there is no GPU here'
    else
      about=' as pip finds it, perhaps with some GB of CUDA: there is no GPU here, but the index of CPU builds cannot be reached (TORCH_INDEX_URL names another)'
    fi
  fi
}

# install_locked FILE: install FILE, holding the lock on file descriptor 9.
install_locked() {
  local file=$1 made_with='' python core torch about tested='' extra=()
  # Another status is that of a file system without locks, of which flock tells.
  flock -n 9 || if (($? == 1)); then echo "another process is setting up $VENV: waiting for it" >&2 && flock 9; fi
  if requirements_installed "$file"; then return; fi
  if [[ -e $VENV/without-cuda ]] && has_gpu; then
    echo "$VENV has torch's CPU build and there is a GPU here: everything is installed again" >&2
    extra+=(--force-reinstall) # else a CPU build would do; pip downloads all before it changes anything
  fi
  if [[ -e $SETUP_STATE/unfinished ]] || ! "$VENV/bin/python" -c "import pip; $SUITABLE" 2>/dev/null; then make_venv; fi
  if [[ -z $made_with ]]; then : >"$SETUP_STATE/install.log"; fi
  python=$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  core=$(chosen_core "$python") || exit
  case ${MEGATRON_SFT_CONSTRAINTS-} in
    '') if [[ -f $ROOT/constraints/$python.txt ]]; then tested=$ROOT/constraints/$python.txt; fi ;;
    none) ;;
    *) tested=$MEGATRON_SFT_CONSTRAINTS ;;
  esac
  [[ -z $tested || -f $tested ]] || die "MEGATRON_SFT_CONSTRAINTS=$tested is not a file: give a file of versions, or none"
  "$VENV/bin/python" "$ROOT/scripts/lib/versions.py" "$core" ${tested:+"$tested"} >"$SETUP_STATE/constraints.txt" || install_failed "could not list the packages of $VENV"
  choose_torch
  echo "setting up $VENV for $file: $("$VENV/bin/python" --version), $torch$about; megatron-core $core; this happens once (log: $SETUP_STATE/install.log)" >&2
  touch "$SETUP_STATE/unfinished"
  # NVIDIA's containers set PIP_CONSTRAINT to pins that forbid newer requirements; our constraints still pin torch. What a user has set
  # for other installs must not decide where packages go, or that none do.
  env -u PIP_CONSTRAINT -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_DRY_RUN -u PIP_NO_DEPS -u PIP_QUIET -u PIP_REQUIRE_HASHES \
    PIP_USER=0 "$VENV/bin/python" -m pip install --progress-bar off \
    --constraint "$SETUP_STATE/constraints.txt" "${extra[@]}" -r "$ROOT/requirements.txt" -r "$ROOT/$file" "$torch" \
    2>&1 | tee -a "$SETUP_STATE/install.log" | { grep --line-buffered -E '^ *Downloading .*\([0-9.]+ [MG]B\)' >&2 || true; } || install_failed "could not install $file into $VENV"
  "$VENV/bin/python" -c 'import importlib.metadata; importlib.metadata.version("torch")' 2>/dev/null ||
    install_failed "pip put the packages of $file elsewhere than into $VENV, as its settings say (pip config list)"
  rm -f "$VENV/without-cuda"
  if ! has_gpu && [[ -z ${TORCH_INDEX_URL-} ]] && compgen -G "$VENV/lib/python*/site-packages/torch-*+cpu.dist-info" >/dev/null; then
    touch "$VENV/without-cuda"
  fi
  echo "$core" >"$VENV/megatron-core.version"
  requirements_stamp requirements.txt >"$VENV/requirements.txt.stamp"
  requirements_stamp "$file" >"$VENV/$file.stamp"
  rm -f "$SETUP_STATE/unfinished"
}
