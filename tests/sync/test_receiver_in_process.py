"""Weight updates of vLLM's models in this process: equal in every bit to what vLLM's own loader makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.push import checkpoint
from support.receiving import computed, differing, make_two, worker

from megatron_dapo.sync.sink_checks import problems

FAMILIES = [("qwen2", True), ("qwen2", False), ("qwen3_moe", False)]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: f"{family[0]}-tied{int(family[1])}")
def models(request, tmp_path_factory) -> list[Path]:
    return make_two(tmp_path_factory.mktemp("models"), *request.param)


@pytest.mark.parametrize(("layout", "rank"), [({}, 0), ({"tp": 2}, 0), ({"tp": 2}, 1), ({"pp": 2}, 1)])
def test_updates_equal_a_fresh_load(models, tmp_path, layout, rank):
    first, second = models
    with worker(second, tmp_path / "fresh", rank, **layout) as fresh:
        expected, digests = computed(fresh.model), fresh.as_loaded("load")
    with worker(first, tmp_path / "updated", rank, **layout) as updated:
        before = computed(updated.model)
        assert all(updated.as_loaded("load")[name] != digest for name, digest in digests.items())
        tensors = {folder: checkpoint(folder) for folder in models}
        plan = updated.plan(tensors[first])
        whole = updated.plan(tensors[first], chunk_bytes=1 << 30)
        assert len(plan.rounds) > 2 and len(whole.rounds) == 1

        updated.push(plan, tensors[second], 1)
        assert updated.as_loaded("v1") == digests
        assert differing(computed(updated.model), expected) == set()
        updated.push(plan, tensors[first], 2, verify=False)
        assert updated.as_loaded("v2") == updated.as_loaded("load")
        assert differing(computed(updated.model), before) == set()
        updated.push(whole, tensors[second], 3)
        assert updated.as_loaded("v3") == digests
        assert differing(computed(updated.model), expected) == set()


def test_tensors_that_a_loader_computes_with_go_through_that_loader(tmp_path, monkeypatch):
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.model_loader.weight_utils import composed_weight_loader, default_weight_loader

    build = RMSNorm.__init__

    def build_negative(self, *args, **options) -> None:
        build(self, *args, **options)
        self.weight.weight_loader = composed_weight_loader(default_weight_loader, torch.neg)

    monkeypatch.setattr(RMSNorm, "__init__", build_negative)
    folders = make_two(tmp_path, "qwen2", tied=True)
    first, second = (checkpoint(folder) for folder in folders)
    with worker(folders[0], tmp_path / "digests") as updated:
        before = computed(updated.model)
        assert torch.equal(before["model.norm.weight"], -first["model.norm.weight"])
        plan = updated.plan(first)
        assert len(plan.workers[0].table.whole) == 5
        updated.push(plan, second, 1)
        assert torch.equal(computed(updated.model)["model.norm.weight"], -second["model.norm.weight"])

        updated.receiver.start_weight_update()
        updated.send(plan, first, 2, names=first.keys() - {"model.norm.weight"})
        with pytest.raises(RuntimeError, match=r"incomplete: model\.norm\.weight got 0 of 128 elements"):
            updated.receiver.finish_weight_update()
        updated.send(plan, first, 2, names={"model.norm.weight"})
        updated.receiver.finish_weight_update()
        assert differing(computed(updated.model), before) == set()


def test_vllms_own_reload_works_after_an_update_by_table(tmp_path):
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    folders = make_two(tmp_path, "qwen2", tied=False)  # with biases, which a reload does not replace
    first, second = (checkpoint(folder) for folder in folders)
    with worker(folders[0], tmp_path / "digests") as updated:
        before = computed(updated.model)
        updated.push(updated.plan(first), second, 1)
        initialize_layerwise_reload(updated.model)
        updated.model.load_weights(iter(first.items()))
        finalize_layerwise_reload(updated.model, updated.vllm_config.model_config)
        assert differing(computed(updated.model), before) == set()


def test_a_head_that_vllm_ties_after_loading_follows_its_embedding(tmp_path):
    """The configuration ties the head, and the checkpoint has a copy of it all the same."""
    folders = make_two(tmp_path, "qwen2", tied=True)
    tensors = [checkpoint(folder) for folder in folders]
    for folder, plain in zip(folders, tensors, strict=True):
        [file] = folder.glob("*.safetensors")
        head = {"lm_head.weight": plain["model.embed_tokens.weight"].clone()}
        save_file(plain | head, file, metadata={"format": "pt"})
    with worker(folders[1], tmp_path / "fresh") as fresh:
        expected = computed(fresh.model)
    with worker(folders[0], tmp_path / "updated") as updated:
        table = updated.sink_table(tensors[0])
        assert problems([table], {name: tuple(tensor.shape) for name, tensor in tensors[0].items()}) == []
        updated.push(updated.plan(tensors[0]), tensors[1], 1)
        assert differing(computed(updated.model), expected) == set()
