# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What was resident when an engine ended is resident when the next one begins. Answers
are stock's."""

import gc
import json
import os
from types import SimpleNamespace

import pytest

from tests.support import wait_until
from tests.support.engine import answers, sampling, start
from tests.support.server import serving, stop
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.warm_start import (
    residents_identity,
)


def unsafe(path):
    path.mkdir()
    path.chmod(0o777)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda path: path.write_text(""), "cannot be made: File exists"),
        (lambda path: path.parent.chmod(0o500), "cannot be made: Permission denied"),
        (unsafe, "can be written by others"),
        (lambda path: path.symlink_to(path.parent), "is not a directory"),
    ],
)
def test_a_directory_that_can_never_work_is_refused_before_weights_are_read(
    tmp_path, prepare, reason
):
    """One line with the option, the directory and the way out."""
    from vllm.plugins.moe_gpu_prefetch.loading import load_into_slots

    if os.geteuid() == 0 and "Permission" in reason:
        pytest.skip("root may write everywhere")
    place = tmp_path / "residents"
    prepare(place)
    config = MoEPrefetchConfig(slots=8, warm_start=str(place))
    with pytest.raises(MoEPrefetchError) as refusal:
        load_into_slots(pytest.fail, SimpleNamespace(), None, None, config)
    message = str(refusal.value)
    assert f"--moe-gpu-prefetch-config.warm_start: {place} {reason}" in message
    assert (
        message.endswith("for example ~/.cache/expert-residents.")
        and "\n" not in message
    )
    tmp_path.chmod(0o700)


def test_the_identity_is_of_the_model_and_the_layout_and_of_nothing_else(parse):
    """Another rank or layout has a file of its own; another N, policy or length has
    not."""

    def identity(*arguments, rank=0):
        config = parse("--moe-gpu-prefetch", *arguments).create_engine_config()
        return residents_identity(config, rank)

    one = identity("8")
    policy = ("--moe-gpu-prefetch-config.policy", "lfu", "--max-model-len", "64")
    assert identity("9", *policy) == one == json.loads(json.dumps(one))
    assert identity("8", rank=1) != one
    assert identity("8", "--tensor-parallel-size", "2") != one


def serve(checkpoint, requests, **options):
    """What an engine starts with, how many misses its first request takes, and what it
    answers."""
    llm = start(checkpoint, **options)
    first = llm.collective_rpc("expert_slot_residency")[0]
    found = [answers(llm.generate(requests[:1], sampling(12), use_tqdm=False))]
    misses = sum(
        layer["misses"]
        for layer in llm.collective_rpc("expert_slot_counters")[0].values()
    )
    found += [
        answers(llm.generate([r], sampling(12), use_tqdm=False)) for r in requests[1:]
    ]
    last = llm.collective_rpc("expert_slot_residency")[0]
    del llm
    gc.collect()
    return first, misses, last, found


def test_two_starts(checkpoint, tmp_path):
    """The second engine starts with what the first one ended with, answers what stock
    answers, and its first request, as the first engine's last, misses less."""
    requests = ["a", "Licensor", "a"]
    llm = start(checkpoint)
    stock = [answers(llm.generate([r], sampling(12), use_tqdm=False)) for r in requests]
    del llm
    gc.collect()
    options = {"slots": 16, "warm_start": str(tmp_path / "residents")}
    first, cold, last, found = serve(checkpoint, requests, **options)
    assert all(layer == list(range(16)) for layer in first.values())
    assert found == stock
    (path,) = (tmp_path / "residents").iterdir()
    content = json.loads(path.read_text())
    assert {
        name: sorted(layer["experts"]) for name, layer in content["layers"].items()
    } == {name: sorted(layer) for name, layer in last.items()}
    again, warm, _, found = serve(checkpoint, requests, **options)
    assert again == {name: sorted(layer) for name, layer in last.items()} != first
    assert found == stock
    assert warm < cold, (warm, cold)


def test_a_server_that_is_terminated_leaves_its_residents(checkpoint, tmp_path):
    """vLLM kills engine and workers at once; an idle worker has written before."""
    place = tmp_path / "residents"
    options = [
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--max-num-batched-tokens",
        "256",
    ]
    options += [
        "--moe-gpu-prefetch",
        "8",
        "--moe-gpu-prefetch-config.warm_start",
        str(place),
    ]
    options += ["--tensor-parallel-size", "2"]
    with serving(
        checkpoint, tmp_path / "log", *options, VLLM_CPU_OMP_THREADS_BIND="0|1"
    ) as server:
        completions = server.client().completions
        completions.create(
            model="sample", prompt="Licensor", max_tokens=8, temperature=0
        )
        wait_until(lambda: len(list(place.glob("*.json"))) == 2)
        stop(server)
    ranks = [json.loads(path.read_text()) for path in place.iterdir()]
    assert sorted(rank["identity"]["models"][0]["rank"] for rank in ranks) == [0, 1]
    for rank in ranks:
        assert len(rank["layers"]) == 4
        assert any(
            sorted(layer["experts"]) != list(range(8))
            for layer in rank["layers"].values()
        )
