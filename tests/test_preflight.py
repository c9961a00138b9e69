"""What preflight refuses before any process starts: what a configuration asks of this model, these files and
this machine. Fields that do not go together are in test_preflight_settings.py.
"""

from __future__ import annotations

import json
import re
import resource
import socket
from pathlib import Path

import pytest
from support.models import make_tiny_model
from support.samples import make_spec

from megatron_dapo import preflight
from megatron_dapo.config import RunConfig
from megatron_dapo.errors import UserError
from megatron_dapo.policy import rules
from megatron_dapo.preflight import check, check_training

# --- of this model on this machine ------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    """Overrides of a run that passes: a model of 4 layers, 4 heads and 2 key/value heads, and one problem."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    make_tiny_model(folder / "model", layers=4)
    return [
        f"model.path={folder / 'model'}",
        f"data.path={folder / 'data.jsonl'}",
        "model.dtype=fp32",
        "run.device=cpu",
        "data.max_prompt_tokens=100",
        "rollout.max_tokens=100",
        "batch.max_tokens=200",
    ]


# What the policy refuses too: overrides, words.
OF_THE_POLICY = [
    (
        ["policy.recompute=full", "policy.recompute_layers=3"],
        "policy.recompute_layers=3 does not divide the 4 layers of a pipeline stage's chunk; "
        "use one of [1, 2, 4]",
    ),
    (
        [
            "policy.recompute=full",
            "policy.recompute_layers=2",
            "layout.pipeline_parallel=2",
            "layout.virtual_pipeline_parallel=2",
        ],
        "policy.recompute_layers=2 does not divide the 1 layers",
    ),
    (["policy.layers=te"], "policy.layers=te needs a GPU and run.device=cpu has none; drop it"),
    (
        ["policy.recompute_modules=[mlp,moe]"],
        "policy.recompute_modules=['mlp', 'moe']: moe and moe_act need a model with experts; take them out",
    ),
    (["policy.recompute_modules=[moe_act]"], "policy.recompute_modules=['moe_act'] needs a GPU"),
    (
        ["layout.pipeline_parallel=3"],
        "layout.pipeline_parallel=3 (x virtual 1) does not divide the model's 4 layers; "
        "use one of [1, 2, 4] stages",
    ),
    (
        ["layout.tensor_parallel=4"],
        "layout.tensor_parallel=4 does not divide the model's 2 key/value heads; use one of [1, 2]",
    ),
    (
        ["layout.expert_parallel=2", "layout.data_parallel=2"],
        "layout.expert_parallel=2 and expert_tensor_parallel=1 need a model with experts; set both to 1",
    ),
    (
        ["layout.tensor_parallel=2", "policy.fp8.recipe=blockwise"],
        "policy.fp8.recipe=blockwise needs multiples of 128, but the model's size of all heads 128 over "
        "layout.tensor_parallel=2 is 64 on each rank",
    ),
    (
        ["policy.fp8.recipe=tensorwise", "policy.fp8.param_gather=true", "model.dtype=bf16"],
        "which the CPU's emulation does not model",
    ),
    (["optimizer.decay=cosine"], "optimizer.decay=cosine needs optimizer.decay_updates"),
    (
        ["objective.kind=dpo", "batch.updates_per_step=2"],
        "batch.updates_per_step=2 does not go with objective.kind=dpo",
    ),
    (["layout.sequence_parallel=true"], "layout.sequence_parallel=true needs layout.tensor_parallel > 1"),
]


@pytest.mark.parametrize(("overrides", "message"), OF_THE_POLICY)
def test_preflight_and_policy_refuse_in_the_same_words(run, overrides, message):
    """`rules.check` is what Policy.__init__ calls first."""
    config = RunConfig.load(None, [*run, *overrides])
    said = []
    spec = make_spec(
        num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=192, vocab_size=104
    )
    for refuse in (
        lambda: check(config),
        lambda: check_training(config),
        lambda: rules.check(config, spec, on_cpu=True),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            refuse()
        said.append(str(caught.value))
    assert said[0] == said[1] == said[2]


def test_what_is_only_missing_on_the_cpu_is_allowed_on_a_gpu():
    spec = make_spec(num_layers=2, num_heads=2, num_kv_heads=2, hidden_size=2, ffn_size=2, num_experts=4)
    overrides = ["layout.tensor_parallel=2", "layout.sequence_parallel=true"]
    config = RunConfig.load(None, ["model.path=m", "policy.recompute_modules=[moe_act]", *overrides])
    rules.check(config, spec, on_cpu=False)
    with pytest.raises(UserError, match="needs a GPU"):
        rules.check(config, spec, on_cpu=True)


def test_a_run_that_can_work_passes_with_what_was_resolved(run):
    facts = check(
        RunConfig.load(
            None, [*run, "policy.recompute=full", "policy.recompute_layers=2", "layout.pipeline_parallel=2"]
        )
    )
    assert facts.folder == Path(facts.config.model.path) and facts.on_cpu
    assert (facts.spec.num_layers, facts.spec.head_dim, facts.layout.world_size) == (4, 32, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.max_tokens=413", "batch.max_tokens=600"], "= 513 exceeds the model's 512 positions"),
        (
            ["rollout.tensor_parallel=4"],
            "rollout.tensor_parallel=4 does not divide the model's 4 heads (2 key/value",
        ),
        (
            ["rollout.python=no/such/python"],
            "rollout.python=no/such/python is no program that can be run here",
        ),
        (["data.path=null"], "data.path is required: a .jsonl or .parquet file"),
        (["data.path=no/such.jsonl"], "data.path=no/such.jsonl does not exist"),
        (["evaluation.path=no/such.jsonl"], "evaluation.path=no/such.jsonl does not exist"),
        (
            ["reward.verifier=no_such_module:f"],
            "reward.verifier='no_such_module:f': importing no_such_module failed",
        ),
        (
            ["rollout.base_port=65535", "rollout.engines=2"],
            "rollout.base_port=65535: port 65536 for engine 1",
        ),
    ],
)
def test_what_only_a_whole_run_needs(run, overrides, message):
    config = RunConfig.load(None, [*run, *overrides])
    check_training(config)  # saved rollouts can be trained on all the same
    with pytest.raises(UserError, match=re.escape(message)):
        check(config)


