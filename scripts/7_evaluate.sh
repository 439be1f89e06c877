#!/usr/bin/env bash
# Score one model, or compare several, on your own data files (exact match, offline) and on benchmarks by name.
#
#   bash scripts/7_evaluate.sh HF_DIR TASKS [OPTION...]
#   bash scripts/7_evaluate.sh before=HF_DIR after=HF_DIR TASKS   also writes a table of both as Markdown and PNG
#
# HF_DIR  a Hugging Face model folder, such as one written by 5_export.sh, or a PEFT adapter; NAME=HF_DIR names it in the table
# TASKS   a comma-separated list of data files (instruction/output or messages; the last answer is the reference, compared after
#         </think>) and of lm-eval tasks (ceval, mmlu, gsm8k, arc, ...; pip install 'lm-eval[hf]')
#
# CONTROL="<short> <think>"  asks each question once per mode of a hybrid model (or --control "<short>" --control "<think>")
# LIMIT=N                    only the first N questions
# MAX_NEW_TOKENS=512         for files; a benchmark uses its own limit unless this is set
# BATCH_SIZE                 64 for files, 8 for benchmarks
# NUM_FEWSHOT=N              for benchmarks: examples before each question
# INCLUDE=FOLDER             for benchmarks: a folder of additional task files
# DTYPE=auto  BACKEND=transformers|vllm  NUM_GPUS=1
# OUTPUT                     scores and all answers (default outputs/evaluations/<model>-<task>.json). Answers already there for
#                            the same model, data and settings are reused
# TABLE                      the table (default outputs/evaluations/scores)
for lib in {"$(dirname "$(readlink -f "$0")")","${SLURM_SUBMIT_DIR:-/}"}{,/..,/../..}/scripts/lib; do [[ -f $lib/common.sh ]] && break; done
# shellcheck source=scripts/lib/common.sh
source "$lib/common.sh" || exit 2

help_or_arguments 2 99 "$@"
options=()
for name in LIMIT MAX_NEW_TOKENS BATCH_SIZE NUM_FEWSHOT INCLUDE DTYPE BACKEND NUM_GPUS OUTPUT TABLE; do
  option=${name,,}
  [[ -z ${!name-} ]] || options+=("--${option//_/-}" "${!name}")
done
read -ra controls <<<"${CONTROL-}"
for control in "${controls[@]}"; do options+=(--control "$control"); done
run_module evaluate "${options[@]}" "$@"
