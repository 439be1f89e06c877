# shellcheck shell=bash
# The Python environment of all scripts. The first script that runs creates .venv; later runs only compare a stamp.
#
#   MEGATRON_SFT_PYTHON       a Python that already has the requirements: used as is, nothing is installed
#   MEGATRON_SFT_VENV         the environment's folder (default: .venv in the repository; in an nvcr container the name includes the
#                             image's version, so that a container and its host can share one repository)
#   MEGATRON_CORE_VERSION     0.16.1 or 0.19.2 (default: 0.16.1 with Python 3.11 and in nvcr images before 26.06, else 0.19.2)
#   MEGATRON_SFT_CONSTRAINTS  a file of versions (default: constraints/3.12.txt and its like, by Python's version); none: the newest
#                             that requirements.txt allows
#   TORCH_INDEX_URL           an extra package index for torch (pip's --extra-index-url), such as that of an older CUDA version
#                             (default: on a machine without a GPU, PyTorch's index of CPU builds if it can be reached)

# Scripts start each other in other folders than the user's.
for name in MEGATRON_SFT_VENV MEGATRON_SFT_PYTHON MEGATRON_SFT_CONSTRAINTS; do
  if [[ ${!name-} == [!/]*/* || $name == MEGATRON_SFT_VENV && ${!name-} == [!/]* ]]; then export "$name=$PWD/${!name}"; fi
done
VENV=${MEGATRON_SFT_VENV:-$ROOT/.venv${NVIDIA_PYTORCH_VERSION:+-nvidia-$NVIDIA_PYTORCH_VERSION}}
SETUP_STATE=$VENV.setup # next to it: the lock, the log and the marker of an unfinished install

# requirements_stamp FILE: a checksum of the requirements and of the interpreter that the environment uses.
requirements_stamp() {
  local interpreter
  interpreter=$(readlink -f "$VENV/bin/python") || return 1
  { cat "$ROOT/requirements.txt" "$ROOT/$1" && stat -c '%n %s %Y' "$interpreter"; } 2>/dev/null | sha256sum
}

# has_gpu: true where there is an NVIDIA GPU. A container may have any of a machine's; WSL has another name for all.
has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg ]]; }

# requirements_installed FILE: true if nothing changed since the install. Starts no Python.
requirements_installed() {
  [[ -f $VENV/$1.stamp && ! -e $SETUP_STATE/unfinished && $(requirements_stamp "$1") == "$(<"$VENV/$1.stamp")" ]] || return 1
  if [[ -e $VENV/without-cuda ]] && has_gpu; then return 1; fi
  [[ -z ${MEGATRON_CORE_VERSION-} || $MEGATRON_CORE_VERSION == "$(cat "$VENV/megatron-core.version" 2>/dev/null)" ]]
}

# check_python: die unless PYTHON, which the user has chosen, is of a version and has the packages without which nothing starts.
check_python() {
  local lacking
  if [[ ${checked_python-} == "$PYTHON" ]]; then return; fi
  lacking=$(PYTHONSAFEPATH=1 "$PYTHON" -c '
import importlib, sys
from importlib.util import find_spec
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(print("is Python %d.%d, and has to be 3.11, 3.12 or 3.13" % sys.version_info[:2]) or 1)
def lacks(name):
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True
lacking = [name for name in ("torch", "numpy", "orjson", "transformers", "megatron.core") if lacks(name)]
if lacking:
    sys.exit(print("has no " + ", ".join(lacking)) or 1)' 2>/dev/null) ||
    die "MEGATRON_SFT_PYTHON=$PYTHON ${lacking:-does not start}: install requirements.txt and torch for it, name another Python, or unset it, and the scripts make an environment"
  checked_python=$PYTHON
}

# ensure_requirements FILE: sets PYTHON to a Python with FILE (which may include requirements.txt) installed.
ensure_requirements() {
  [[ -f $ROOT/$1 ]] || die "requirements file $ROOT/$1 is missing: check the repository out again"
  if [[ -n ${MEGATRON_SFT_PYTHON-} ]]; then
    PYTHON=$(type -P "$MEGATRON_SFT_PYTHON") || die "MEGATRON_SFT_PYTHON=$MEGATRON_SFT_PYTHON is not a program: give the path of a Python, or unset it"
    check_python
    return
  fi
  [[ $OSTYPE == linux* ]] || die "this system is $OSTYPE, and megatron-core is made for Linux: use a Linux machine or container, or set MEGATRON_SFT_PYTHON to a Python with requirements.txt installed"
  export PYTHON=$VENV/bin/python
  # Packages in ~/.local, installed for another Python or container, must not be mixed in.
  export PYTHONNOUSERSITE=1
  unset PYTHONHOME # of another Python: this one would start without its modules
  if requirements_installed "$1"; then return; fi
  { mkdir -p "$SETUP_STATE" && [[ -w $SETUP_STATE ]]; } 2>/dev/null ||
    die "$VENV is missing packages of $1 and is not writable: set MEGATRON_SFT_VENV to a folder you can write to"
  # shellcheck source=scripts/lib/install.sh
  (source "$ROOT/scripts/lib/install.sh" && install_locked "$1") 9>"$SETUP_STATE/lock" || exit
}

# ensure_setup: required before a script starts Python.
ensure_setup() { ensure_requirements requirements.txt; }
