"""Megatron's local layers on a GPU, with torch's attention and NCCL, without TransformerEngine:
`TEST_PYTHON=python bash tests/run.sh -m gpu`, where there is one.

The same measurement runs with devices named cuda that are the CPU (`-m slow`), so that what is compared is
known to be comparable.
"""

from __future__ import annotations

import pytest
import torch
from support import local_layers
from support.invariance import Case, World

# Of loss and gradient norm of the first update, relative to the float64 reference
BOUNDS = {"fp32": 1e-3, "bf16": 2e-2}
CASES = [
    Case(layout=layout, dtype=d, policy=("layers=local",)) for layout in ("tp1", "tp2_sp") for d in BOUNDS
]


def check(world: World, case: Case, ranks: int, *, pretended: bool) -> None:
    run = local_layers.run_ranks if pretended else local_layers.run_ranks_on_gpus
    first = world.measure(ranks, [case], run=run)[0][case.name][0]
    stored = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    loss, grad_norm = world.expected(False, case.num_updates, stored).results[0]
    assert first["loss"] == pytest.approx(loss, rel=BOUNDS[case.dtype])
    assert first["grad_norm"] == pytest.approx(grad_norm, rel=BOUNDS[case.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_local_layers_on_gpus(tmp_path, case):
    ranks = 1 if case.layout == "tp1" else 2
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"torch sees {torch.cuda.device_count()} GPUs, {ranks} are needed")
    check(World(tmp_path), case, ranks, pretended=False)


@pytest.mark.slow
def test_the_measurement_itself_on_the_cpu(tmp_path):
    check(World(tmp_path), CASES[1], 1, pretended=True)
