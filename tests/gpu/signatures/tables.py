"""What the snapshots are of, as far as syntax trees do not say it."""

from __future__ import annotations

from typing import Any

MEGATRON = "megatron.core"
OPTIMIZER = f"{MEGATRON}.optimizer.optimizer"
DISTRIBUTED_OPTIMIZER = f"{MEGATRON}.optimizer.distrib_optimizer.DistributedOptimizer"
HYBRID = f"{MEGATRON}.optimizer.cpu_offloading.HybridDeviceOptimizer"
DDP = f"{MEGATRON}.distributed.DistributedDataParallel"
GPT = f"{MEGATRON}.models.gpt.GPTModel"
SCHEDULE = f"{MEGATRON}.optimizer_param_scheduler.OptimizerParamScheduler"
WRITER = f"{MEGATRON}.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
RELOADING = "vllm.model_executor.model_loader.reload.types.LayerReloadingInfo"
CORE = "vllm.v1.engine.core.EngineCore"
LLM = "vllm.v1.engine.async_llm.AsyncLLM"
WORKER = "vllm.v1.worker.gpu_worker.Worker"

# By file of ours: what a name or an attribute in it stands for, where no import says it.
OBJECTS: dict[str, dict[str, str]] = {
    "megatron_dapo/policy/model.py": {
        "kind": GPT,
        "no_sync": f"{DDP}.no_sync",
        "start_param_sync": f"{DDP}.start_param_sync",
        "shared_embedding_or_output_weight": f"{GPT}.shared_embedding_or_output_weight",
    },
    "megatron_dapo/policy/forward.py": {"chunk": f"{GPT}.forward"},
    "megatron_dapo/policy/trained.py": {
        "scale_loss": f"{OPTIMIZER}.MegatronOptimizer.scale_loss",
        "zero_grad": f"{OPTIMIZER}.MegatronOptimizer.zero_grad",
        "zero_grad_buffer": f"{DDP}.zero_grad_buffer",
        "step": f"{SCHEDULE}.step",
    },
    "megatron_dapo/policy/optimizer.py": {
        "prepare_grads": f"{OPTIMIZER}.MegatronOptimizer.prepare_grads",
        "get_grad_norm": f"{OPTIMIZER}.ChainedOptimizer.get_grad_norm",
        "get_parameters": f"{OPTIMIZER}.MegatronOptimizer.get_parameters",
        "step_with_ready_grads": f"{OPTIMIZER}.ChainedOptimizer.step_with_ready_grads",
        "sub_optimizers": f"{HYBRID}.sub_optimizers",
        "_sync_sub_optimizers_state_to_hdo": f"{HYBRID}._sync_sub_optimizers_state_to_hdo",
        "use_precision_aware_optimizer_no_fp8_or_ds_fp8": (
            f"{MEGATRON}.optimizer.OptimizerConfig.use_precision_aware_optimizer_no_fp8_or_ds_fp8"
        ),
    },
    "megatron_dapo/policy/optimizer_state.py": {
        "is_stub_optimizer": f"{DISTRIBUTED_OPTIMIZER}.is_stub_optimizer",
        "model_param_group_index_map": f"{DISTRIBUTED_OPTIMIZER}.model_param_group_index_map",
        "_get_model_param_range_map": f"{DISTRIBUTED_OPTIMIZER}._get_model_param_range_map",
        "_get_main_param_and_optimizer_states": (
            f"{DISTRIBUTED_OPTIMIZER}._get_main_param_and_optimizer_states"
        ),
        "build": f"{MEGATRON}.dist_checkpointing.mapping.ShardedTensorFactory.build",
    },
    "megatron_dapo/policy/offload.py": {
        "zero_grad": f"{OPTIMIZER}.MegatronOptimizer.zero_grad",
        "offload_to_cpu": f"{OPTIMIZER}.MegatronOptimizer.offload_to_cpu",
        "restore_from_cpu": f"{OPTIMIZER}.MegatronOptimizer.restore_from_cpu",
        "offload_grad_buffers": f"{DDP}.offload_grad_buffers",
        "restore_grad_buffers": f"{DDP}.restore_grad_buffers",
    },
    "megatron_dapo/checkpoint.py": {"sharded_state_dict": f"{GPT}.sharded_state_dict"},
    "megatron_dapo/checkpoint_writer.py": {
        "preload_tensors": f"{WRITER}.preload_tensors",
        "write_preloaded_data": f"{WRITER}.write_preloaded_data",
    },
    "megatron_dapo/rollout/route.py": {
        "abort": f"{LLM}.abort",
        "check_admission": f"{LLM}.check_admission",
        "errored": f"{LLM}.errored",
        "get_supported_tasks": f"{LLM}.get_supported_tasks",
        "add_request_async": "vllm.v1.engine.core_client.AsyncMPClient.add_request_async",
        "process": "vllm.v1.engine.input_processor.InputProcessor.process_inputs",
        "assign_request_id": "vllm.v1.engine.input_processor.InputProcessor.assign_request_id",
        "add_request": "vllm.v1.engine.output_processor.OutputProcessor.add_request",
    },
    "megatron_dapo/sync/vllm/outputs.py": {
        "_weight_version": f"{CORE}._weight_version",
        "output_queue": "vllm.v1.engine.core.EngineCoreProc.output_queue",
        "get_request_counts": "vllm.v1.core.sched.scheduler.Scheduler.get_request_counts",
    },
    "megatron_dapo/sync/vllm/extension.py": {
        "_check_weight_transfer_engine": f"{WORKER}._check_weight_transfer_engine",
        "weight_transfer_engine": f"{WORKER}.weight_transfer_engine",
    },
    "megatron_dapo/sync/vllm/reload.py": {
        "can_load": f"{RELOADING}.can_load",
        "reset": f"{RELOADING}.reset",
        "kernel_tensors": f"{RELOADING}.kernel_tensors",
        "load_numel": f"{RELOADING}.load_numel",
        "load_numel_total": f"{RELOADING}.load_numel_total",
    },
    "megatron_dapo/sync/vllm/sinks_twin.py": {
        "restore_metadata": f"{RELOADING}.restore_metadata",
        "world_size": "vllm.distributed.parallel_state.GroupCoordinator.world_size",
        "rank_in_group": "vllm.distributed.parallel_state.GroupCoordinator.rank_in_group",
    },
    "megatron_dapo/sync/vllm/sinks_pretend.py": {
        "create_engine_config": "vllm.engine.arg_utils.EngineArgs.create_engine_config",
        "load_model_cls": "vllm.model_executor.models.registry._LazyRegisteredModel.load_model_cls",
    },
}

