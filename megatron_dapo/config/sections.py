"""The sections of a run's configuration that have no file of their own: fields with bounds, default, meaning
and unit.

Rules between fields are in preflight.py, policy/rules.py and data/rules.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from megatron_dapo.layout import Layout


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    path: str = Field(description="Folder of a Hugging Face checkpoint with tokenizer, or a hub name.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="bf16", description="Compute type; bf16 keeps fp32 master weights."
    )


class LayoutConfig(Section):
    tensor_parallel: PositiveInt = Field(
        default=1, description="Ranks that split every weight matrix; must divide heads, hidden and MLP size."
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split norms and residuals by token over the tensor-parallel ranks; needs "
        "tensor_parallel > 1.",
    )
    pipeline_parallel: PositiveInt = Field(
        default=1, description="Pipeline stages; must divide the number of layers."
    )
    virtual_pipeline_parallel: PositiveInt | None = Field(
        default=None,
        description="Model chunks of each pipeline stage (interleaved schedule); needs pipeline_parallel > "
        "1; null: one.",
    )
    context_parallel: PositiveInt = Field(default=1, description="Ranks that split every sequence.")
    expert_parallel: PositiveInt = Field(
        default=1,
        description="Ranks that split the experts among them; they are ranks of the other dimensions, not "
        "more ranks.",
    )
    expert_tensor_parallel: PositiveInt = Field(
        default=1, description="Ranks that split every expert's matrices."
    )
    data_parallel: PositiveInt = Field(
        default=1,
        description="Replicas that train on different samples; must divide the samples of each update.",
    )

    def to_layout(self) -> Layout:
        return Layout(
            tp=self.tensor_parallel,
            sp=self.sequence_parallel,
            pp=self.pipeline_parallel,
            vpp=self.virtual_pipeline_parallel,
            cp=self.context_parallel,
            ep=self.expert_parallel,
            etp=self.expert_tensor_parallel,
            dp=self.data_parallel,
        )


class Fp8Config(Section):
    format: Literal["e4m3", "hybrid"] = Field(
        default="e4m3",
        description="hybrid quantises gradients to e5m2, with more range and less precision; the rest is "
        "e4m3.",
    )
    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = Field(
        default="blockwise",
        description="How scales are chosen: per tensor from its own values or from the last pass, in blocks "
        "of 128, in blocks of 32.",
    )
    param_gather: bool = Field(
        default=False,
        description="Keep the weights of those layers in FP8 and gather them so after updates (GPU only).",
    )
    first_last_bf16: bool = Field(
        default=False, description="Leave the first and the last layer unquantised."
    )


class PolicyConfig(Section):
    layers: Literal["auto", "te", "local"] = Field(
        default="auto",
        description="Layers on a GPU: TransformerEngine's, or Megatron's local ones with torch's attention, "
        "which know no FP8; auto: TransformerEngine's where it is installed. On a CPU always the local ones.",
    )
    fp8: Fp8Config | None = Field(
        default=None,
        description="FP8 matrix products in the policy's layers: TransformerEngine's on GPU, emulated on "
        "CPU; null: off.",
    )
    recompute: Literal["selective", "full"] | None = Field(
        default=None,
        description="Compute activations again in the backward pass: of some modules, or of whole layers; "
        "null: keep them.",
    )
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm", "moe", "moe_act"]] = Field(
        default=["mlp"],
        description="What 'selective' recomputes: moe, or moe_act, in a model with experts; layernorm frees "
        "memory in the local layers and before experts, core_attn next to none.",
    )
    recompute_layers: PositiveInt = Field(
        default=1, description="'full': layers recomputed together from one kept input."
    )
    overlap_grad_reduce: bool = Field(
        default=False, description="Reduce gradients over data-parallel ranks during the backward pass."
    )
    overlap_param_gather: bool = Field(
        default=False,
        description="Gather updated weights during the next forward pass; needs overlap_grad_reduce and "
        "optimizer.distributed.",
    )


class OptimizerConfig(Section):
    lr: float = Field(default=1e-6, gt=0, description="Learning rate of AdamW, after warm-up.")
    min_lr: float = Field(default=0.0, ge=0, description="Where a cosine decay ends.")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="AdamW's decay rates of the two moments."
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's term in the denominator.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay; not applied to biases and norms."
    )
    clip_grad: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0: no clipping.")
    on_nonfinite: Literal["stop", "skip_update"] = Field(
        default="stop",
        description="What to do when loss or gradient is NaN or infinite; the weights stay as they were "
        "either way.",
    )
    max_skipped: PositiveInt = Field(
        default=3, description="Updates in a row that skip_update leaves out before the run stops."
    )
    spike_factor: float | None = Field(
        default=5.0,
        gt=1,
        description="Report a gradient norm above this times the median of the last 64 updates, once there "
        "are 8; null: never.",
    )
    warmup_updates: int = Field(
        default=0, ge=0, description="Linear warm-up, in optimizer updates (not steps)."
    )
    decay: Literal["constant", "cosine"] = Field(
        default="constant", description="Learning rate after warm-up."
    )
    decay_updates: PositiveInt | None = Field(
        default=None, description="Updates over which cosine decays; required for cosine."
    )
    distributed: bool = Field(default=True, description="Shard the optimizer state over data-parallel ranks.")
    cpu_offload: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the optimizer state that is kept, and updated, in host memory; needs bf16 and "
        "distributed.",
    )


class BatchConfig(Section):
    updates_per_step: PositiveInt = Field(
        default=1, description="Optimizer updates made of one rollout batch."
    )
    max_tokens: PositiveInt = Field(default=16384, description="Token budget of one packed micro-batch.")


class CheckpointConfig(Section):
    every_steps: int = Field(
        default=0, ge=0, description="Save after this many steps; 0: only at the end and when interrupted."
    )
    keep: PositiveInt = Field(default=2, description="Newest checkpoints kept.")
    async_save: bool = Field(
        default=False,
        description="Save in the background: training waits for a copy of the state in host memory, not for "
        "the disk. The memory of the copies is kept: over all ranks as much as a checkpoint has bytes.",
    )
    resume: str = Field(
        default="auto",
        description="'auto' continues the run folder's newest checkpoint, 'never', or a checkpoint folder.",
    )
    export_hf: bool = Field(
        default=True, description="Write a Hugging Face checkpoint with tokenizer when the run ends."
    )
    export_every: int = Field(
        default=0, ge=0, description="Write one to exports/ after this many steps too; 0: only at the end."
    )
    keep_exports: PositiveInt | None = Field(
        default=2, description="Newest folders of exports/ that stay; null: all."
    )


class EvaluationConfig(Section):
    path: str | None = Field(
        default=None, description="Held-out problems, same format as data.path; null: no evaluation."
    )
    every_steps: int = Field(
        default=0,
        ge=0,
        description="Evaluate after this many steps; 0: only before the first and after the last.",
    )
    samples: PositiveInt = Field(
        default=1, description="Completions of each problem; the accuracy is their mean (avg@k)."
    )
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the evaluation's sampling; 1: off.")


class ReportConfig(Section):
    rollouts: bool = Field(
        default=True,
        description="Save every step's groups to rollouts/, for tools/replay.py and tools/show_rollouts.py.",
    )
    keep_rollouts: PositiveInt | None = Field(
        default=20,
        description="Files of rollouts/ that stay, the newest; null: all. A step of 512 x 16 responses of "
        "5,000 tokens takes about 0.15 GB.",
    )
    trace: bool = Field(
        default=False,
        description="Write trace.json: the trainer, engines, requests and grading on one time axis, for "
        "ui.perfetto.dev.",
    )
    gap_warning: float | None = Field(
        default=0.1,
        gt=0,
        description="Say so when policy/rollout_logprob_gap is above this, nats: engines that compute "
        "something else; null: never.",
    )
    tensorboard: bool = Field(default=False, description="Write TensorBoard event files into the run folder.")
    wandb: bool = Field(default=False, description="Log to wandb; offline without an API key.")
    wandb_project: str = Field(default="megatron_dapo", description="Project that wandb logs to.")


class SyncConfig(Section):
    chunk_bytes: PositiveInt = Field(
        default=1 << 30,
        description="Weights travel to an engine worker in chunks of at most so many bytes; two of them are "
        "in memory at once, for each worker.",
    )
    verify: Literal["never", "first"] | PositiveInt = Field(
        default="first",
        description="Pushes in which every worker checks what it received and what it wrote: none, the "
        "first, or every n-th.",
    )
    delta: bool = Field(
        default=False,
        description="Send to other hosts only the elements whose bits have changed since the last push. For "
        "engines in bf16 behind slow links; their hosts then keep whole shards in memory (docs/bridge.md).",
    )


class RunSection(Section):
    dir: str = Field(default="runs/dapo", description="Everything the run writes is in here.")
    max_steps: PositiveInt = Field(
        default=100, description="Steps (rollout batches) after which the run ends."
    )
    seed: int = Field(
        default=0,
        description="Seed of data order, of model parallel RNG and, with rollout.seeded, of sampling.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where policy ranks compute; auto: cuda if torch sees a GPU."
    )
    verify_sync: bool = Field(
        default=False,
        description="When the run ends, compare every parameter in every engine with a fresh server on the "
        "exported checkpoint.",
    )