def test_a_port_in_use_is_refused(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"rollout.base_port={port}: port {port} for engine 0 cannot be used"
        ):
            check(RunConfig.load(None, [*run, f"rollout.base_port={port}"]))


DAPO_TEMPLATE = 'Solve the problem step by step. Say "Answer: $Answer".\n\n{prompt}\n\nRemember to end.'


def test_engines_in_fp8_need_a_gpu(run):
    fp8 = ["rollout.quantization=fp8_block", "model.dtype=bf16"]
    with pytest.raises(UserError, match="rollout.quantization=fp8_block needs engines on a GPU"):
        check(RunConfig.load(None, [*run, *fp8]))
    with pytest.raises(UserError, match="needs multiples of 128, but the model's size of all key/value"):
        check(RunConfig.load(None, [*run, *fp8, "run.device=cuda"]), planned=True)


@pytest.mark.parametrize(
    ("template", "prompt", "sentence"),
    [
        (DAPO_TEMPLATE, "Solve  the problem step\nby step. 1+1=", "Solve the problem step by step."),
        (DAPO_TEMPLATE, "1+1=\n\nRemember to end.", "Remember to end."),
        (DAPO_TEMPLATE, "How would you solve the problem step by step?", None),
        (DAPO_TEMPLATE, 'He said "Answer: 5".', None),
        ("{prompt} =", "1+1 =", None),
    ],
)
def test_a_template_that_repeats_the_rows_is_warned_of(run, tmp_path, caplog, template, prompt, sentence):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": prompt, "answer": "2"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.path={tmp_path}/data.jsonl", f"data.template={json.dumps(template)}"]
    check(RunConfig.load(None, [*run, *data]))
    assert len(caplog.records) == (sentence is not None)
    if sentence:
        assert f"data.template adds to every prompt what data.path={tmp_path}" in caplog.text
        assert repr(sentence) in caplog.text


def test_a_gpu_is_needed_to_run_and_not_to_plan(run):
    config = RunConfig.load(None, [*run, "run.device=cuda", "policy.recompute_modules=[mlp]"])
    with pytest.raises(UserError, match="run.device=cuda but torch sees no GPU"):
        check(config)
    assert not check(config, planned=True).on_cpu
    elsewhere = ["run.device=auto", "rollout.python=/of/another/machine"]
    assert check(RunConfig.load(None, [*run, *elsewhere]), planned=True).on_cpu


def test_a_model_folder_that_is_none_is_refused(run, tmp_path):
    for path, message in (
        (tmp_path, "has no config.json"),
        (tmp_path / "none", "is neither a folder nor a hub name"),
    ):
        with pytest.raises(UserError, match=message):
            check(RunConfig.load(None, [*run, f"model.path={path}"]))


# --- engines ----------------------------------------------------------------------------


def test_head_sizes_that_vllm_has_no_cpu_kernel_for_are_refused(run, tmp_path):
    folder = make_tiny_model(tmp_path / "model", layers=4, hidden=48)  # 4 heads of 12
    with pytest.raises(
        UserError,
        match=r"head_dim=12 is not supported by vLLM's CPU attention, which has 32, 64, 80, .*; use another",
    ):
        check(RunConfig.load(None, [*run, f"model.path={folder}"]))
    check_training(RunConfig.load(None, [*run, f"model.path={folder}"]))


def test_the_head_sizes_are_those_of_the_installed_vllm():
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackend
    assert tuple(backend.get_supported_head_sizes()) == preflight.VLLM_CPU_HEAD_SIZES


def test_more_requests_than_open_files_are_refused(run, monkeypatch):
    config = RunConfig.load(None, [*run, "rollout.engines=4", "rollout.max_concurrency=500"])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 2048))
    with pytest.raises(
        UserError, match=r"rollout.max_concurrency need up to 2272 open files, the limit is 2048"
    ):
        check(config)  # 256 of its own, and for each engine 500 requests and 4 connections more
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    check(config)  # the service raises the soft limit
    for limit in (100_000, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        check(config)


# --- every rule -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [*rules.SETTINGS, *rules.MODEL, *preflight.SETTING_RULES, *preflight.RUN_RULES, preflight.gpus_have_room],
    ids=lambda f: f.__name__,
)
def test_every_rule_says_what_it_is_for(rule):
    assert rule.__doc__ and rule.__doc__.strip().endswith(".")


@pytest.mark.parametrize("module", [rules, preflight])
def test_no_rule_is_left_out_of_its_list(module):
    """A rule is a function of this file that raises; whatever else it defines is named here."""
    listed = {
        rule.__name__
        for name in ("SETTINGS", "MODEL", "SETTING_RULES", "RUN_RULES")
        for rule in getattr(module, name, ())
    }
    defined = {
        name
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
    }
    assert (
        defined - listed
        == {
            rules: {"check", "check_settings", "check_model"},
            preflight: {"check", "check_training", "check_settings", "on_cpu", "num_hosts", "Facts"}
            | {"gpus_have_room"},  # of a deep check only
        }[module]
    )