# Fields that a call gets as `**fields`, by the functions of ours that make them.
FIELDS: dict[str, list[tuple[str, str]]] = {
    f"{MEGATRON}.transformer.TransformerConfig": [
        ("megatron_dapo/policy/backend.py", "_cpu_fields"),
        ("megatron_dapo/policy/backend.py", "_gpu_fields"),
        ("megatron_dapo/policy/fp8_rules.py", "transformer_fields"),
    ],
    f"{MEGATRON}.distributed.DistributedDataParallelConfig": [
        ("megatron_dapo/policy/fp8_rules.py", "ddp_fields")
    ],
    f"{MEGATRON}.optimizer.OptimizerConfig": [("megatron_dapo/policy/fp8_rules.py", "optimizer_fields")],
}

# Megatron's schedules, one of which RETURNS_SCHEDULE returns.
RETURNS_SCHEDULE = f"{MEGATRON}.pipeline_parallel.get_forward_backward_func()"
SCHEDULES = [
    f"{MEGATRON}.pipeline_parallel.schedules.forward_backward_{kind}"
    for kind in ("no_pipelining", "pipelining_with_interleaving", "pipelining_without_interleaving")
]

# Functions that hand on whatever they are given since megatron-core 0.19, and to which.
SPECS = f"{MEGATRON}.models.gpt.gpt_layer_specs"
FORWARDED = {
    f"{SPECS}.get_gpt_layer_local_spec": f"{SPECS}.get_gpt_layer_local_submodules",
    f"{SPECS}.get_gpt_layer_with_transformer_engine_spec": (
        f"{SPECS}.get_gpt_layer_with_transformer_engine_submodules"
    ),
}

# What Megatron's layers call for us in TransformerEngine, which none of our files imports: by name, the file
# of ours that asks Megatron for it, and the files under megatron/core that call it.
LAYERS = "extensions/transformer_engine.py"
TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    f"transformer_engine.{name}": {"used_by": f"megatron_dapo/policy/{file}.py", "through": through}
    for file, through, names in (
        (
            "backend",
            [LAYERS],
            """
            pytorch.Linear pytorch.Linear.__init__ pytorch.Linear.forward
            pytorch.LayerNormLinear pytorch.LayerNormLinear.__init__ pytorch.LayerNormLinear.forward
            pytorch.GroupedLinear pytorch.GroupedLinear.__init__ pytorch.GroupedLinear.forward
            pytorch.DotProductAttention pytorch.DotProductAttention.__init__
            pytorch.DotProductAttention.forward pytorch.RMSNorm
            pytorch.attention.rope.apply_rotary_pos_emb
            pytorch.distributed.checkpoint
            pytorch.distributed.CudaRNGStatesTracker pytorch.distributed.CudaRNGStatesTracker.add
            pytorch.permutation.moe_permute pytorch.permutation.moe_unpermute
            pytorch.permutation.moe_sort_chunks_by_index
            """,
        ),
        (
            "fp8_rules",
            [LAYERS, "fp8_utils.py", "tensor_parallel/random.py"],
            """
            common.recipe.DelayedScaling common.recipe.DelayedScaling.__init__
            common.recipe.Float8CurrentScaling common.recipe.Float8BlockScaling
            common.recipe.MXFP8BlockScaling common.recipe.Format.E4M3 common.recipe.Format.HYBRID
            pytorch.fp8_autocast pytorch.fp8_model_init pytorch.fp8.FP8GlobalStateManager
            pytorch.fp8.FP8GlobalStateManager.is_fp8_enabled pytorch.fp8.FP8GlobalStateManager.get_fp8_recipe
            pytorch.fp8.fp8_autocast pytorch.Fp8Padding pytorch.Fp8Unpadding
            pytorch.distributed.activation_recompute_forward pytorch.float8_tensor.Float8Tensor
            pytorch.tensor.QuantizedTensor pytorch.tensor.utils.cast_master_weights_to_fp8
            pytorch.tensor.utils.replace_raw_data
            """,
        ),
        (
            "optimizer",
            ["optimizer/__init__.py", "optimizer/clip_grads.py", "optimizer/optimizer.py"],
            """
            pytorch.optimizers.FusedAdam pytorch.optimizers.multi_tensor_applier
            pytorch.optimizers.multi_tensor_l2norm pytorch.optimizers.multi_tensor_scale
            """,
        ),
    )
    for name in names.split()
}
