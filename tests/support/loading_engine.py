# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads a model in a process of its own and prints what that took, one JSON object on a
line; for tests and benchmarks (`EngineProcess`).

Usage: python -m tests.support.loading_engine MODEL [SLOTS [SHARED_STORE]]

Without SLOTS the engine is stock's. The process answers each line `pss` of its input
with its share of memory, and ends with the input.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.engine import PROMPTS, answers, moe_layers, sampling, start


def memory(field: str, file: str = "status") -> int:
    """Bytes, from /proc/self."""
    with open(f"/proc/self/{file}") as lines:
        (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def watched(load_model: Any, measured: dict[str, Any]) -> Any:
    """Wraps a loader's `load_model`: its time, and the peak of memory above what there
    was."""

    @functools.wraps(load_model)
    def load(*args: Any, **kwargs: Any) -> Any:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # the peak starts anew
        before, begin = memory("VmRSS"), time.perf_counter()
        measured["pss_before"] = memory("Pss", "smaps_rollup")
        model = load_model(*args, **kwargs)
        measured["load_s"] = time.perf_counter() - begin
        measured["peak_bytes"] = memory("VmHWM") - before
        return model

    return load


def count_expert_bytes() -> list[int]:
    """Sizes of the tensors that stock's loader copies into the experts, appended as it
    does."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    read: list[int] = []
    stock = RoutedExperts.weight_loader

    def weight_loader(
        self: Any, param: Any, loaded_weight: Any, *args: Any, **kwargs: Any
    ) -> Any:
        read.append(loaded_weight.nbytes)
        return stock(self, param, loaded_weight, *args, **kwargs)

    RoutedExperts.weight_loader = weight_loader
    return read


def main(model: str, slots: str | None = None, shared_store: str | None = None) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm.plugins.moe_gpu_prefetch import register

    register()
    read = count_expert_bytes()
    measured: dict[str, Any] = {}
    BaseModelLoader.load_model = watched(BaseModelLoader.load_model, measured)
    options: dict[str, Any] = {}
    if slots is not None:
        options = {"slots": int(slots), "host_memory_reserve": 1.0}
    if shared_store is not None:
        options["shared_store"] = shared_store
    llm = start(Path(model), max_num_seqs=2, kv_cache_memory_bytes=64 << 20, **options)
    layers = moe_layers(llm)
    measured["outputs"] = answers(
        llm.generate(["The licence grants"], sampling(4), use_tqdm=False)
    )
    if slots is not None:
        measured["slot_bytes"] = sum(
            layer.slot_manager.rows.slot_bytes for layer in layers
        )
        measured["row_bytes"] = layers[0].slot_manager.rows.memory.committed
        measured["store_bytes"] = sum(
            layer.slot_manager.store.num_bytes for layer in layers
        )
    experts = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    whole = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    measured["other_bytes"] = sum(
        p.nbytes for p in whole.parameters() if id(p) not in experts
    )
    measured["expert_bytes_read"] = sum(read)
    print("\n" + json.dumps(measured), flush=True)
    for line in sys.stdin:
        if line.strip() == "pss":
            llm.generate(
                PROMPTS[1], sampling(1), use_tqdm=False
            )  # needs nearly every expert
            found = {
                "pss": memory("Pss", "smaps_rollup"),
                "rss": memory("Rss", "smaps_rollup"),
            }
            print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
