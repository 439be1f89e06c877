#!/usr/bin/env bats
# scripts/lib/setup.sh: creating and updating the environment, with the real venv and pip and packages of a few bytes.
# shellcheck disable=SC2016,SC2030,SC2031,SC2164 # bash -c expands its own; tests are subshells; bats ends a test at the first failure
bats_require_minimum_version 1.5.0

setup() {
  load support
  clean_environment
  unset MEGATRON_SFT_PYTHON
  # The base Python of the environment that runs the tests.
  PATH=$(python3 -c 'import sys; print(sys.base_prefix)')/bin:$PATH
  packages="$BATS_TEST_TMPDIR/packages"
  mkdir "$packages"
  package "$packages" torch 2.13.0
  package "$packages" one 1.0
  only_packages_of "$packages"
  root=$(copied_repository "a b's \$(c)")
  echo "one==1.0" >"$root/requirements.txt"
}

teardown() {
  if [[ -n ${server-} ]]; then kill "$server"; fi
}

# ready: set up and list the installed packages.
ready() {
  bash -c 'source "$0/scripts/lib/common.sh"; ensure_setup; "$PYTHON" -m pip list --format freeze' "$root"
}

@test "the first run installs, the next one notices in under a second, a new requirement is added" {
  run -0 ready
  [[ $output == *"one==1.0"* && $output == *"torch==2.13.0"* ]]
  [[ -x $root/.venv/bin/python && ! -e $root/.venv.setup/unfinished ]]
  started=$(date +%s%N)
  PIP_FIND_LINKS=/nowhere run -0 bash -c 'source "$0/scripts/lib/common.sh"; ensure_setup; echo "$PYTHON"' "$root"
  (($(date +%s%N) - started < 1000000000))
  [[ $output == "$root/.venv/bin/python" ]]

  package "$packages" two 2.0
  echo "two" >>"$root/requirements.txt"
  run -0 ready
  [[ $output == *"two==2.0"* ]]

  echo "-r requirements.txt" >"$root/requirements-dev.txt"
  package "$packages" three 3.0
  echo "three" >>"$root/requirements-dev.txt"
  run -0 bash -c 'source "$0/scripts/lib/common.sh"; ensure_requirements requirements-dev.txt; "$PYTHON" -c "import one, three"' "$root"
}

@test "an interrupted install starts again" {
  run -0 ready
  touch "$root/.venv.setup/unfinished" "$root/.venv/half-made"
  run -0 ready
  [[ ! -e $root/.venv/half-made && ! -e $root/.venv.setup/unfinished ]]
}

@test "a requirement that does not exist is named, and no files are left behind" {
  echo "no-such-package==9" >>"$root/requirements.txt"
  run -2 --separate-stderr ready
  [[ $stderr == *"No matching distribution found for no-such-package==9"* ]]
  [[ $stderr == *"error: could not install requirements.txt into $root/.venv (log: $root/.venv.setup/install.log): "* ]]
  [[ ! -e $root/.venv && ! -e $root/.venv.setup/unfinished ]]
}

@test "a failed update leaves the environment in use" {
  run -0 ready
  echo "no-such-package" >>"$root/requirements.txt"
  run -2 ready
  [[ $output == *"error: could not install requirements.txt"* ]]
  echo "one==1.0" >"$root/requirements.txt"
  PIP_FIND_LINKS=/nowhere run -0 ready
  [[ $output == *"one==1.0"* && $output != *"setting up"* ]]
}

@test "two at once: the second waits for the first" {
  ready >"$BATS_TEST_TMPDIR/first" 2>&1 &
  sleep 1
  run -0 ready
  wait
  [[ $output == *"another process is setting up $root/.venv: waiting for it"* ]]
  [[ $output == *"one==1.0"* && $(<"$BATS_TEST_TMPDIR/first") == *"one==1.0"* ]]
}

@test "an installed torch is kept, whatever PIP_CONSTRAINT says" {
  mkdir "$BATS_TEST_TMPDIR/image"
  package "$BATS_TEST_TMPDIR/image" torch 2.12.0a0+nv26.6
  python3 -m zipfile -e "$BATS_TEST_TMPDIR"/image/torch-*.whl "$BATS_TEST_TMPDIR/image"
  echo "one==0.5" >"$BATS_TEST_TMPDIR/constraint.txt"
  export PYTHONPATH="$BATS_TEST_TMPDIR/image" PIP_CONSTRAINT="$BATS_TEST_TMPDIR/constraint.txt" NVIDIA_PYTORCH_VERSION=26.06
  run -0 ready
  [[ $output == *"torch==2.12.0a0+nv26.6"* && $output != *"torch==2.13.0"* && $output == *"one==1.0"* ]]
  [[ -d $root/.venv-nvidia-26.06 && ! -e $root/.venv ]]
  grep -q "include-system-site-packages = true" "$root/.venv-nvidia-26.06/pyvenv.cfg"
}

