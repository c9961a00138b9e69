"""The policy's state leaves the GPU between two updates and comes back: not a bit of weights, optimizer state
or results is another. Megatron's own calls run; where they need a GPU, tensors pretend to be on one.
"""

from __future__ import annotations

import pytest
from support.cases import PolicyRun
from support.jobs_offload import NUM_UPDATES
from support.models import make_tiny_model
from support.ranks import run_ranks

BF16 = "model.dtype=bf16"
OVERLAP = ("policy.overlap_grad_reduce=true", "policy.overlap_param_gather=true")
RUNS = {
    "dp2": ("dp2", ()),
    "dp2_unsharded": ("dp2", ("optimizer.distributed=false",)),
    "dp2_bf16": ("dp2", (BF16,)),
    "dp2_bf16_overlapped": ("dp2", (BF16, *OVERLAP)),
    "dp2_bf16_unsharded": ("dp2", (BF16, "optimizer.distributed=false")),
    "dp2_bf16_cpu_offload": ("dp2", (BF16, "optimizer.cpu_offload=0.5")),
    "pp2_vpp2_bf16": ("pp2_vpp2", (BF16,)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("offload") / "model"
    return str(make_tiny_model(folder, tied=True, layers=4, heads=4, kv_heads=2, hidden=64, ffn=64))


def runs(model: str, names: list[str]) -> list[PolicyRun]:
    more = {"model": model, "num_updates": NUM_UPDATES}
    return [PolicyRun(name=n, layout=RUNS[n][0], overrides=RUNS[n][1], **more) for n in names]


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("trained"))
    return run_ranks("support.jobs_offload:train", 2, runs=runs(model, [*RUNS]), folder=folder)


@pytest.mark.parametrize("name", RUNS)
def test_offloading_between_updates_changes_no_bit(trained, name):
    for rank in range(2):
        of_run = trained[rank][name]
        undisturbed = of_run["undisturbed"]["digests"]
        assert of_run["offloaded"]["digests"] == undisturbed
        assert len({state for state, _, _ in undisturbed}) == NUM_UPDATES  # the digest does see an update
        assert of_run["pretending"]["digests"] == undisturbed


@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_dropped_and_the_optimizers_state_is_on_the_host(trained, name):
    for rank in range(2):
        of_run = trained[rank][name]
        assert {gradients for gradients, _ in of_run["offloaded"]["away"]} == {0}
        if "pretending" in of_run:
            # with optimizer.cpu_offload Megatron could not bring it back to where it was
            assert all(
                (on_host > 0) != ("cpu_offload" in name) for _, on_host in of_run["pretending"]["away"]
            )


@pytest.mark.slow
def test_a_checkpoint_can_be_saved_meanwhile(model, tmp_path):
    names = ["dp2_bf16", "dp2_bf16_unsharded", "pp2_vpp2_bf16"]
    for report in run_ranks("support.jobs_offload:save", 2, runs=runs(model, names), folder=str(tmp_path)):
        for name in names:
            found = report[name]
            assert found["on_host"] > 0
            assert found["before"] == found["away"] == found["saved"]
