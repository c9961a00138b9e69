"""Another name of `megatron_dapo`:

from dapo import DAPOTrainer
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dapo import DAPOTrainer, RunConfig

__all__ = ["DAPOTrainer", "RunConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import megatron_dapo

    return getattr(megatron_dapo, name)
