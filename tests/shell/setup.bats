#!/usr/bin/env bats
# scripts/lib/setup.sh: the environment that makes itself, with real venv and pip and packages of a few bytes.
# shellcheck disable=SC2016,SC2164 # bash -c expands its own; bats ends a test at the first failure
bats_require_minimum_version 1.5.0

setup() {
  load support
  clean_environment
  unset MEGATRON_SFT_PYTHON
  # The Python below the environment that the tests themselves run in.
  PATH=$(python3 -c 'import sys; print(sys.base_prefix)')/bin:$PATH
  packages="$BATS_TEST_TMPDIR/packages"
  mkdir "$packages"
  package "$packages" torch 2.13.0
  package "$packages" one 1.0
  only_packages_of "$packages"
  root=$(copied_repository "a b's \$(c)")
  echo "one==1.0" >"$root/requirements.txt"
}

# ready: sets up and says which packages there are.
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

@test "an interrupted install is made anew" {
  run -0 ready
  touch "$root/.venv.setup/unfinished" "$root/.venv/half-made"
  run -0 ready
  [[ ! -e $root/.venv/half-made && ! -e $root/.venv.setup/unfinished ]]
}

@test "a requirement that does not exist is named, and nothing is left" {
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

@test "torch that is there stays, against other wishes in PIP_CONSTRAINT" {
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

@test "an unsuitable Python is named with what to do" {
  mkdir "$BATS_TEST_TMPDIR/bin"
  for name in python3.12 python3.11 python3 python; do
    printf '#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python 3.9.1" || exit 1\n' >"$BATS_TEST_TMPDIR/bin/$name"
  done
  chmod +x "$BATS_TEST_TMPDIR"/bin/*
  PATH=$BATS_TEST_TMPDIR/bin:$PATH run -2 ready
  [[ $output == *"error: no Python 3.11 or 3.12 with the venv module (python3 is Python 3.9.1): install one "* ]]
  [[ ! -e $root/.venv ]]
}

@test "an environment that was made by hand is completed, a folder that is none is left alone" {
  mkdir -p "$root/.venv/mine"
  run -2 ready
  [[ $output == *"error: $root/.venv has no working Python 3.11 or 3.12 and was not made here: "* ]]
  [[ -d $root/.venv/mine ]]
}

@test "MEGATRON_SFT_CONSTRAINTS names the versions to take" {
  package "$packages" one 1.1
  echo "one" >"$root/requirements.txt"
  echo "one==1.0" >"$BATS_TEST_TMPDIR/tested.txt"
  MEGATRON_SFT_CONSTRAINTS=$BATS_TEST_TMPDIR/tested.txt run -0 ready
  [[ $output == *"one==1.0"* && $output == *"torch==2.13.0"* ]]
}
