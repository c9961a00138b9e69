"""DAPO reinforcement learning of large language models on Megatron-Core, with vLLM rollouts.

    from megatron_dapo import DAPOTrainer
    DAPOTrainer(model_name="Qwen/Qwen2.5-32B", clip_epsilon=0.2, dynamic_sampling=True,
    max_length=4096).train(dataset, epochs=10)

Nothing is imported before it is asked for: grading workers and vLLM's processes load this package too.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dapo.api import DAPOTrainer
    from megatron_dapo.config import RunConfig

__all__ = ["DAPOTrainer", "RunConfig"]


def __getattr__(name: str) -> Any:
    if name == "DAPOTrainer":
        from megatron_dapo.api import DAPOTrainer

        return DAPOTrainer
    if name == "RunConfig":
        from megatron_dapo.config import RunConfig

        return RunConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
