# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What cannot work is refused at start-up, each by name, with the reason and the way
out."""

import re
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.support.engine import start
from tests.support.sample import make_checkpoint, make_with_mtp
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    CONFLICTS,
    refuse_draft_slots,
)
from vllm.plugins.moe_gpu_prefetch import register
from vllm.plugins.moe_gpu_prefetch import start as start_up

REFUSED = {
    "--enable-eplb": ["--enable-eplb"],
    "--enable-elastic-ep": ["--enable-elastic-ep"],
    "--enable-expert-parallel on the CPU": ["--enable-expert-parallel"],
    "--data-parallel-size above 1": ["--data-parallel-size", "2"],
    "--prefill-context-parallel-size above 1": ["--prefill-context-parallel-size", "2"],
    "--enable-dbo": ["--enable-dbo"],
    "--enable-lora": ["--enable-lora"],
    "--enable-sleep-mode": ["--enable-sleep-mode"],
    "decode_backend in --additional-config": [
        "--additional-config",
        '{"decode_backend": "latency_specialized"}',
    ],
    "--weight-transfer-config": ["--weight-transfer-config", '{"backend": "nccl"}'],
    "--load-format tensorizer": ["--load-format", "tensorizer"],
    "--load-format modelexpress": ["--load-format", "modelexpress"],
    "--load-format sharded_state": ["--load-format", "sharded_state"],
    "--load-format runai_streamer_sharded": ["--load-format", "runai_streamer_sharded"],
    "--load-format fastsafetensors": ["--load-format", "fastsafetensors"],
    "--load-format instanttensor": ["--load-format", "instanttensor"],
    "--load-format ipc_cache": ["--load-format", "ipc_cache"],
    "--load-format IPC_CACHE": ["--load-format", "IPC_CACHE"],
    "--load-format auto (or its draft's)": [
        "--speculative-config",
        '{"method": "ngram", "draft_load_config": {"load_format": "tensorizer"}}',
    ],
    "--cpu-offload-gb on the experts": ["--cpu-offload-gb", "1"],
    "--offload-group-size on the experts": ["--offload-group-size", "2"],
}


@pytest.mark.parametrize(("name", "arguments"), REFUSED.items(), ids=REFUSED)
def test_each_is_refused_by_name(parse, capsys, name, arguments):
    """As an error of the command line, status 2; without the flag stock has its way."""
    with pytest.raises(SystemExit) as stop:
        parse("--moe-gpu-prefetch", "8", *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"vllm: error: --moe-gpu-prefetch cannot be combined with {name}"
    )
    assert any(f": {c.reason}. {c.way_out}." in error for c in CONFLICTS)
    parse(*arguments)


def test_every_conflict_has_its_test(parse):
    """None of the table is untested: each is the first that some arguments above
    meet."""
    met = []
    for arguments in REFUSED.values():
        engine_args = parse(*arguments)
        met.append(next(c for c in CONFLICTS if c.present(engine_args)))
    assert set(met) == set(CONFLICTS)


@pytest.mark.parametrize(
    "conflict",
    [{"enable_eplb": True}, {"data_parallel_size": 2}, {"cpu_offload_gb": 1}],
)
def test_scripts_are_refused_alike(checkpoint, conflict):
    """`LLM(...)` goes past the command line; the same check answers with an
    exception."""
    register()
    arguments = EngineArgs(
        str(checkpoint), additional_config={"moe_gpu_prefetch": 8}, **conflict
    )
    with pytest.raises(MoEPrefetchError, match="cannot be combined"):
        arguments.create_engine_config()


@pytest.mark.parametrize(
    "part", ["routed_experts", "mlp", "block_sparse_moe", "layers", "model"]
)
def test_offload_that_may_hit_experts_is_refused(parse, capsys, part):
    """Whatever a model calls what its experts are in."""
    with pytest.raises(SystemExit):
        parse(
            "--moe-gpu-prefetch",
            "8",
            "--cpu-offload-gb",
            "1",
            "--cpu-offload-params",
            part,
        )
    assert (
        "Name other weights with --cpu-offload-params (attention, attn"
        in capsys.readouterr().err
    )


def with_draft_slots(checkpoint, speculation):
    """The request, and a configuration that vLLM makes of this way of speculation."""
    asked = MoEPrefetchConfig.validated(8, {"draft_slots": 4})
    arguments = EngineArgs(str(checkpoint), speculative_config=speculation)
    return asked, arguments.create_engine_config()


@pytest.mark.parametrize(
    ("speculation", "reason"),
    [
        (
            None,
            "draft_slots 4 was given without a draft. Add --speculative-config, or "
            "drop it.",
        ),
        ({"method": "ngram"}, "decoding by ngram has no draft model. Drop it."),
        ({"model": "[ngram]"}, "decoding by ngram has no draft model. Drop it."),
        (
            {"model": "acme.Proposer"},
            "decoding by custom_class has no draft model. Drop it.",
        ),
    ],
)
def test_slots_of_a_draft_that_is_not_there_are_refused(
    checkpoint, speculation, reason
):
    """No option without effect: where nothing speculates, and where no model does."""
    if speculation:
        speculation["num_speculative_tokens"] = 2
    with pytest.raises(MoEPrefetchError, match=re.escape(reason)):
        refuse_draft_slots(*with_draft_slots(checkpoint, speculation))


def test_slots_of_a_draft_that_is_there_are_not(checkpoint, tmp_path):
    """A model of its own, or the model's MTP layers."""
    draft = make_checkpoint(tmp_path / "draft", experts=16, top_k=2, layers=1)
    own = {"model": str(draft), "num_speculative_tokens": 2}
    mtp = {"method": "mtp", "num_speculative_tokens": 1}
    for model, speculation in (
        (checkpoint, own),
        (make_with_mtp(tmp_path / "mtp"), mtp),
    ):
        asked, vllm_config = with_draft_slots(model, speculation)
        refuse_draft_slots(asked, vllm_config)
        draft_config = vllm_config.speculative_config.draft_model_config
        assert asked.slots_of(draft=True) == 4 and draft_config.runner_type == "draft"


