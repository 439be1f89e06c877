#!/usr/bin/env bash
# Download a data set to assets/data: python scripts/data/download_hf_dataset.py --dataset-card ID [--split SPLIT]
# Python and bash both run this file: to bash the next line does nothing, to Python it opens a text that ends after exec.
""":"
words=()
for word in "$@"; do [[ $word == --dataset-card ]] || words+=("${word#--dataset-card=}"); done
exec bash "$(dirname "$(readlink -f "$0")")/../1_download.sh" dataset "${words[@]}"
"""

import os
import sys

os.execvp("bash", ["bash", __file__, *sys.argv[1:]])
