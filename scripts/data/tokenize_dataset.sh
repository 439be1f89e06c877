#!/usr/bin/env bash
# Tokenise a data set: bash scripts/data/tokenize_dataset.sh TOKENIZER_DIR FILE LENGTH (conversations that are longer are cut)
OVERLONG=${OVERLONG:-truncate} exec bash "$(dirname "$(readlink -f "$0")")/../3_tokenize.sh" "$@"
