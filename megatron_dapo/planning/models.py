"""Which models a policy rank has, and the bytes of their weights: the policy, a reference and a value model
where the objective needs them, and what policy.fp8 makes of each.

FP8 is TransformerEngine's. A linear layer multiplies with quantised copies of its weight, which it makes in
the first micro-batch of an update and keeps: by row for the forward pass, by column for the gradient of its
input. Blackwell multiplies a weight with one scale for all of it either way, and needs one copy. With
policy.fp8.param_gather the copies are all there is of the weight, and stay; else policy/offload.py drops
those of trained models while engines are awake. (TransformerEngine 2.9, pytorch/module/base.py:
get_weight_workspace; pytorch/utils.py: is_non_tn_fp8_gemm_supported.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dapo.config import Fp8Config, RunConfig
from megatron_dapo.model_spec import ModelSpec
from megatron_dapo.objectives import make_objective
from megatron_dapo.objectives.base import Objective
from megatron_dapo.planning.hardware import Gpu
from megatron_dapo.planning.sizes import Sizes
from megatron_dapo.types import Stream

BLACKWELL = (10, 0)  # compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Of one rank. trained: the policy, and a value model. weights: bytes that are on the GPU all the time,
    by what they are. fp8_copies: bytes that go with the gradients. reference: bytes of a reference model's
    weights, 0 without one; reference_copies: of those in FP8, which are dropped with them.
    """

    trained: tuple[Sizes, ...]
    weights: dict[str, float]
    fp8_copies: float
    reference: float
    reference_copies: float

    @property
    def policy(self) -> Sizes:
        return self.trained[0]


def models_of(
    config: RunConfig,
    model: ModelSpec,
    stage: int,
    gpu: Gpu,
    sizes: Callable[..., Sizes],
    reference: ModelSpec | None = None,
) -> Models:
    """On a rank of the pipeline stage. sizes: as sizes.rank_sizes. reference: default the policy's model."""
    needs, fp8, policy = _objective(config).needs, config.policy.fp8, sizes(config, model, stage)
    weights: dict[str, float] = {"policy weights": policy.weights}
    trained = [policy]
    if has_value_model(config):
        trained.append(sizes(config, model, stage, value=True))
        weights["value model's weights"] = trained[1].weights
    frozen = None
    if Stream.REFERENCE_LOGPROBS in needs:
        frozen = policy if reference is None else sizes(config, reference, stage)
    copies, stay, copies_of_frozen = 0.0, 0.0, 0.0
    if fp8 is not None:
        by_row, both = fp8_copies(fp8, gpu)
        copies = both * sum(size.quantized for size in trained)
        if fp8.param_gather:
            weights["policy weights"] -= policy.quantized * policy.weights / policy.elements
            copies -= both * policy.quantized
            stay += both * policy.quantized
        if frozen:
            copies_of_frozen = by_row * frozen.quantized
    if stay:
        weights["weights in FP8 that stay"] = stay
    return Models(
        trained=tuple(trained),
        weights=weights,
        fp8_copies=copies,
        reference=frozen.weights if frozen else 0.0,
        reference_copies=copies_of_frozen,
    )


def has_value_model(config: RunConfig) -> bool:
    return Stream.VALUES in _objective(config).needs


def forward_passes(config: RunConfig) -> tuple[bool, bool, bool]:
    """Which of the policy, a reference and a value model compute all tokens of a step before its first update
    (policy/step.py).
    """
    objective = _objective(config)
    old = config.batch.updates_per_step > 1 or objective.old_before_update
    return (
        old and Stream.OLD_LOGPROBS in objective.needs,
        Stream.REFERENCE_LOGPROBS in objective.needs,
        Stream.VALUES in objective.needs,
    )


def fp8_copies(fp8: Fp8Config, gpu: Gpu) -> tuple[float, float]:
    """Bytes for an element of a quantised weight: of the copy by row, and of all that training keeps."""
    if fp8.recipe in ("tensorwise", "delayed"):
        return 1.0, 1.0 if gpu.capability >= BLACKWELL else 2.0
    scales = 1 / 32 if fp8.recipe == "mxfp8" else 4 / 128**2
    return 1 + scales, 2 * (1 + scales)


def _objective(config: RunConfig) -> Objective:
    return make_objective(config.objective, max_age=config.sampling.max_age)
