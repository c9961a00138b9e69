"""`Policy.logprobs` is what transformers says of the same checkpoint."""

from __future__ import annotations

import pytest
import torch
from support import reference
from support.parity_runs import CASES
from support.samples import make_samples


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logprobs_equal_transformers(measured, name, layout):
    model = reference.load(measured.models[name], torch.float32)
    temperature = 0.7 if name == "llama-tied" else 1.0
    expected = []
    for sample in make_samples():
        tokens = sample.tokens.long()
        with torch.no_grad():
            now = (
                (model(tokens[None]).logits[0, :-1] / temperature)
                .log_softmax(-1)
                .gather(1, tokens[1:, None])
                .squeeze(1)
            )
        expected.append(torch.cat([torch.zeros(1), now]) * sample.response_mask)
    found = [ranks[f"{name}@{layout}"] for ranks in measured.by_rank if f"{name}@{layout}" in ranks]
    assert len(found) == (1 if layout == "tp1" else 4) and all(f == found[0] for f in found)
    torch.testing.assert_close(torch.tensor(found[0]), torch.cat(expected), rtol=0, atol=1e-4)
