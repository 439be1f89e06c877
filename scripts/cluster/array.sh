# shellcheck shell=bash
# One job for several values of some settings: ARRAY="LR=1e-5,5e-6 SEED=1,2" is an array of four tasks.

# array_size: the number of tasks that ARRAY makes; ends with a message if it cannot be read.
array_size() {
  local size=1 part values
  for part in ${ARRAY-}; do
    [[ $part =~ ^[A-Z][A-Z0-9_]*=[^,[:space:]/]+(,[^,[:space:]/]+)*$ ]] || die "ARRAY: '$part' is not NAME=VALUE,VALUE,...: write ARRAY=\"LR=1e-5,5e-6\""
    [[ $part != OUTPUT_PATH=* ]] || die "ARRAY: OUTPUT_PATH gets a folder of its own for each task: leave it out"
    IFS=, read -r -a values <<<"${part#*=}"
    size=$((size * ${#values[@]}))
  done
  printf '%s\n' "$size"
}

# array_task INDEX: the settings of that task, a NAME=VALUE a line. The last variable changes fastest.
array_task() {
  local index=$1 part values lines=() parts
  read -r -a parts <<<"${ARRAY-}"
  for ((i = ${#parts[@]} - 1; i >= 0; i--)); do
    part=${parts[i]}
    IFS=, read -r -a values <<<"${part#*=}"
    lines=("${part%%=*}=${values[index % ${#values[@]}]}" "${lines[@]}")
    index=$((index / ${#values[@]}))
  done
  printf '%s\n' "${lines[@]}"
}

# use_array_task INDEX: exports the task's settings, and OUTPUT_PATH with a folder of its own below it.
use_array_task() {
  local task setting
  task=$(array_task "$1")
  while IFS= read -r setting; do export "${setting?}"; done <<<"$task"
  export OUTPUT_PATH=$OUTPUT_PATH/${task//$'\n'/_}
}
