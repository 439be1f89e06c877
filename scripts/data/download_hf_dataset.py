#!/usr/bin/env bash
# Download a data set to assets/data: python scripts/data/download_hf_dataset.py --dataset-card ID [--split SPLIT]
# Runs in both Python and bash: the next line does nothing in bash, and starts a string in Python that ends after exec.
""":"
words=()
for word in "$@"; do [[ $word == --dataset-card ]] || words+=("${word#--dataset-card=}"); done
exec bash "$(dirname "$(readlink -f "$0")")/../1_download.sh" dataset "${words[@]}"
"""

import os
import sys

os.execvp("bash", ["bash", __file__, *sys.argv[1:]])
