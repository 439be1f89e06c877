# shellcheck shell=bash
# Creates or updates the environment. Sourced by setup.sh only.

# install_failed WHAT: print the end of the log and exit. An environment created in this run is removed; an older one stays in
# use if pip failed before changing it.
install_failed() {
  grep -v '^WARNING:' "$SETUP_STATE/install.log" | tail -n 8 | sed 's/^/  | /' >&2
  if [[ -n ${made_with-} ]]; then
    "$made_with" -c 'import shutil, sys; shutil.rmtree(sys.argv[1])' "$VENV" && rm -f "$SETUP_STATE/unfinished"
  elif ! grep -q '^Installing collected packages' "$SETUP_STATE/install.log"; then
    rm -f "$SETUP_STATE/unfinished"
  fi
  die "$1 (log: $SETUP_STATE/install.log): fix the problem shown above and run the same command again; offline, set PIP_INDEX_URL to a mirror or MEGATRON_SFT_PYTHON to a Python with requirements.txt installed"
}

# base_python TEST: the first Python 3.11 or 3.12 that can create environments and passes the test.
base_python() {
  local candidate
  for candidate in python3.12 python3.11 python3 python; do
    if "$candidate" -sc "import sys, venv, ensurepip; assert sys.version_info[:2] in ((3, 11), (3, 12)); $1" 2>/dev/null; then
      type -P "$candidate" && return
    fi
  done
  return 1
}

# make_venv: create the environment, preferably on a Python that has torch (a container's), whose torch is then kept.
make_venv() {
  local base flags=(--clear)
  local has_torch='assert sys.prefix == sys.base_prefix; import torch; assert [int(n) for n in torch.__version__.split(".")[:2]] >= [2, 6]'
  if base=$(base_python "$has_torch"); then
    flags+=(--system-site-packages)
  else
    base=$(base_python pass) || die "no Python 3.11 or 3.12 with the venv module (python3 is $(python3 --version 2>&1 | tail -n 1)): install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), or set MEGATRON_SFT_PYTHON"
  fi
  if [[ -d $VENV && ! -e $SETUP_STATE/unfinished && ! -e $VENV/requirements.txt.stamp ]]; then
    die "$VENV has no working Python 3.11 or 3.12 and was not created by this project: move it away, or set MEGATRON_SFT_VENV to another folder"
  fi
  touch "$SETUP_STATE/unfinished"
  "$base" -m venv "${flags[@]}" "$VENV" >"$SETUP_STATE/install.log" 2>&1 || install_failed "could not create $VENV with $base"
  made_with=$base
}

# installed_below: torch and the packages compiled against it that the base Python provides, as name==version.
installed_below() {
  "$VENV/bin/python" -c '
import importlib.metadata, re, sys
for package in importlib.metadata.distributions():
    name = package.metadata["Name"] or ""
    compiled = re.match(r"(torch|torch(vision|audio|ao)|(pytorch[-_])?triton|transformer[-_]engine.*|flash[-_]attn.*|apex)$", name, re.I)
    if compiled and not str(package.locate_file("")).startswith(sys.prefix):
        print(f"{name}=={package.version}")'
}

# install_locked FILE: install FILE, holding the lock on file descriptor 9.
install_locked() {
  local file=$1 made_with='' torch=torch==2.13.0 index=()
  flock -n 9 || { echo "another process is setting up $VENV: waiting for it" && flock 9; } >&2
  if requirements_installed "$file"; then return; fi
  if [[ -e $SETUP_STATE/unfinished ]] || ! "$VENV/bin/python" -c 'import pip, sys; assert sys.version_info[:2] in ((3, 11), (3, 12))' 2>/dev/null; then make_venv; fi
  if [[ -z $made_with ]]; then : >"$SETUP_STATE/install.log"; fi
  touch "$SETUP_STATE/unfinished"
  installed_below >"$SETUP_STATE/constraints.txt" || install_failed "could not list the packages of $VENV"
  if grep -qi '^torch==' "$SETUP_STATE/constraints.txt"; then torch=$(grep -i '^torch==' "$SETUP_STATE/constraints.txt"); fi
  if [[ -n ${TORCH_INDEX_URL-} ]]; then index=(--extra-index-url "$TORCH_INDEX_URL"); fi
  if [[ -n ${MEGATRON_SFT_CONSTRAINTS-} ]]; then index+=(--constraint "$MEGATRON_SFT_CONSTRAINTS"); fi
  echo "setting up $VENV for $file: $("$VENV/bin/python" --version), $torch; this happens once (log: $SETUP_STATE/install.log)" >&2
  if [[ -n $made_with && ! -e /dev/nvidia0 && -z ${TORCH_INDEX_URL-} && $torch == torch==2.13.0 ]]; then
    echo "no GPU here: pip may download nvidia packages of some GB; if no GPU node will use this environment, stop it with Ctrl-C and set TORCH_INDEX_URL as .github/workflows/ci.yml does" >&2
  fi
  # NVIDIA's containers set PIP_CONSTRAINT to pins that forbid newer requirements; our constraints still pin torch.
  env -u PIP_CONSTRAINT -u PIP_USER -u PIP_TARGET -u PIP_PREFIX "$VENV/bin/python" -m pip install --progress-bar off \
    --constraint "$SETUP_STATE/constraints.txt" "${index[@]}" -r "$ROOT/requirements.txt" -r "$ROOT/$file" "$torch" \
    2>&1 | tee -a "$SETUP_STATE/install.log" | { grep --line-buffered -E '^ *Downloading .*\([0-9.]+ [MG]B\)' >&2 || true; } || install_failed "could not install $file into $VENV"
  requirements_stamp requirements.txt >"$VENV/requirements.txt.stamp"
  requirements_stamp "$file" >"$VENV/$file.stamp"
  rm -f "$SETUP_STATE/unfinished"
}