# machine PYTHON VERSION [PROGRAM...]: prints a PATH with that Python, which lacks venv, and these programs that do nothing; apt-cache
# knows python3 and the packages in $known.
machine() {
  local folder="$BATS_TEST_TMPDIR/machine $1 $2 $3" name
  mkdir "$folder"
  for name in bash dirname readlink sed grep tail mkdir flock touch rm cat cut stat sha256sum; do ln -s "$(type -P "$name")" "$folder/$name"; done
  cat >"$folder/$1" <<PYTHON
#!/usr/bin/env bash
case "\$*" in
  --version) echo "Python $2.1" ;;
  *ensurepip*) exit 1 ;;
  *'%d.%d'*) echo $2 ;;
  *) [[ $2 == 3.1[123] ]] ;;
esac
PYTHON
  printf '#!/usr/bin/env bash\n[[ " python3 %s " == *" $2 "* ]]\n' "$known" >"$folder/apt-cache"
  for name in "${@:3}"; do printf '#!/usr/bin/env bash\n' >"$folder/$name"; done
  chmod +x "$folder/$1" "$folder/apt-cache"
  for name in "${@:3}"; do chmod +x "$folder/$name"; done
  echo "$folder"
}

# advised PATH: the message of the set-up there.
advised() {
  PATH=$1 run -2 bash -c 'source "$0/scripts/lib/common.sh"; ensure_setup' "$root"
  [[ $output == "error: no Python 3.11, 3.12 or 3.13 with the venv module ("* && ! -e $root/.venv ]] || { echo "$output" && return 1; }
}

@test "without a suitable Python the message names what this distribution has" {
  known=''
  advised "$(machine python3 3.12 apt-get)" # Ubuntu 24.04 as it comes
  [[ $output == *"(Python 3.12.1): install one, as root: apt-get install python3.12-venv; or "* ]]
  advised "$(machine python3 3.13 apt-get)" # Debian 13
  [[ $output == *"(Python 3.13.1): install one, as root: apt-get install python3.13-venv; or "* ]]
  known="python3.11-venv"
  advised "$(machine python3 3.10 apt-get)" # Ubuntu 22.04
  [[ $output == *"(Python 3.10.1): install one, as root: apt-get install python3.11-venv (or, without root, conda create "* ]]
  known=''
  advised "$(machine python3 3.9 apt-get)" # Debian 11
  [[ $output == *"(Python 3.9.1): install one, this release of the system has none of them, so conda create -n sft python=3.12 "* ]]
  advised "$(machine python3 3.14 dnf)"
  [[ $output == *"(Python 3.14.1): install one, as root: dnf install python3.12 (or, "* ]]
  advised "$(machine python3 3.6 zypper)"
  [[ $output == *"install one, as root: zypper install python312 (or, "* ]]
  advised "$(machine python 2.7 pacman)"
  [[ $output == *"(there is no python3): install one, for example with conda create -n sft python=3.12 and conda activate sft; or "* ]]
}

@test "a link to an empty folder on another disk becomes the environment, also after a failure" {
  mkdir "$BATS_TEST_TMPDIR/scratch"
  ln -s "$BATS_TEST_TMPDIR/scratch" "$root/.venv"
  PIP_FIND_LINKS=/nowhere run -2 ready
  [[ -L $root/.venv && -z $(ls -A "$root/.venv") && $output != *Traceback* ]]
  run -0 ready
  [[ $output == *"one==1.0"* && -x $BATS_TEST_TMPDIR/scratch/bin/python ]]
}

