# shellcheck shell=bash
# One job for several values of settings: ARRAY="LR=1e-5,5e-6 SEED=1,2" is an array of four tasks.

# array_tasks: the settings of every task of ARRAY, one task per line. The last variable changes fastest.
array_tasks() {
  local parts part values value task next tasks=('')
  read -r -a parts <<<"${ARRAY//$'\n'/ }"
  for part in "${parts[@]}"; do
    [[ $part =~ ^[A-Z][A-Z0-9_]*=[^,[:space:]/]+(,[^,[:space:]/]+)*$ ]] || die "ARRAY: '$part' is not NAME=VALUE,VALUE,...: write ARRAY=\"LR=1e-5,5e-6\""
    [[ $part != OUTPUT_PATH=* ]] || die "ARRAY: OUTPUT_PATH cannot vary, each task gets its own folder in it: remove '$part'"
    IFS=, read -r -a values <<<"${part#*=}"
    next=()
    for task in "${tasks[@]}"; do
      for value in "${values[@]}"; do next+=("${task:+$task }${part%%=*}=$value"); done
    done
    tasks=("${next[@]}")
  done
  printf '%s\n' "${tasks[@]}"
}

# use_array_task INDEX: export the settings of that task, and its own folder in OUTPUT_PATH.
use_array_task() {
  local tasks settings
  mapfile -t tasks < <(array_tasks)
  [[ -n ${tasks[$1]-} ]] || die "ARRAY has ${#tasks[@]} tasks, numbered from 0, and no task $1: correct ARRAY or --array"
  read -r -a settings <<<"${tasks[$1]}"
  export "${settings[@]?}" OUTPUT_PATH="$OUTPUT_PATH/${tasks[$1]// /_}"
}