def test_a_method_whose_draft_vllm_leaves_out_has_none():
    """`suffix`, which needs a package that is not here."""
    speculation = SimpleNamespace(method="suffix", draft_model_config=None)
    asked = MoEPrefetchConfig.validated(8, {"draft_slots": 4})
    with pytest.raises(MoEPrefetchError, match="decoding by suffix has no draft model"):
        refuse_draft_slots(asked, SimpleNamespace(speculative_config=speculation))


def test_draft_slots_are_refused_before_an_engine_starts(checkpoint, monkeypatch):
    """Before the capacity plan is made."""
    monkeypatch.setattr(start_up, "settle", lambda _: pytest.fail("planned"))
    with pytest.raises(MoEPrefetchError, match="has no draft model"):
        start(
            checkpoint,
            slots=8,
            draft_slots=4,
            speculative_config={"method": "ngram", "num_speculative_tokens": 2},
        )


@pytest.mark.parametrize("attribute", ["bf16_decode", "specialized_decode_config"])
def test_decode_kernels_of_a_models_own_are_refused_by_name(
    checkpoint, monkeypatch, attribute
):
    """They would read the experts' weights by expert id. Said before a weight is read;
    with all experts resident they are stock's."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock

    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, attribute, "its own", raising=False)
    with monkeypatch.context() as patch, pytest.raises(MoEPrefetchError) as error:
        patch.setattr(
            DefaultModelLoader, "load_weights", lambda *_: pytest.fail("weights read")
        )
        start(checkpoint, slots=8)
    assert "cannot serve model.layers.0.mlp (Qwen3MoeSparseMoeBlock)" in str(
        error.value
    )
    assert f"read the experts' weights by expert id ({attribute})." in str(error.value)
    start(checkpoint, slots=32)


def test_a_quantised_model_is_refused_by_its_format(checkpoint, monkeypatch):
    """Experts that are quantised while they are loaded. Said before an engine is
    made."""
    from vllm.v1.engine.core import EngineCore

    monkeypatch.setattr(
        EngineCore, "__init__", lambda *_, **__: pytest.fail("an engine is made")
    )
    with pytest.raises(MoEPrefetchError, match="Quantise the checkpoint offline"):
        start(checkpoint, slots=8, quantization="fp8")
