#!/usr/bin/env bash
# Break real training runs in every way, and write what came of it into docs/reliability.md. Takes hours on two cores.
#
#   bash tests/faults.sh [kills [NUMBER]|signals|damage|layouts|all]
#
# kills    NUMBER (100) SIGKILLs at random moments over four layouts: the end must be bit-identical to that of a run left alone
# signals  signals, dead and stopped processes, full and broken disks, dead threads and NaN at every moment of a run
# damage   1,000 injected faults in checkpoints, trackers, manifests, data and Hugging Face folders
# layouts  checkpoints of each layout continued in each other one
# all      these four; the default
# shellcheck source=scripts/lib/common.sh
source "$(dirname "$(readlink -f "$0")")/../scripts/lib/common.sh" || exit 2

help_or_arguments 0 2 "$@"
part=${1:-all}
[[ $part =~ ^(kills|signals|damage|layouts|all)$ ]] || die "$part is no campaign: write kills, signals, damage, layouts or all"
ensure_requirements requirements-dev.txt
cd "$ROOT"
export PYTHONPATH=$ROOT OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p outputs/faults

# campaign NAME COMMAND...: runs it and puts the Markdown table that it prints into docs/reliability.md.
campaign() {
  echo "== $1"
  "${@:2}" | tee "outputs/faults/$1.txt"
  "$PYTHON" -m tests.campaigns.fault_table "$1" "outputs/faults/$1.txt"
}

if [[ $part == kills || $part == all ]]; then campaign kills "$PYTHON" -m tests.campaigns.kill_campaign --kills "${2:-100}"; fi
if [[ $part == signals || $part == all ]]; then campaign signals "$PYTHON" -m tests.campaigns.signal_campaign; fi
if [[ $part == damage || $part == all ]]; then campaign damage "$PYTHON" -m tests.campaigns.damage_campaign; fi
if [[ $part == layouts || $part == all ]]; then "$PYTHON" -m pytest -m campaign tests; fi
