# syntax=docker/dockerfile:1
# The GPU image. NOT BUILT YET: written from the packages' documentation and metadata.
#   docker build --build-arg BASE=<PyTorch image of NVIDIA's NGC catalog, with Python 3.12 and torch 2.13> -t megatron_dapo .
# The container's own torch, TransformerEngine and apex stay. vLLM's wheel is linked against another build of torch, so vLLM is
# compiled here against this one (MAX_JOBS limits the compiler's memory; about 5 GB a job).
# Instead, the engines can have a virtual environment with vLLM's own wheel, and rollout.python=/opt/engines/bin/python:
#   python -m venv /opt/engines
#   PIP_CONSTRAINT= /opt/engines/bin/pip install vllm==0.32.0 xxhash
#   /opt/engines/bin/pip install --no-deps /opt/megatron_dapo
ARG BASE
FROM ${BASE}
ARG VLLM=0.32.0
ARG MAX_JOBS=8
ARG TORCH_CUDA_ARCH_LIST="9.0a"
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/megatron_dapo

# Versions that no later step may change.
RUN python - <<'PY' > /opt/kept.txt
import importlib.metadata, sys

assert sys.version_info[:2] == (3, 12), sys.version
for name in ("torch", "torchvision", "triton", "transformer-engine", "apex"):
    try:
        print(f"{name}=={importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        pass
PY

# The container pins every package it was made with in /etc/pip/constraint.txt; only what is named above stays pinned.
ENV PIP_CONSTRAINT=/opt/kept.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

COPY requirements.txt ./
RUN grep -vE '^(torch|transformer-engine|vllm)\b' requirements.txt > /opt/rest.txt && pip install -r /opt/rest.txt

RUN pip install "cmake>=3.26" ninja "setuptools-scm>=8" setuptools-rust wheel jinja2 packaging && \
    pip install --no-deps --no-build-isolation --no-binary vllm "vllm==${VLLM}"
# vLLM's own requirements, without those that would bring another torch.
RUN python - <<'PY' > /opt/vllm.txt
import importlib.metadata
from packaging.requirements import Requirement

for line in importlib.metadata.requires("vllm"):
    requirement = Requirement(line)
    own = requirement.name.lower() in {"torch", "torchvision", "torchaudio", "torchcodec"}
    if not own and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PY
RUN pip install -r /opt/vllm.txt

COPY . .
RUN pip install --no-deps --no-build-isolation --editable .
RUN python - <<'PY'
import importlib.metadata

kept = dict(line.strip().split("==") for line in open("/opt/kept.txt"))
changed = {name: importlib.metadata.version(name) for name, version in kept.items() if importlib.metadata.version(name) != version}
assert not changed, f"replaced: {changed}, wanted {kept}"
names = {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}
assert "megatron_dapo" in names, names
import megatron.core, math_verify, megatron_dapo, torch, transformers, vllm  # noqa: F401
PY
