#!/usr/bin/env bash
# Tokenise a data set: bash scripts/data/tokenize_dataset.sh TOKENIZER_DIR FILE LENGTH (longer conversations are truncated)
OVERLONG=${OVERLONG:-truncate} exec bash "$(dirname "$(readlink -f "$0")")/../3_tokenize.sh" "$@"
