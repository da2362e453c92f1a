# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer asks the load that builds it for its slots. Outside such a load it is
stock's."""

from types import SimpleNamespace

import pytest
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm.model_executor.layers.fused_moe.expert_slots import layer
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
    clamp,
)
from vllm.model_executor.layers.fused_moe.expert_slots.model_load import (
    ModelLoad,
    current_load,
    loading,
)


class Stock:
    """Takes the place of stock's layer."""

    def __init__(self, moe_config):
        self.moe_config = moe_config


class Slotted(layer.ExpertSlotsMixin, Stock):
    pass


def moe_config(experts=8, top_k=2):
    config = object.__new__(FusedMoEConfig)
    vars(config).update(
        num_experts=experts, num_local_experts=experts, experts_per_token=top_k
    )
    return config


def load_of(slots, draft=False, **options):
    return ModelLoad(MoEPrefetchConfig(slots=slots, **options), draft)


@pytest.fixture
def wanted(monkeypatch):
    """Calls that ask for the platform: a layer with slots does, stock's does not."""

    def stop():
        raise InterruptedError

    monkeypatch.setattr(layer, "current_backend", stop)


def test_the_weight_loader_says_of_itself_what_stocks_does():
    """Llama-4 asks it whether it loads experts."""
    stock = vars(RoutedExperts.weight_loader)
    assert stock and stock.items() <= vars(layer.ExpertSlotsMixin.weight_loader).items()


def test_a_layer_outside_a_load_is_stocks(wanted):
    """The class stays registered after a load. Another model in the process may have
    been asked for without slots."""
    with pytest.raises(InterruptedError), loading(load_of(4)):
        Slotted(moe_config())
    assert Slotted(moe_config()).num_slots is None


@pytest.mark.parametrize(
    ("load", "slots"),
    [
        (load_of(4), 4),
        (load_of(1), 2),
        (load_of(8), None),
        (load_of(9), None),
        (load_of(4, draft_slots=3), 4),
        (load_of(4, draft=True, draft_slots=3), 3),
        (load_of(4, draft=True), 4),
    ],
)
def test_the_slots_of_a_layer(load, slots):
    """At least top-k; none of ours where every expert has one; a draft has its own
    number."""
    assert layer._slots_for(load, moe_config()) == slots


@pytest.mark.parametrize("asked", ["auto", "12GiB"])
def test_a_number_that_was_not_settled_is_refused(asked):
    """Only `EngineArgs` turns it into a number."""
    with pytest.raises(
        MoEPrefetchError,
        match=rf"^--moe-gpu-prefetch {asked} is still 'auto' or a size: .*\.$",
    ):
        layer._slots_for(load_of(asked), moe_config())


def test_a_load_within_a_load():
    """A draft that is loaded meanwhile, also if that fails."""
    model, draft = load_of(4), load_of(4, draft=True)
    with loading(model):
        with pytest.raises(RuntimeError), loading(draft):
            assert current_load() is draft
            raise RuntimeError
        assert current_load() is model
    assert current_load() is None


@pytest.mark.parametrize(
    ("slots", "top_k", "experts", "clamped"),
    [(1, 4, 32, 4), (5, 4, 32, 5), (32, 4, 32, 32), (40, 4, 32, 32), (1, 8, 4, 4)],
)
def test_the_floor_and_the_ceiling(slots, top_k, experts, clamped):
    """A rank of expert parallelism may have fewer experts than the top-k."""
    assert clamp(slots, top_k, experts) == clamped


@pytest.mark.parametrize("additional", [None, {}, {"moe_gpu_prefetch_config": {}}, []])
def test_nothing_was_asked_for(additional):
    assert MoEPrefetchConfig.of(SimpleNamespace(additional_config=additional)) is None
