# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a layer's experts are created, and with which kernel: on a GPU's code, with the
meta device in the place of the GPU."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.support.sample import make_checkpoint, make_dbrx, make_gpt_oss, make_with_mtp
from tests.support.stand_in import stand_in
from vllm.model_executor.layers.fused_moe.expert_slots.capacity import footprint
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.ranks import (
    expert_maps_on_the_host,
    first_rank_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.backend import CudaBackend
from vllm.model_executor.layers.fused_moe.expert_slots.layer import ExpertSlotsMixin
from vllm.model_executor.layers.fused_moe.expert_slots.model_load import (
    ModelLoad,
    loading,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    parameters_of_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    pages_of,
)
from vllm.plugins.moe_gpu_prefetch import register, registry


@pytest.fixture(autouse=True)
def registry_as_it_was():
    """Classes of one test are not another's."""
    from vllm.model_executor.custom_op import op_registry_oot

    before = dict(op_registry_oot)
    yield
    op_registry_oot.clear()
    op_registry_oot.update(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def built(
    directory, slots, monkeypatch, ranks: int = 1, memory=None, **options
) -> list[RoutedExperts]:
    """The MoE layers of a model as a GPU's worker constructs them; of several ranks of
    expert parallelism, the first's."""
    register()
    arguments = EngineArgs(
        str(directory),
        additional_config={"moe_gpu_prefetch": slots},
        enforce_eager=True,
        **options,
    )
    vllm_config = arguments.create_engine_config()
    stand_in(monkeypatch)
    if memory is not None:
        monkeypatch.setattr(CudaBackend, "memory", memory)
    parallel = SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=1)
    if ranks > 1:
        vllm_config.parallel_config.tensor_parallel_size = ranks
        vllm_config.parallel_config.enable_expert_parallel = True
    vllm_config.compilation_config.static_forward_context.clear()
    with (
        registry.in_place(),
        loading(ModelLoad(MoEPrefetchConfig.of(vllm_config))),
        first_rank_of(0, parallel),
        expert_maps_on_the_host(),
        set_default_torch_dtype(torch.bfloat16),
        torch.device("meta"),
        set_current_vllm_config(vllm_config),
    ):
        model = initialize_model(vllm_config=vllm_config)
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


MODELS = {
    "qwen3-moe": (make_checkpoint, 32),
    "gpt-oss": (make_gpt_oss, 16),
    "dbrx": (make_dbrx, 16),
    "glm-4-moe": (make_with_mtp, 16),
}


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_created_on_pages_of_the_host(directory, monkeypatch, name):
    """Of stock's class and of a model's own; the rest is on the device, and the kernel
    is the one that slots can serve."""
    make, experts = MODELS[name]
    assert_on_the_host(built(make(directory / name), 5, monkeypatch), name, experts)


def test_so_are_those_of_the_transformers_backend(directory, monkeypatch):
    """In a copy of this process: that backend changes transformers' classes for
    good."""
    checkpoint = make_checkpoint(directory / "qwen3-moe")
    child = os.fork()
    if child == 0:
        try:
            found = built(checkpoint, 5, monkeypatch, model_impl="transformers")
            assert {type(layer).__name__ for layer in found} == {
                "SlottedTransformersRoutedExperts"
            }
            assert_on_the_host(found, "qwen3-moe", 32)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def assert_on_the_host(found, name, experts):
    assert found and all(isinstance(layer, ExpertSlotsMixin) for layer in found)
    for layer in found:
        assert layer.quant_method.experts_cls is TritonExperts
        assert not layer.quant_method.requires_device_loading
        parameters = parameters_of_experts(layer)
        assert {"w13_weight", "w2_weight"} <= set(parameters)
        for parameter in parameters.values():
            assert parameter.device.type == "cpu" and len(parameter) == experts
            assert pages_of(parameter.data) is not None
        bias = layer.e_score_correction_bias
        assert (bias is not None) == (name == "glm-4-moe")
        assert (
            bias is None or bias.device.type == "meta"
        )  # the router's, which stays where it is


def test_no_virtual_memory_is_said_before_a_weight_is_read(directory, monkeypatch):
    """By the first layer that is built, in the words of the memory."""

    def refuse(self, device):
        raise MoEPrefetchError("GPU 0 cannot map memory")

    checkpoint = make_checkpoint(directory / "qwen3-moe")
    with pytest.raises(MoEPrefetchError, match="GPU 0 cannot map memory"):
        built(checkpoint, 5, monkeypatch, memory=refuse)


@pytest.mark.parametrize("slots", [32, 40])
def test_as_many_slots_as_experts_leave_the_layer_to_stock(
    directory, monkeypatch, slots
):
    """Nothing is created on the host, whence stock would not move it."""
    found = built(make_checkpoint(directory / "qwen3-moe"), slots, monkeypatch)
    assert_stock(found, 32)


def assert_stock(found, experts):
    assert found
    for layer in found:
        assert (
            layer.quant_method.experts_cls is TritonExperts
            and layer.load_coverage is None
        )
        assert layer.quant_method.requires_device_loading
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        assert len(layer.w13_weight) == experts


def test_a_rank_is_asked_about_its_own_experts(directory, monkeypatch):
    """Two ranks of expert parallelism hold 16 of 32 experts each: 16 slots hold all of
    them."""
    checkpoint = make_checkpoint(directory / "qwen3-moe")
    with monkeypatch.context() as patch:
        assert_stock(built(checkpoint, 16, patch, ranks=2), 16)
    with monkeypatch.context() as patch:
        found = built(checkpoint, 15, patch, ranks=2)
    assert {len(layer.w13_weight) for layer in found} == {16}
    assert {layer.w13_weight.device.type for layer in found} == {"cpu"}


def test_the_plan_counts_a_ranks_own_experts(directory, monkeypatch):
    """Without it `auto` could not be settled under expert parallelism."""
    register()
    vllm_config = EngineArgs(
        str(make_checkpoint(directory / "qwen3-moe")),
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        distributed_executor_backend="mp",
    ).create_engine_config()
    (measured,) = footprint.measure(vllm_config).footprints
    assert [layer.experts for layer in measured.layers] == [16] * 4


def test_another_kernel_is_refused_by_name(directory, monkeypatch):
    """Before anything is read."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    class FlashInferExperts(TritonExperts):
        pass

    monkeypatch.setattr(
        unquantized, "backend_to_kernel_cls", lambda _: [FlashInferExperts]
    )
    with pytest.raises(
        MoEPrefetchError, match=r"with FlashInferExperts: its tuning makes stock differ"
    ):
        built(make_checkpoint(directory / "qwen3-moe"), 5, monkeypatch)


def test_an_error_of_stocks_is_not_called_a_kernels(directory, monkeypatch):
    """A kernel was rejected and another one chosen; what fails afterwards is said as
    stock says it."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    class FlashInferExperts(TritonExperts):
        pass

    def fail(self, *args, **kwargs):
        raise ValueError("96 is not divisible by 128")

    monkeypatch.setattr(
        unquantized,
        "backend_to_kernel_cls",
        lambda _: [FlashInferExperts, TritonExperts],
    )
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "create_weights", fail)
    with pytest.raises(ValueError, match=r"^96 is not divisible by 128$"):
        built(make_checkpoint(directory / "qwen3-moe"), 5, monkeypatch)


