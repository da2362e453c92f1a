# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""On the real engine, outputs from slots equal stock's bit for bit, and offload really
happens."""

import gc

import pytest
from prometheus_client import REGISTRY
from vllm.compilation.counter import compilation_counter

from tests.support.engine import (
    Run,
    answers,
    assert_offloaded,
    moe_layers,
    run,
    sampling,
    start,
)

EXPERTS, TOP_K = 32, 4


@pytest.fixture(scope="module")
def stock(checkpoint) -> Run:
    return run(checkpoint)


def test_without_the_option_layers_are_stock(stock):
    """No slots, no store, all experts in the parameters."""
    assert len(stock.layers) == 4
    for layer in stock.layers:
        assert (
            getattr(layer, "slot_manager", None) is None
            and layer.w13_weight.shape[0] == EXPERTS
        )


@pytest.mark.parametrize(
    ("slots", "policy"),
    [
        *((slots, "lru") for slots in (TOP_K, 8, 16, EXPERTS - 1)),
        (8, "lfu"),
        *(
            pytest.param(*row, marks=pytest.mark.exhaustive)
            for row in [
                (5, "lru"),
                *((slots, "lfu") for slots in (TOP_K, 5, 16, EXPERTS - 1)),
            ]
        ),
    ],
)
def test_outputs_equal_stock(checkpoint, stock, slots, policy):
    """Token ids and logprobs are stock's for every N, overflow steps included."""
    slotted = run(checkpoint, slots=slots, policy=policy)
    assert len(slotted.layers) == 4
    assert_offloaded(slotted.layers, slots, EXPERTS)
    if slots <= 16:  # the long prompt needs more experts than that
        assert slotted.total("overflow_steps") > 0
        assert slotted.total("staged") > 0 and slotted.total("staged_steps") > 0
    assert slotted.outputs == stock.outputs


def test_the_engine_gives_out_what_its_layers_counted(checkpoint):
    """`collective_rpc("expert_slot_counters")` answers with each layer's own totals."""
    slotted = run(checkpoint, slots=8)
    assert slotted.counters == {
        layer.layer_name: layer.slot_manager.counters.as_dict()
        for layer in slotted.layers
    }
    # Such an engine has no statistics (disable_log_stats), but a scrape finds these.
    scraped = [
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "vllm:moe_prefetch_loads_total"
    ]
    assert sum(scraped) == slotted.total("loads") > 0


def compiled_models() -> int:
    """Models that ran compiled in this process, freshly or out of vLLM's compile
    cache."""
    return (
        compilation_counter.num_aot_compiles
        + compilation_counter.num_aot_artifacts_loaded
    )


def test_the_counters_are_among_the_metrics_of_llm(checkpoint):
    """`LLM.get_metrics()` has them, of this engine alone, though others ran in this
    process."""
    llm = start(checkpoint, slots=8, disable_log_stats=False)
    llm.generate(["a"], sampling(4), use_tqdm=False)
    metrics = {}
    for metric in llm.get_metrics():
        metrics[metric.name] = metrics.get(metric.name, 0) + getattr(metric, "value", 0)
    layers = moe_layers(llm)
    assert metrics["vllm:moe_prefetch_slots"] == 8 * len(layers)
    loads = sum(layer.slot_manager.counters.loads for layer in layers)
    assert metrics["vllm:moe_prefetch_loads"] == loads > 0
    del llm
    gc.collect()


def test_compiled_outputs_equal_stock_compiled(checkpoint):
    """With torch.compile the outputs are those of stock with torch.compile."""
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 3}}
    reference = run(checkpoint, **compiled)
    before = compiled_models()
    slotted = run(checkpoint, slots=8, **compiled)
    assert compiled_models() == before + 1
    assert_offloaded(slotted.layers, 8, EXPERTS)
    assert slotted.outputs == reference.outputs


def test_below_top_k_is_raised(checkpoint, stock):
    """A row must find all of its experts at once, so N is at least top-k."""
    slotted = run(checkpoint, slots=1)
    assert_offloaded(slotted.layers, TOP_K, EXPERTS)
    assert slotted.outputs == stock.outputs


@pytest.mark.parametrize("slots", [EXPERTS, EXPERTS + 1])
def test_all_experts_resident_is_stock(checkpoint, stock, slots):
    """N at or above E keeps stock's layers as they are."""
    slotted = run(checkpoint, slots=slots)
    assert slotted.counters == {}
    for layer in slotted.layers:
        assert layer.slot_manager is None and layer.w13_weight.shape[0] == EXPERTS
    assert slotted.outputs == stock.outputs


def converse(llm):
    """Prefix caching, chunked prefill, requests that join and leave while others
    decode."""
    engine = llm.llm_engine
    shared = "Each Contributor hereby grants to You a perpetual copyright license " * 10
    arrivals = {
        0: [("long", shared + "first", 12)],
        2: [("short", "Licensor", 20), ("gone", "to be cancelled", 40)],
        6: [("same prefix", shared + "second", 8)],
        9: [("late", "a b c", 10)],
    }
    finished = {}
    step = 0
    while step <= max(arrivals) or engine.has_unfinished_requests():
        for name, prompt, tokens in arrivals.get(step, []):
            engine.add_request(name, prompt, sampling(tokens))
        if step == 8:
            engine.abort_request(["gone"], internal=False)
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        step += 1
    names = sorted(finished)
    return names, answers([finished[name] for name in names])


def test_outputs_equal_stock_while_the_batch_changes(checkpoint):
    """Requests joining, leaving and sharing a prefix get stock's outputs."""
    results = []
    for options in ({}, {"slots": 6}, {"slots": 12, "policy": "lfu"}):
        llm = start(checkpoint, enable_prefix_caching=True, **options)
        results.append(converse(llm))
        if options:
            assert_offloaded(moe_layers(llm), options["slots"], EXPERTS)
        del llm
        gc.collect()
    assert set(results[0][0]) >= {"long", "short", "same prefix", "late"}
    assert results[1:] == results[:1] * 2


def test_profiling_leaves_tables_and_counters_as_they_were(checkpoint):
    """Before the first request every slot holds the expert of its own number; nothing
    counted."""
    llm = start(checkpoint, slots=8)
    for layer in moe_layers(llm):
        assert layer.slot_manager.residency() == list(range(8))
        counters = layer.slot_manager.counters
        assert counters.steps == counters.needed == counters.loads == 0
        assert layer.slot_manager.history.step == 0
    del llm
    gc.collect()
