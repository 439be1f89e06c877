#!/usr/bin/env bats
# The arguments of the numbered scripts, the commands that users of Reasoning-SFT know, and recipes.
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

@test "1_download: anything else is refused" {
  run -2 bash scripts/1_download.sh weights org/name
  [[ $output == "error: 1_download.sh downloads a model or a dataset, not 'weights': "* ]]
}

@test "2_convert: torch_dist and 1 x 1 by default" {
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

@test "tokenize_dataset.sh and merge_and_export.sh forward their arguments" {
  run -0 bash scripts/data/tokenize_dataset.sh "tok enizer" data.json 4096
  [[ ${lines[1]} == "[-m][megatron.sft.tokenize][--tokenizer][tok enizer][--input][data.json][--seq-length][4096]"* ]]
  run -0 bash scripts/checkpoints/merge_and_export.sh ckpt hf "o ut"
  [[ ${lines[1]} == "[-m][megatron.sft.export][--load][ckpt][--hf-dir][hf][--output][o ut]" ]]
}

# settings_of RECIPE: what `RECIPE settings` prints of four settings; Python's table of settings is a stand-in.
settings_of() {
  cat >"$MEGATRON_SFT_PYTHON" <<'STUB'
#!/usr/bin/env bash
printf '%s --flag\n' PRETRAIN_CHECKPOINT_PATH OUTPUT_PATH TENSOR_PARALLEL_SIZE SEQUENCE_PARALLEL
STUB
  bash "$1" settings
}

@test "the Hybrid recipe of each size is the 1.5B file with MODEL_SIZE, whatever the environment says" {
  unset MODEL_SIZE MODEL
  recipe=scripts/sft/SFT_Hybrid_R1_1.5B_OpenThoughts_1M.sh
  for row in "1.5B Qwen_1.5B 1 0" "7B Qwen_7B 2 1" "14B Qwen_14B 4 1" "32B Qwen_32B 8 1" "Llama_8B Llama_8B 2 1"; do
    read -r size model tp sp <<<"$row"
    MODEL_SIZE=$size run -0 settings_of "$recipe"
    checkpoint="$ASSETS_DIR/checkpoints/deepseek_ai_DeepSeek_R1_Distill_${model}_Megatron_TP${tp}PP1"
    [[ ${lines[0]} == "PRETRAIN_CHECKPOINT_PATH=$checkpoint" ]]
    [[ ${lines[1]} == "OUTPUT_PATH=$REPOSITORY/outputs/checkpoints/SFT_Hybrid_R1_${size}_OpenThoughts_1M/train_iters_17000" ]]
    [[ ${lines[2]} == "TENSOR_PARALLEL_SIZE=$tp" && ${lines[3]} == "SEQUENCE_PARALLEL=$sp" ]]
    expected=$output
    [[ $size == 1.5B ]] || export MODEL_SIZE=1.5B # a recipe's name decides
    run -0 settings_of "${recipe/1.5B/$size}"
    [[ $output == "$expected" ]]
    unset MODEL_SIZE
  done
  MODEL_SIZE=3B run -2 settings_of "$recipe"
  [[ $output == "error: MODEL_SIZE is '3B': choose 1.5B, 7B, 14B, 32B or Llama_8B" ]]
}

@test "a recipe's variables come from the environment, any folder, through a link and in sbatch's copy" {
  unset MODEL_SIZE MODEL
  recipe=$REPOSITORY/scripts/sft/SFT_Hybrid_R1_32B_OpenThoughts_1M.sh
  ln -s "$recipe" "$BATS_TEST_TMPDIR/a link.sh"
  cp "$recipe" "$BATS_TEST_TMPDIR/slurm_script"
  cd "$BATS_TEST_TMPDIR"
  export TENSOR_PARALLEL_SIZE=4 SEQUENCE_PARALLEL=0 TRAIN_ITERS=5
  run -0 settings_of "$recipe"
  expected=$output
  [[ $output == *"Qwen_32B_Megatron_TP4PP1"*"/SFT_Hybrid_R1_32B_OpenThoughts_1M/train_iters_5"*"SEQUENCE_PARALLEL=0"* ]]
  run -0 settings_of "a link.sh"
  [[ $output == "$expected" ]]
  for submitted_from in "$REPOSITORY" "$REPOSITORY/scripts" "$REPOSITORY/scripts/sft"; do
    SLURM_SUBMIT_DIR=$submitted_from run -0 settings_of slurm_script
    [[ $output == "$expected" ]]
  done
  run ! settings_of slurm_script
}
