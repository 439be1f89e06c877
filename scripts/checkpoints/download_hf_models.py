#!/usr/bin/env bash
# Download a model to assets/checkpoints: python scripts/checkpoints/download_hf_models.py --model-card ID
# Runs in both Python and bash: the next line does nothing in bash, and starts a string in Python that ends after exec.
""":"
words=()
for word in "$@"; do [[ $word == --model-card ]] || words+=("${word#--model-card=}"); done
exec bash "$(dirname "$(readlink -f "$0")")/../1_download.sh" model "${words[@]}"
"""

import os
import sys

os.execvp("bash", ["bash", __file__, *sys.argv[1:]])