def test_a_method_of_a_models_own_is_refused_by_name(directory, monkeypatch):
    """muse_spark, whose kernels sum over top-k themselves, is not called another
    plugin's."""
    from vllm.model_executor.layers.fused_moe import (
        unquantized_fused_moe_method as methods,
    )

    own = type(
        "MuseSparkUnquantizedFusedMoE",
        (methods.UnquantizedFusedMoEMethod,),
        {"__module__": "vllm.models.muse_spark.nvidia.muse_moe_runner"},
    )
    monkeypatch.setattr(
        RoutedExperts, "_get_quant_method", lambda self, p, q, moe: own(moe)
    )
    with pytest.raises(
        MoEPrefetchError,
        match=r"MuseSparkUnquantizedFusedMoE belongs to a model: it may read weights",
    ):
        built(make_checkpoint(directory / "qwen3-moe"), 5, monkeypatch)


def test_a_layer_class_that_changes_expert_ids_itself_is_refused(
    directory, monkeypatch
):
    """0.33's SubstitutedRoutedExperts, say: there is no proof that slots give the same
    result."""
    from vllm.model_executor.models import qwen3_moe

    namespace = {
        "forward_modular": lambda self, *args: None,
        "__module__": "vllm.substitution",
    }
    own = type("SubstitutedRoutedExperts", (RoutedExperts,), namespace)
    factory = partial(qwen3_moe.FusedMoEFactory, routed_experts_cls=own)
    monkeypatch.setattr(qwen3_moe, "FusedMoEFactory", factory)
    message = r"vllm\.substitution\.SubstitutedRoutedExperts rewrites expert ids"
    with pytest.raises(MoEPrefetchError, match=message):
        built(make_checkpoint(directory / "qwen3-moe"), 5, monkeypatch)


@pytest.mark.parametrize(("slots", "refused"), [(5, True), (32, False)])
def test_a_runner_of_a_models_own_is_refused_by_name(
    directory, monkeypatch, slots, refused
):
    """It may read the experts' weights by its own ids. Without slots it is left
    alone."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from vllm.model_executor.layers.fused_moe import layer as factory

    # The class of the row before may not have been collected, and vLLM's registry goes
    # by name.
    name = f"LatentMoERunner{slots}"
    latent = type(name, (MoERunner,), {"__module__": "vllm.models.kimi_k3"})
    monkeypatch.setattr(factory, "MoERunner", latent)
    checkpoint = make_checkpoint(directory / "qwen3-moe")
    if refused:
        with pytest.raises(
            MoEPrefetchError, match=r"run by vllm\.models\.kimi_k3\.LatentMoERunner5"
        ):
            built(checkpoint, slots, monkeypatch)
    else:
        assert_stock(built(checkpoint, slots, monkeypatch), 32)


def test_a_layer_class_that_is_defined_while_the_model_is_built_is_replaced(
    monkeypatch,
):
    """Nested models import their modules inside constructors."""
    from vllm.model_executor.custom_op import op_registry_oot

    with registry.in_place():
        late = type("LateRoutedExperts", (RoutedExperts,), {"__module__": "vllm.late"})
    after = type("LaterRoutedExperts", (RoutedExperts,), {"__module__": "vllm.late"})
    assert issubclass(op_registry_oot[late.__name__], (ExpertSlotsMixin, late))
    assert after.__name__ not in op_registry_oot
    assert "__init_subclass__" not in vars(RoutedExperts)
