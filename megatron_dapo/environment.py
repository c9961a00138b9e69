"""Names that the processes of a run agree on: environment variables, and what vLLM knows our plugin by."""

from __future__ import annotations

PLUGIN = "megatron_dapo"  # vLLM's name of our weight-transfer backend and of our load format
WORKER_EXTENSION = "megatron_dapo.sync.vllm.extension.WorkerExtension"  # for vLLM's --worker-extension-cls
TOKEN_VARIABLE = "MEGATRON_DAPO_TOKEN"  # the run's secret, which every request to a server carries
REQUEST_PREFIX = "megatron_dapo-"  # of vLLM's names of requests that came over our own route
# set in servers that a run started; its value is the engine's number
ENGINE_VARIABLE = "MEGATRON_DAPO_ENGINE"
# a worker writes digests of every parameter as loaded into this folder
DIGEST_VARIABLE = "MEGATRON_DAPO_DIGEST_DIR"
