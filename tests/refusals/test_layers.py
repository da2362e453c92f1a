# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What cannot be served from slots is known from stock's layers on the meta device, in
the words in which the engine would refuse it; a MoE model without a MoE layer is
dense."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import ModelRegistry
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.support.architectures import ARCHITECTURES, COMMON
from tests.support.engine import run
from tests.support.sample import write
from vllm.model_executor.layers.fused_moe.expert_slots import layer
from vllm.model_executor.layers.fused_moe.expert_slots.backend import current_backend
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.ranks import (
    first_rank_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.model_load import ModelLoad
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    kernels_for,
    model_objection,
    top_k_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.models import (
    check_loaded,
    experts_elsewhere,
)
from vllm.plugins.moe_gpu_prefetch import register, report
from vllm.plugins.moe_gpu_prefetch import start as start_up

PARALLEL = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
MOE_OF_16 = SimpleNamespace(is_moe=True, get_num_experts=lambda: 16, model="a model")


def on_meta(
    build: Callable[[], Any], ask: Callable[[Any], Any], model: Any, **options: Any
) -> Any:
    """What `ask` says of what `build` makes on the meta device, in a copy of this
    process: building leaves traces."""
    register()
    vllm_config = EngineArgs(
        str(model), enforce_eager=True, **options
    ).create_engine_config()
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        torch._C.set_num_threads(1)
        vllm_config.compilation_config.static_forward_context.clear()
        with (
            first_rank_of(0, PARALLEL),
            set_default_torch_dtype(torch.bfloat16),
            torch.device("meta"),
            set_current_vllm_config(vllm_config),
        ):
            sender.send(
                ask(build() if build else initialize_model(vllm_config=vllm_config))
            )

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def objected(model: nn.Module) -> str:
    return str(model_objection(model, current_backend()))


def test_stocks_layers_are_objected_to_by_their_format(checkpoint):
    """As the engine objects (`test_a_quantised_model_is_refused_by_its_format`);
    unquantised ones are not."""
    assert on_meta(None, objected, checkpoint) == "None"
    assert on_meta(None, objected, checkpoint, quantization="fp8") == (
        "--moe-gpu-prefetch cannot serve model.layers.0.mlp.experts (RoutedExperts): "
        "quantisation online (Fp8PerTensorOnlineMoEMethod) quantises while it loads: "
        "the experts are on no device before, so they cannot be read into host memory. "
        "Quantise the checkpoint offline, for example with llm-compressor, and serve "
        "that. Serve without --moe-gpu-prefetch."
    )


def test_runners_and_decode_kernels_of_a_models_own_are_objected_to(
    checkpoint, monkeypatch
):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock

    from vllm.model_executor.layers.fused_moe import layer as factory

    with monkeypatch.context() as patch:
        patch.setattr(Qwen3MoeSparseMoeBlock, "bf16_decode", "its own", raising=False)
        answer = on_meta(None, objected, checkpoint)
    assert (
        "model.layers.0.mlp (Qwen3MoeSparseMoeBlock): a model's own decode kernels "
        "read the experts' weights by expert id (bf16_decode). Serve without" in answer
    )
    own = type("KimiMoERunner", (MoERunner,), {"__module__": "vllm.models.kimi_k3"})
    monkeypatch.setattr(factory, "MoERunner", own)
    answer = on_meta(None, objected, checkpoint)
    assert (
        "mlp.experts (KimiMoERunner): it is run by vllm.models.kimi_k3.KimiMoERunner"
        in answer
    )


def test_layers_are_built_with_the_kernels_that_slots_would_have(
    checkpoint, monkeypatch
):
    """The configuration is prepared before stock chooses a method by it; afterwards
    stock's class is as it was."""
    register()
    stock, choose = RoutedExperts.__init__, RoutedExperts._get_quant_method

    @contextmanager
    def choosing(moe_config):
        moe_config.prepared = True
        yield

    def build():
        chosen = []

        def seen(self, prefix, quant_config, moe_config):
            chosen.append(getattr(moe_config, "prepared", False))
            return choose(self, prefix, quant_config, moe_config)

        RoutedExperts._get_quant_method = seen
        from vllm.config import get_current_vllm_config

        with kernels_for(SimpleNamespace(choosing_kernels=choosing)):
            initialize_model(vllm_config=get_current_vllm_config())
        return chosen, RoutedExperts.__init__ is stock

    assert on_meta(build, lambda answer: answer, checkpoint) == ([True] * 4, True)


@pytest.mark.parametrize(
    ("top_k", "refused"), [(-1, True), (0, True), (1, False), (16, False), (17, True)]
)
def test_top_k_lies_between_one_and_the_number_of_experts(top_k, refused):
    """Whether slots are asked for all experts or not, and before a layer is built."""
    moe_config = SimpleNamespace(
        experts_per_token=top_k, num_experts=16, num_local_experts=16
    )
    assert bool(top_k_objection(moe_config)) == refused
    for slots in (8, 99):
        load = ModelLoad(MoEPrefetchConfig.validated(slots, {}))
        if refused:
            with pytest.raises(
                MoEPrefetchError, match=rf"chooses {top_k} of 16 .* in 1 \.\.\. 16"
            ):
                layer._slots_for(load, moe_config)
        else:
            layer._slots_for(load, moe_config)


def test_a_router_without_choices_is_objected_to(checkpoint, tmp_path):
    """`num_experts_per_tok: 0` in config.json."""
    path = tmp_path / "none" / "config.json"
    shutil.copytree(checkpoint, path.parent)
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 0})
    )
    assert "its router chooses 0 of 32 experts" in on_meta(None, objected, path.parent)