@test "a venv that cannot be made is removed, and a full disk named" {
  mkdir "$BATS_TEST_TMPDIR/programs"
  printf '#!/usr/bin/env bash\n[[ $* != *"-m venv"* ]] || { mkdir -p "${@: -1}/half" && exit 1; }\nexec %q "$@"\n' "$(type -P python3)" >"$BATS_TEST_TMPDIR/programs/python3.12"
  printf '#!/usr/bin/env bash\nprintf "head\\n/dev/x 9 9 0 100%%%% /scratch\\n"\n' >"$BATS_TEST_TMPDIR/programs/df"
  chmod +x "$BATS_TEST_TMPDIR"/programs/*
  PATH=$BATS_TEST_TMPDIR/programs:$PATH run -2 ready
  [[ $output == *"  | the disk is full: /scratch has 0 MB left"*"could not create $root/.venv with "* && ! -e $root/.venv ]]
  run -0 ready
}

@test "pip's and Python's settings for other programs do not decide what is installed where" {
  export PIP_DRY_RUN=1 PIP_NO_DEPS=1 PIP_REQUIRE_HASHES=1 PIP_REQUIRE_VIRTUALENV=1 PYTHONWARNINGS=error PYTHONHOME=/nowhere PYTHONOPTIMIZE=1
  printf '[install]\nuser = true\n' >"$BATS_TEST_TMPDIR/pip.conf"
  PIP_CONFIG_FILE=$BATS_TEST_TMPDIR/pip.conf run -0 ready
  [[ $output == *"one==1.0"* ]]
  rm -r "$root/.venv"
  printf '[install]\ntarget = %s\n' "$BATS_TEST_TMPDIR/elsewhere" >"$BATS_TEST_TMPDIR/pip.conf"
  PIP_CONFIG_FILE=$BATS_TEST_TMPDIR/pip.conf run -2 ready
  [[ $output == *"error: pip put the packages of requirements.txt elsewhere than into $root/.venv"* && ! -e $root/.venv ]]
}

@test "paths of an environment or a Python may be relative, though scripts start each other in other folders" {
  mkdir "$BATS_TEST_TMPDIR/here" && cd "$BATS_TEST_TMPDIR/here"
  started='source "$0/scripts/lib/common.sh"; ensure_setup; cd /; bash -c "source \"\$0/scripts/lib/common.sh\"; ensure_setup; echo \$PYTHON" "$0"'
  MEGATRON_SFT_VENV='./my env' run -0 bash -c "$started" "$root"
  [[ ${lines[-1]} == "$PWD/./my env/bin/python" ]]
  cd "$(dirname 'my env'/lib/python3*/site-packages/torch.py)" && mkdir megatron && touch {numpy,orjson,transformers,megatron/core}.py && cd - >/dev/null
  MEGATRON_SFT_PYTHON='my env/bin/python' run -0 bash -c "$started" "$root"
  [[ $output == "$PWD/my env/bin/python" ]]
}

@test "a Python of MEGATRON_SFT_PYTHON that cannot run anything is refused with what it lacks" {
  export PYTHONPATH=$BATS_TEST_TMPDIR/installed MEGATRON_SFT_PYTHON=$BATS_TEST_TMPDIR/python
  mkdir -p "$PYTHONPATH" && touch "$PYTHONPATH"/{torch,numpy,orjson}.py
  printf '#!/usr/bin/env bash\n%q -S "$@"\n' "$(type -P python3)" >"$MEGATRON_SFT_PYTHON" && chmod +x "$MEGATRON_SFT_PYTHON"
  run -2 ready
  [[ $output == "error: MEGATRON_SFT_PYTHON=$BATS_TEST_TMPDIR/python has no transformers, megatron.core: install requirements.txt and torch for it, "* ]]
  sed -i '2i set -- -c "import sys; sys.version_info = (3, 10, 1)"$'"'\\n'"'"$2"' "$MEGATRON_SFT_PYTHON"
  run -2 ready
  [[ $output == *"/python is Python 3.10, and has to be 3.11, 3.12 or 3.13: "* ]]
}

@test "a folder that is not an environment is left alone" {
  mkdir -p "$root/.venv/mine"
  run -2 ready
  [[ $output == *"error: $root/.venv has no working Python 3.11, 3.12 or 3.13 with pip and was not created by this project: "* ]]
  [[ -d $root/.venv/mine ]]
}

@test "the versions of constraints/ are taken unless MEGATRON_SFT_CONSTRAINTS names others, or none" {
  package "$packages" one 1.1
  package "$packages" one 0.9
  echo "one" >"$root/requirements.txt"
  mkdir "$root/constraints"
  for version in 3.11 3.12 3.13; do printf '# tested\none==1.0 # here\ntorch==9.9\n' >"$root/constraints/$version.txt"; done
  run -0 ready
  [[ $output == *"one==1.0"* && $output == *"torch==2.13.0"* ]]
  rm -r "$root/.venv"
  MEGATRON_SFT_CONSTRAINTS=none run -0 ready
  [[ $output == *"one==1.1"* ]]
  rm -r "$root/.venv"
  echo "one==0.9" >"$BATS_TEST_TMPDIR/tested.txt"
  MEGATRON_SFT_CONSTRAINTS=$BATS_TEST_TMPDIR/tested.txt run -0 ready
  [[ $output == *"one==0.9"* && $output == *"torch==2.13.0"* ]]
  rm -r "$root/.venv" "$packages"/one-1.0*
  run -2 ready
  [[ $output == *"MEGATRON_SFT_CONSTRAINTS=none takes others than those of $root/constraints/3.1"* ]]
  MEGATRON_SFT_CONSTRAINTS=/nowhere run -2 ready
  [[ $output == *"error: MEGATRON_SFT_CONSTRAINTS=/nowhere is not a file: "* ]]
}

