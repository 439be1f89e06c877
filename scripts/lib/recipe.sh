# shellcheck shell=bash
# The last line of a recipe sources this: the usual places of its model and data, unless it has set others, and then training.
: "${PRETRAIN_CHECKPOINT_PATH:=$ASSETS_DIR/checkpoints/${MODEL}_Megatron_TP${TENSOR_PARALLEL_SIZE}PP${PIPELINE_PARALLEL_SIZE}}"
: "${DATA_PATH:=$ASSETS_DIR/data/$DATA/Tokenized-$DATA-$MODEL-${SEQ_LENGTH}_text_document}"

# shellcheck source=scripts/4_train.sh
source "$ROOT/scripts/4_train.sh"
