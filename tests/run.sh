#!/usr/bin/env bash
# Run the checks and tests; the first run sets itself up. Every part runs even where one before it failed.
#
#   bash tests/run.sh [check|shell|python|all] [PYTEST ARGUMENT...]
#
# check   ruff, mypy on the package, the order of its rooms, words, shellcheck, shfmt and hadolint
# shell   the scripts themselves: tests/shell/*.bats
# python  pytest with the arguments given
# all     these three in this order; the default
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/../scripts/lib/common.sh" || exit 2

case ${1-} in -h | --help) usage && exit 0 ;; esac
part=${1:-all}
[[ $part == check || $part == shell || $part == python || $part == all ]] || die "$part is no part of the tests: write check, shell, python or all"
ensure_requirements requirements-dev.txt
cd "$ROOT"
PATH=$(dirname "$PYTHON"):$PATH
failed=()

# step NAME COMMAND...: remembers a failure and goes on.
step() {
  echo "== $1"
  "${@:2}" || failed+=("$1")
}

if [[ $part == check || $part == all ]]; then
  mapfile -t shell_files < <(find scripts tests tools .ci -type f \( -name '*.sh' -o -name '*.bash' -o -name '*.bats' -o -name '*.sbatch' -o -name '*.env' -o -path .ci/run -o -path 'tools/*' \) | sort)
  step "ruff check" "$PYTHON" -m ruff check .
  step "ruff format" "$PYTHON" -m ruff format --check .
  step mypy "$PYTHON" -m mypy megatron/sft benchmarks
  step imports lint-imports --no-logo --no-cache
  step words "$PYTHON" tests/support/words.py
  step shellcheck shellcheck -x "${shell_files[@]}"
  step shfmt shfmt -d -i 2 -ci "${shell_files[@]}"
  step hadolint hadolint Dockerfile
fi
if [[ $part == shell || $part == all ]]; then
  step bats bats --timing tests/shell
fi
if ((${#failed[@]})); then echo "failed before pytest:$(printf ' %s;' "${failed[@]}")"; fi
if [[ $part == python || $part == all ]]; then
  step pytest "$PYTHON" -m pytest "${@:2}"
fi
((${#failed[@]} == 0))
