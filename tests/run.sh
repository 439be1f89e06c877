#!/usr/bin/env bash
# Run the checks and tests; the first run sets itself up. Every part runs even where one before it failed.
#
#   bash tests/run.sh [check|fast|shell|python|all|campaigns] [PYTEST ARGUMENT...]
#
# check      ruff, mypy on the package, import-linter, shellcheck, shfmt and hadolint
# fast       tests/unit: minutes; no npm, no apt, no group of processes. A tokenizer that only npm has is skipped without it
# shell      the scripts themselves: tests/shell
# python     pytest with the arguments given, for example a file
# all        check, shell, tests/unit and tests/process; the default
# campaigns  every case of what `all` samples: layouts, families, and tests/faults.sh. Hours on two cores
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/../scripts/lib/common.sh" || exit 2

case ${1-} in -h | --help) usage && exit 0 ;; esac
part=${1:-all}
[[ $part =~ ^(check|fast|shell|python|all|campaigns)$ ]] || die "$part is not a part of the tests: write check, fast, shell, python, all or campaigns"
ensure_requirements requirements-dev.txt
cd "$ROOT"
PATH=$(dirname "$PYTHON"):$PATH
# Hundreds of processes would compile the package again.
unset PYTHONDONTWRITEBYTECODE
failed=()

# step NAME COMMAND...: remembers a failure and continues.
step() {
  echo "== $1"
  "${@:2}" || failed+=("$1")
}

# shell_tests: wait for what was started at the beginning.
shell_tests() {
  local status=0
  wait "$bats" || status=$?
  cat "$shell_output"
  return "$status"
}

# One thread a process, or each of several would take all cores.
tests() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$PYTHON" -m pytest --durations=25 "$@"; }

# Files side by side, in the order of tests/conftest.py: the longest first. Some mostly wait: three keep two processors busy.
side_by_side=(-n 3 --dist loadfile --no-loadscope-reorder)

if [[ $part == all ]]; then
  # Next to the rest, which keeps the processors less busy; shell_tests shows the outcome.
  shell_output=$(mktemp)
  bats --timing tests/shell >"$shell_output" 2>&1 &
  bats=$!
  trap 'kill "$bats" 2>/dev/null || true; rm -f "$shell_output"' EXIT
fi
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
if [[ $part == shell ]]; then
  step bats bats --timing tests/shell
fi
case $part in
  fast) SKIP_WITHOUT_NPM=1 step "unit tests" tests "${side_by_side[@]}" tests/unit "${@:2}" ;;
  python) step pytest tests "${@:2}" ;;
  all)
    step "unit and process tests" tests "${side_by_side[@]}" "${@:2}"
    step bats shell_tests
    ;;
  campaigns)
    step "every case" tests -m campaign "${@:2}"
    losses=$(mktemp)
    step "losses of every layout" "$PYTHON" -m tests.campaigns.parallel_losses --set cpu --output "$losses"
    other=$("$PYTHON" -m tests.support.other_core)
    step "the same with the other megatron-core" "$other" -m tests.campaigns.parallel_losses --set cpu --against "$losses"
    PYTHON=$other step "models, runs and checkpoints with it" tests -m 'campaign or not campaign' tests/unit/{model,checkpoint} \
      tests/process/test_{families,conversion,checkpoint_layouts,adapters,pair_runs,training}.py
    for name in kills signals damage; do step "$name" bash tests/faults.sh "$name"; done
    ;;
esac
if ((${#failed[@]})); then echo "failed:$(printf ' %s;' "${failed[@]}")"; fi
((${#failed[@]} == 0))
