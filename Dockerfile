# syntax=docker/dockerfile:1
# The GPU image. NOT BUILT YET: written from the container's release notes and the packages' metadata.
#   docker build -t megatron_dapo .          --build-arg MEGATRON_BRIDGE=0.6.2 adds megatron-bridge
#   docker run --rm -it --init --gpus all --ipc=host --network=host --ulimit memlock=-1 \
#     --ulimit stack=67108864 --user "$(id -u):$(id -g)" -v /data:/data megatron_dapo \
#     python -m megatron_dapo.train /opt/megatron_dapo/examples/configs/qwen7b_1node.yaml run.dir=/data/run \
#       model.path=/data/model data.path=/data/problems.jsonl rollout.python=/opt/engines/python
#
# The ranks use the container's own torch, TransformerEngine and apex, which no step here replaces. vLLM's
# wheel is linked against another build of torch, so the engines have a virtual environment with both:
# rollout.python=/opt/engines/python, which is $ENGINE_PYTHON in the container.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
# hadolint ignore=DL3006
FROM ${BASE}

LABEL org.opencontainers.image.title="megatron_dapo" \
      org.opencontainers.image.description="DAPO reinforcement learning on Megatron-Core and vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

# The container constrains every package that it was made with (/etc/pip/constraint.txt). From here on only
# its torch and what is compiled against that are constrained; a check follows the last installation.
RUN python -c 'import sys; assert sys.version_info[:2] == (3, 12), sys.version' && \
    pip list --format=freeze > /opt/installed.txt && \
    grep -iE '^(torch|torchvision|triton|transformer[-_]engine|apex|flash[-_]attn)==' /opt/installed.txt \
      > /opt/kept.txt && \
    grep -q '^torch==' /opt/kept.txt && grep -qiE '^transformer[-_]engine==' /opt/kept.txt
ENV PIP_CONSTRAINT=/opt/kept.txt

WORKDIR /opt/megatron_dapo
COPY requirements.txt requirements-engine.txt ./
RUN pip install -r requirements.txt
RUN python -m venv --without-pip /opt/engines && \
    PIP_CONSTRAINT='' pip --python /opt/engines/bin/python install -r requirements-engine.txt

# megatron-bridge, for tests/gpu/test_gpu_megatron_bridge.py. It asks for other versions of transformers and
# wandb, so it comes without its requirements, but with what it imports.
ARG MEGATRON_BRIDGE=""
RUN if [ -n "${MEGATRON_BRIDGE}" ]; then \
      pip install "accelerate>=1" "diffusers>=0.36" "peft>=0.18.1" && \
      pip install --no-deps "megatron-bridge==${MEGATRON_BRIDGE}"; \
    fi

COPY tools/engine_python.sh /opt/engines/python
ENV ENGINE_PYTHON=/opt/engines/python

COPY . .
RUN pip install --no-deps --no-build-isolation -e . && \
    PIP_CONSTRAINT='' pip --python /opt/engines/bin/python install --no-deps --no-build-isolation -e .
RUN pip list --format=freeze > /opt/installed.txt && ! grep -vxFf /opt/installed.txt /opt/kept.txt && \
    python -c 'import datasets, math_verify, megatron.core, megatron_dapo, modelopt, transformers' && \
    python -c 'from megatron_dapo.rollout.interpreter import check_interpreter; \
      check_interpreter("/opt/engines/python")' && \
    /opt/engines/python -c 'import torch; assert "/dist-packages/" not in open("/proc/self/maps").read()'

# Any user can be given with --user: what is written at run time goes into mounted folders and HOME.
RUN useradd --create-home --uid 10001 dapo && chmod 1777 /home/dapo
ENV HOME=/home/dapo
USER 10001
WORKDIR /home/dapo
HEALTHCHECK --interval=1m --timeout=30s --start-period=1m \
  CMD ["python", "/opt/megatron_dapo/tools/doctor.py", "--health"]
CMD ["bash"]
