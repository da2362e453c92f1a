# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Counters of engines on Ray. What a worker is given is asked of stock's own functions,
which need no ray."""

import os
from types import SimpleNamespace

import pytest
from vllm.platforms import current_platform
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm.v1.executor.ray_env_utils import get_driver_env_vars

from vllm.model_executor.layers.fused_moe.expert_slots import counters
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
    SlotCounters,
)
from vllm.plugins.moe_gpu_prefetch import metrics

EXTRA = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


@pytest.fixture
def expose(monkeypatch, tmp_path):
    """`metrics.expose` with a registry of its own, for an engine with these parallel
    options."""
    for name in [name for name in os.environ if name.startswith("VLLM_RAY")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(EXTRA, "")  # put back after the test
    monkeypatch.delenv(EXTRA)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(metrics, "_exposed", None)
    registry = SimpleNamespace(register=lambda _: None, unregister=lambda _: None)
    monkeypatch.setattr(metrics, "REGISTRY", registry)

    def expose(**options):
        parallel = {
            "distributed_executor_backend": "mp",
            "data_parallel_backend": "mp",
            "nnodes": 1,
            "node_rank": 0,
        }
        metrics.expose(
            tmp_path,
            SimpleNamespace(
                parallel_config=SimpleNamespace(**parallel | options),
                model_config=SimpleNamespace(served_model_name="m"),
            ),
        )

    return expose


@pytest.mark.parametrize(
    "option", ["distributed_executor_backend", "data_parallel_backend"]
)
def test_workers_on_ray_are_told_where_the_counters_lie(expose, monkeypatch, option):
    """By both of stock's ways; without what we set, one of them leaves the variable
    out. What the user has on stock's list stays, and stock knows every variable that we
    set."""
    assert DIRECTORY_VARIABLE not in get_env_vars_to_copy()
    monkeypatch.setenv(EXTRA, "MY_SECRET, MY_FLAG")
    expose(**{option: "ray"})
    assert {DIRECTORY_VARIABLE, "MY_SECRET", "MY_FLAG"} <= get_env_vars_to_copy()
    assert DIRECTORY_VARIABLE in get_driver_env_vars(worker_specific_vars=set())
    expose(**{option: "ray"})
    assert os.environ[EXTRA].count(DIRECTORY_VARIABLE) == 1
    for name in os.environ:
        if name.startswith("VLLM_") and name != EXTRA:
            monkeypatch.delenv(name)
    current_platform.validate_environ(True)


def test_engines_without_ray_leave_its_list_alone(expose):
    expose()
    assert EXTRA not in os.environ


def test_other_nodes_are_said_not_to_be_on_metrics(expose, caplog_vllm):
    """By the node that serves /metrics alone."""
    expose(nnodes=3, node_rank=1)
    assert not caplog_vllm.text
    expose(nnodes=3)
    assert "The ranks of 2 other nodes are missing" in caplog_vllm.text


def test_a_worker_without_the_directory_says_so(monkeypatch, tmp_path, caplog_vllm):
    """Ray started it on another host. It counts all the same."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "elsewhere"))
    for layer in ("a", "b"):
        made = SlotCounters(layer, 5, slots=4, bytes_per_expert=10, experts=8)
        made.add_hits(3)
        assert made.needed == 3
    assert "counters of rank 5 are not on /metrics" in caplog_vllm.text
    assert str(tmp_path / "elsewhere") in caplog_vllm.text
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    caplog_vllm.clear()
    SlotCounters("a", 6, slots=4, bytes_per_expert=10, experts=8)
    assert not caplog_vllm.text and counters.read_counters(tmp_path)
