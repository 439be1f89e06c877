#!/usr/bin/env bats
# The numbered scripts' arguments, and the command names that users of Reasoning-SFT know.
# shellcheck disable=SC2016,SC2164 # bash -c expands its own; bats ends a test at the first failure
bats_require_minimum_version 1.5.0

setup() {
  load support
  clean_environment
  recording_python
  cd "$REPOSITORY"
  export ASSETS_DIR="$BATS_TEST_TMPDIR/as sets"
}

@test "1_download: model and data set, with the choices from the environment" {
  REVISION=v1 run -0 bash scripts/1_download.sh model org/name
  [[ ${lines[1]} == "[-m][megatron.sft.download][model][--assets-dir][$ASSETS_DIR][--revision][v1][org/name]" ]]
  SPLIT=test CONFIG=easy MAP_COLUMNS="problem=instruction solution=output" run -0 bash scripts/1_download.sh dataset org/name
  expected="[-m][megatron.sft.download][dataset][--assets-dir][$ASSETS_DIR][--split][test][--config][easy]"
  [[ ${lines[1]} == "${expected}[--map-column][problem=instruction][--map-column][solution=output][org/name]" ]]
}

@test "1_download: an unknown word is named" {
  run -2 bash scripts/1_download.sh weights org/name
  [[ $output == "error: 1_download.sh fetches a model or a dataset, not weights: "* ]]
}

@test "2_convert: torch_dist and 1 x 1 unless told otherwise" {
  run -0 bash scripts/2_convert.sh model/
  expected="[-m][megatron.sft.convert][--source][model][--tensor-model-parallel-size][1][--pipeline-model-parallel-size][1]"
  expected+="[--output][model_Megatron_TP1PP1][--ckpt-format][torch_dist]"
  [[ ${lines[1]} == "${expected}[--verify][auto][--expert-model-parallel-size][1]" ]]
  CKPT_FORMAT=torch run -0 bash scripts/2_convert.sh model 2 4 "out put"
  [[ ${lines[1]} == *"[2][--pipeline-model-parallel-size][4][--output][out put][--ckpt-format][torch][--verify]"* ]]
  DTYPE=bf16 HF_DIR="the model" VERIFY=0 ITERATION=7 WITH_OPTIMIZER=1 run -0 bash scripts/2_convert.sh run
  [[ ${lines[1]} == *"[--verify][0]"*"[--dtype][bf16][--hf-dir][the model][--iteration][7][--with-optimizer]" ]]
}

@test "5_export: the iteration is optional" {
  run -0 bash scripts/5_export.sh ckpt hf out
  [[ ${lines[1]} == "[-m][megatron.sft.export][--load][ckpt][--hf-dir][hf][--output][out]" ]]
  run -0 bash scripts/5_export.sh ckpt hf out 120
  [[ ${lines[1]} == *"[--output][out][--iteration][120]" ]]
  DTYPE=fp32 run -0 bash scripts/5_export.sh ckpt hf out
  [[ ${lines[1]} == *"[--output][out][--dtype][fp32]" ]]
}

@test "download_hf_models.py and download_hf_dataset.py run in Python and in bash" {
  for start in python3 bash; do
    run -0 "$start" scripts/checkpoints/download_hf_models.py --model-card "org/a name"
    [[ ${lines[1]} == "[-m][megatron.sft.download][model][--assets-dir][$ASSETS_DIR][org/a name]" ]]
    run -0 "$start" scripts/data/download_hf_dataset.py --dataset-card org/data --split test
    [[ ${lines[1]} == "[-m][megatron.sft.download][dataset][--assets-dir][$ASSETS_DIR][org/data][--split][test]" ]]
    run -2 "$start" scripts/data/download_hf_dataset.py
    [[ $output == "error: "*"ID|PATH"* ]]
  done
}

@test "the convert shortcuts take the downloaded model and write the classic format" {
  run -0 bash scripts/checkpoints/convert_deepseek_r1_to_megatron.sh 1.5B 1 2
  model="$ASSETS_DIR/checkpoints/deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B"
  [[ ${lines[1]} == *"[--source][$model]"*"[--pipeline-model-parallel-size][2][--output][${model}_Megatron_TP1PP2][--ckpt-format][torch]"* ]]
  run -0 bash scripts/checkpoints/convert_qwen2.5_to_megatron.sh 7B 2 1
  model="$ASSETS_DIR/checkpoints/Qwen_Qwen2.5_7B"
  [[ ${lines[1]} == *"[--source][$model]"*"[--output][${model}_Megatron_TP2PP1][--ckpt-format][torch]"* ]]
  run -2 bash scripts/checkpoints/convert_qwen2.5_to_megatron.sh
  [[ $output == *"SIZE [TP] [PP]"* ]]
}

@test "tokenize_dataset.sh and merge_and_export.sh pass their arguments on" {
  run -0 bash scripts/data/tokenize_dataset.sh "tok enizer" data.json 4096
  [[ ${lines[1]} == "[-m][megatron.sft.tokenize][--tokenizer][tok enizer][--input][data.json][--seq-length][4096]"* ]]
  run -0 bash scripts/checkpoints/merge_and_export.sh ckpt hf "o ut"
  [[ ${lines[1]} == "[-m][megatron.sft.export][--load][ckpt][--hf-dir][hf][--output][o ut]" ]]
}