@test "megatron-core follows Python and the image, and MEGATRON_CORE_VERSION chooses" {
  package "$packages" megatron_core 0.16.1
  package "$packages" megatron_core 0.19.2
  echo "megatron-core>=0.16.1" >"$root/requirements.txt"
  MEGATRON_CORE_VERSION=0.16.1 run -0 ready
  [[ $output == *"megatron"?"core==0.16.1"* ]]
  # What is installed stays in use until another is asked for.
  run -0 ready
  [[ $output != *"setting up"* ]]
  MEGATRON_CORE_VERSION=0.18.0 run -2 ready
  [[ $output == *"error: MEGATRON_CORE_VERSION is '0.18.0': give 0.16.1 or 0.19.2, or unset it"* ]]
  PIP_FIND_LINKS=/nowhere run -0 ready # and what is installed is still whole
  [[ $output != *"setting up"* ]]
  source "$root/scripts/lib/setup.sh"
  source "$root/scripts/lib/install.sh"
  [[ $(chosen_core 3.11) == 0.16.1 && $(chosen_core 3.12) == 0.19.2 && $(chosen_core 3.13) == 0.19.2 ]]
  [[ $(NVIDIA_PYTORCH_VERSION=25.11 chosen_core 3.12) == 0.16.1 && $(NVIDIA_PYTORCH_VERSION=26.06 chosen_core 3.12) == 0.19.2 ]]
  [[ $(NVIDIA_PYTORCH_VERSION=25.11 MEGATRON_CORE_VERSION=0.19.2 chosen_core 3.12) == 0.19.2 ]]
  die() { echo "$1" && exit 2; }
  MEGATRON_CORE_VERSION=0.19.2 run -2 chosen_core 3.11
  [[ $output == *"MEGATRON_CORE_VERSION=0.19.2 needs Python 3.12 or 3.13, and $VENV has 3.11: "* ]]
}

# with_index: pip gets torch from an index, and PyTorch's CPU builds are at another; both are folders.
with_index() {
  local index
  for index in cpu all; do mkdir -p "$BATS_TEST_TMPDIR/$index/torch" "$BATS_TEST_TMPDIR/$index/one"; done
  package "$BATS_TEST_TMPDIR/cpu/torch" torch 2.13.0+cpu
  package "$BATS_TEST_TMPDIR/all/torch" torch 2.13.0
  package "$BATS_TEST_TMPDIR/all/one" one 1.0
  for index in "$BATS_TEST_TMPDIR"/{cpu,all}/*; do
    (cd "$index" && for wheel in *.whl; do [[ ! -e $wheel ]] || echo "<a href='${wheel/+/%2B}'>$wheel</a>"; done >index.html)
  done
  unset PIP_NO_INDEX PIP_FIND_LINKS
  export PIP_INDEX_URL=file://$BATS_TEST_TMPDIR/all
  python3 -uc '
import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
print(server.server_port)
server.serve_forever()' "$BATS_TEST_TMPDIR/cpu" >"$BATS_TEST_TMPDIR/port" 2>/dev/null 3>&- &
  server=$!
  until [[ -s $BATS_TEST_TMPDIR/port ]]; do sleep 0.05; done
  sed -i "s|^CPU_BUILDS=.*|CPU_BUILDS=http://127.0.0.1:$(<"$BATS_TEST_TMPDIR/port")|" "$root/scripts/lib/install.sh"
  sed -i 's|/dev/nvidia\[0-9\]\*|'"$BATS_TEST_TMPDIR"'/gpu|; s|/dev/dxg|/nowhere|' "$root/scripts/lib/setup.sh"
  # This machine may be a cluster's.
  sed -i 's/type -P sbatch qsub bsub/type -P $cluster/' "$root/scripts/lib/install.sh"
  export cluster=no-such-program
}

@test "without a GPU torch is the CPU build, which a machine with a GPU replaces" {
  with_index
  run -0 ready
  [[ $output == *", torch==2.13.0, the CPU build as there is no GPU here; "* && $output == *"torch==2.13.0+cpu"* ]]
  run -0 ready
  [[ $output != *"setting up"* ]]
  touch "$BATS_TEST_TMPDIR/gpu"
  PIP_INDEX_URL=file:///nowhere run -2 ready
  [[ -d $root/.venv/lib ]]
  run -0 ready
  [[ $output == *"$root/.venv has torch's CPU build and there is a GPU here: everything is installed again"* ]]
  [[ $output == *", torch==2.13.0; "* && $output != *"torch==2.13.0+cpu"* ]]
}

@test "torch has CUDA on a cluster's login node, and where the index of CPU builds cannot be reached" {
  with_index
  cluster=bash run -0 ready
  [[ $output == *", torch==2.13.0 with CUDA for the nodes of this cluster; "* && $output != *"+cpu"* ]]
  rm -r "$root/.venv"
  kill "$server" && unset server
  run -0 ready
  [[ $output == *", torch==2.13.0 as pip finds it, perhaps with some GB of CUDA: "* && $output != *"+cpu"* ]]
}
