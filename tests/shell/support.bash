# shellcheck shell=bash
# Shared by the bats files: copies of the scripts in folders with awkward names, and stand-ins for Python and packages.

REPOSITORY=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)

# Settings of the machine or the caller must not affect a test.
clean_environment() {
  unset MEGATRON_SFT_VENV MEGATRON_SFT_CONSTRAINTS MEGATRON_CORE_VERSION CONDA_PREFIX NVIDIA_PYTORCH_VERSION TORCH_INDEX_URL MAX_RESTARTS ASSETS_DIR REVISION SPLIT CONFIG MAP_COLUMNS CKPT_FORMAT
  unset SLURM_SUBMIT_DIR NNODES NODE_RANK MASTER_ADDR MASTER_PORT RDZV_ENDPOINT RDZV_ID OMP_NUM_THREADS PYTHONPATH
}

# recording_python: make MEGATRON_SFT_PYTHON a program that prints its folder, PYTHONPATH and every argument in brackets.
recording_python() {
  export MEGATRON_SFT_PYTHON="$BATS_TEST_TMPDIR/recording python"
  cat >"$MEGATRON_SFT_PYTHON" <<'STUB'
#!/usr/bin/env bash
echo "in $PWD with $PYTHONPATH"
printf '[%s]' "$@"
echo
STUB
  chmod +x "$MEGATRON_SFT_PYTHON"
}

# copied_repository NAME: copy the scripts and requirements to a folder of that name; prints its path.
copied_repository() {
  mkdir -p "$BATS_TEST_TMPDIR/$1"
  cp -r "$REPOSITORY/scripts" "$REPOSITORY/requirements.txt" "$BATS_TEST_TMPDIR/$1/"
  (cd "$BATS_TEST_TMPDIR/$1" && pwd -P)
}

# package FOLDER NAME VERSION: write a wheel with an empty module to FOLDER, without pip.
package() {
  python3 - "$@" <<'PYTHON'
import pathlib, sys, zipfile

folder, name, version = sys.argv[1:]
info = f"{name}-{version}.dist-info"
with zipfile.ZipFile(pathlib.Path(folder) / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
    wheel.writestr(f"{name}.py", f"__version__ = '{version}'\n")
    wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", "")
PYTHON
}

# only_packages_of FOLDER: let pip see these packages and no index.
only_packages_of() {
  export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_FIND_LINKS="$1" PIP_DISABLE_PIP_VERSION_CHECK=1
  unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CONSTRAINT
}
