# shellcheck shell=bash
# The Python that everything here runs with. The first script that a user runs makes .venv; later runs compare one stamp and go on.
#
#   MEGATRON_SFT_PYTHON  a Python that has the requirements already: it is used as it is and nothing is set up
#   MEGATRON_SFT_VENV    where the environment goes; default .venv in the repository, with a name of its own in an nvcr container,
#                        so that the container and the machine around it can share one repository
#   TORCH_INDEX_URL      an extra package index for torch, as pip's --extra-index-url: PyTorch's index of CPU builds where pip
#                        would take a CUDA build of gigabytes on a machine without a GPU, or that of an older CUDA version
#   MEGATRON_SFT_CONSTRAINTS  a file of versions, as pip's --constraint: constraints/3.11.txt has those that CI tests

VENV=${MEGATRON_SFT_VENV:-$ROOT/.venv${NVIDIA_PYTORCH_VERSION:+-nvidia-$NVIDIA_PYTORCH_VERSION}}
SETUP_STATE=$VENV.setup # beside it: the lock, the log and the mark of an unfinished install

# requirements_stamp FILE: changes with the requirements and with the interpreter below the environment.
requirements_stamp() {
  local interpreter
  interpreter=$(readlink -f "$VENV/bin/python") || return 1
  { cat "$ROOT/requirements.txt" "$ROOT/$1" && stat -c '%n %s %Y' "$interpreter"; } 2>/dev/null | sha256sum
}

# requirements_installed FILE: true when nothing changed since they were installed. Starts no Python.
requirements_installed() {
  [[ -f $VENV/$1.stamp && ! -e $SETUP_STATE/unfinished && $(requirements_stamp "$1") == "$(<"$VENV/$1.stamp")" ]]
}

# ensure_requirements FILE: sets PYTHON to one that has the repository's FILE installed, which may include requirements.txt.
ensure_requirements() {
  [[ -f $ROOT/$1 ]] || die "requirements file $ROOT/$1 is missing: check the repository out again"
  if [[ -n ${MEGATRON_SFT_PYTHON-} ]]; then
    PYTHON=$(type -P "$MEGATRON_SFT_PYTHON") || die "MEGATRON_SFT_PYTHON=$MEGATRON_SFT_PYTHON is not a program: give the path of a Python, or unset it"
    return
  fi
  export PYTHON=$VENV/bin/python
  # What pip put into ~/.local for another Python or another container must not be mixed in.
  export PYTHONNOUSERSITE=1
  if requirements_installed "$1"; then return; fi
  { mkdir -p "$SETUP_STATE" && [[ -w $SETUP_STATE ]]; } 2>/dev/null ||
    die "$VENV lacks something of $1 and you may not write there: set MEGATRON_SFT_VENV to a folder of yours"
  # shellcheck source=scripts/lib/install.sh
  (source "$ROOT/scripts/lib/install.sh" && install_locked "$1") 9>"$SETUP_STATE/lock" || exit
}

# ensure_setup: what every script needs before it starts Python.
ensure_setup() { ensure_requirements requirements.txt; }
