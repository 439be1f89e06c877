#!/usr/bin/env bash
# Scores of one model, or of several side by side, on data files of your own (exact match, offline) and benchmarks by name.
#
#   bash scripts/7_evaluate.sh HF_DIR TASKS [OPTION...]
#   bash scripts/7_evaluate.sh before=HF_DIR after=HF_DIR TASKS   and a table of both as Markdown and PNG
#
# HF_DIR  a Hugging Face model folder, such as 5_export.sh writes; NAME=HF_DIR names it in the table
# TASKS   with commas between: files of instruction/output or messages rows, whose last answer is the reference (what follows
#         </think> is compared), and names of lm-eval (ceval, mmlu, gsm8k, arc, ...; pip install 'lm-eval[hf]')
#
# CONTROL="<short> <think>"  asks every question once in each mode of a hybrid model (--control "<short>" --control "<think>")
# LIMIT=                     only the first questions
# MAX_NEW_TOKENS=512         of files; benchmarks have their own unless it is set
# BATCH_SIZE=64              of files; 8 of benchmarks
# NUM_FEWSHOT=  INCLUDE=     of benchmarks: examples before a question; a folder of task files of your own
# DTYPE=auto  BACKEND=transformers|vllm  NUM_GPUS=1
# OUTPUT                     outputs/evaluations/<model>-<task>.json unless given: figures and every answer. What is there for
#                            the same model, data and settings is not asked again.
# TABLE                      outputs/evaluations/scores unless given
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
