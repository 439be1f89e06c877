# NVIDIA's PyTorch image plus requirements.txt. Nothing is compiled; the image's torch and Transformer Engine are kept.
#
#   docker build -t megatron-sft .
#   bash scripts/cluster/container.sh        a shell in it as yourself, with the GPUs and this repository
# Image and megatron-core are a pair: 0.16.1 was released with 25.11, 0.19.2 with 26.06. The set-up takes the image's.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/megatron-sft
COPY requirements.txt ./
COPY scripts/lib scripts/lib
COPY constraints constraints
# The environment is based on the image's Python. Every script uses it, including those of a repository mounted elsewhere.
ENV MEGATRON_SFT_VENV=/opt/megatron-sft/.venv
RUN PIP_NO_CACHE_DIR=1 bash -c 'source scripts/lib/common.sh && ensure_setup' && chmod -R a+rX /opt/megatron-sft
COPY megatron megatron
# There is no GPU driver during a build; the image's compatibility libraries replace it for these imports.
RUN LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/usr/local/cuda/compat/lib.real:/usr/local/cuda/compat PYTHONNOUSERSITE=1 .venv/bin/python -c '\
import importlib.metadata, os, torch, transformer_engine, megatron.core, transformers, datasets; \
assert not torch.__file__.startswith("/opt/megatron-sft"), torch.__file__; \
assert not transformer_engine.__file__.startswith("/opt/megatron-sft"), transformer_engine.__file__; \
assert torch.version.cuda, "this torch has no CUDA"; \
print("torch", torch.__version__, "CUDA", torch.version.cuda, "Transformer Engine", importlib.metadata.version("transformer_engine"))'
WORKDIR /workspace