@pytest.fixture(scope="module")
def all_dense(tmp_path_factory):
    """A DeepSeek-V2 of 16 experts whose layers are all dense, as people make to
    debug."""
    (v2,) = [a for a in ARCHITECTURES if a.name == "DeepseekV2ForCausalLM"]
    config = transformers.DeepseekV2Config(
        **(
            COMMON
            | v2.config
            | {"first_k_dense_replace": v2.config["num_hidden_layers"]}
        )
    )
    # Imported here: vLLM would look at the class in a process of its own.
    ModelRegistry.register_model(
        v2.name, ModelRegistry.models[v2.name].load_model_cls()
    )
    directory = tmp_path_factory.mktemp("dense") / "deepseek-v2"
    return write(directory, transformers.DeepseekV2ForCausalLM, config)


def test_a_moe_model_of_dense_layers_is_served_as_a_dense_one(
    all_dense, caplog_vllm, monkeypatch
):
    """One line, no slots."""
    monkeypatch.setattr(start_up, "settle", lambda vllm_config: None)
    slotted = run(all_dense, slots=8)
    assert slotted.layers == [] and slotted.counters == {}
    (line,) = [
        m for m in caplog_vllm.messages if "--moe-gpu-prefetch 8 is ignored" in m
    ]
    assert line.endswith("has no MoE layer.")


def minicpm() -> nn.Module:
    """vLLM's own MoE model that has no fused-MoE layer."""
    from vllm.model_executor.models.minicpm import MiniCPMMoE

    return nn.ModuleDict({"mlp": MiniCPMMoE(16, 2, 128, 64)})


def of_parameters(**shapes: tuple[int, ...]) -> nn.Module:
    """A model of parameters of these shapes; `__` stands for a dot."""
    model = nn.Module()
    for name, shape in shapes.items():
        owner = model
        *parts, last = name.split("__")
        for part in parts:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(torch.empty(shape)))
    return model


DENSE = {
    "shared_experts": of_parameters(mlp__shared_experts__up_proj__weight=(64, 128)),
    "as many channels as experts": of_parameters(
        q_norm__weight=(16,), mlp__up__weight=(64, 16)
    ),
}
ELSEWHERE = {
    "stacked": of_parameters(moe__ws=(16, 64, 128)),
    "one by one": of_parameters(mlp__experts__7__w1__weight=(64, 128)),
    "router": of_parameters(mlp__gate__weight=(16, 128)),
}


def test_experts_of_a_models_own_are_found_by_their_parameters(checkpoint):
    """Stacked or one by one, by whatever name; and stock's own such model."""
    for name, model in DENSE.items():
        assert experts_elsewhere(model, MOE_OF_16) is None, name
    for name, model in ELSEWHERE.items():
        assert experts_elsewhere(model, MOE_OF_16) in dict(model.named_parameters()), (
            name
        )
        assert experts_elsewhere(model, SimpleNamespace(is_moe=False)) is None
    found = on_meta(
        minicpm, lambda model: experts_elsewhere(model, MOE_OF_16), checkpoint
    )
    assert found in ("mlp.gate.weight", "mlp.ws", "mlp.w2s")


def test_experts_elsewhere_are_refused_on_every_stage_and_in_a_draft():
    """By the parameters alone, so on each stage and in a draft too."""
    for model in ELSEWHERE.values():
        with pytest.raises(
            MoEPrefetchError, match="do not go through vLLM's fused-MoE layer"
        ):
            check_loaded(model, 8, MOE_OF_16)
    for model in DENSE.values():
        check_loaded(model, 8, MOE_OF_16)


@pytest.mark.parametrize(
    ("runner", "stages", "said"),
    [
        ("generate", 1, "--moe-gpu-prefetch 8 is ignored: a model has no MoE layer."),
        ("generate", 2, "This pipeline stage has no MoE layer, so it gets no slots."),
        ("draft", 2, "The draft a model has no MoE layer, so it gets no slots."),
    ],
)
def test_a_part_without_moe_layers_is_logged(monkeypatch, runner, stages, said):
    lines = []
    log = SimpleNamespace(info=lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(report, "logger", log)
    model_config = SimpleNamespace(model="a model", runner_type=runner)
    asked = SimpleNamespace(slots=8)
    report.report(DENSE["shared_experts"], asked, model_config, stages)
    assert lines == [said]
