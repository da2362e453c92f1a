# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What vLLM can do with a model, it does from slots, with stock's bits."""

import gc
import shutil

import pytest
import torch
from safetensors.torch import load_file
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.support.engine import (
    PROMPTS,
    answers,
    assert_offloaded,
    moe_layers,
    sampling,
    start,
)
from vllm import SamplingParams
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

SLOTS, EXPERTS = 8, 32


def _exhaustive(value):
    return pytest.param(value, marks=pytest.mark.exhaustive)


def generate(llm, params=None):
    outputs = llm.generate(PROMPTS, params or sampling(16), use_tqdm=False)
    return [
        (
            list(c.token_ids),
            [{t: p.logprob for t, p in s.items()} for s in c.logprobs or []],
        )
        for output in outputs
        for c in output.outputs
    ]


def assert_equal_from_slots(checkpoint, ask=generate, **arguments):
    """`ask(llm)` answers the same on stock and on slots, and the slots were used."""
    llm = start(checkpoint, **arguments)
    stock = ask(llm)
    del llm
    gc.collect()
    llm = start(checkpoint, slots=SLOTS, **arguments)
    assert ask(llm) == stock
    assert_offloaded(moe_layers(llm), SLOTS, EXPERTS)
    del llm
    gc.collect()


@pytest.mark.exhaustive
def test_several_samples_of_one_prompt(checkpoint):
    """`n=3` at temperature 1: the three share a prefill and go their own ways."""
    params = SamplingParams(
        n=3, temperature=1.0, max_tokens=10, logprobs=1, ignore_eos=True
    )
    assert_equal_from_slots(checkpoint, lambda llm: generate(llm, params))


def test_beam_search(checkpoint):
    """Sequences and their cumulated logprobs."""

    def ask(llm):
        prompts = [{"prompt": prompt} for prompt in PROMPTS]
        outputs = llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=6))
        return [
            (s.tokens, s.cum_logprob) for output in outputs for s in output.sequences
        ]

    assert_equal_from_slots(checkpoint, ask)


def test_structured_outputs(checkpoint):
    """A JSON schema and a choice."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
    }

    def ask(llm):
        found = []
        for grammar in ({"choice": ["grant", "Work"]}, {"json": schema}):
            constraint = StructuredOutputsParams(**grammar)
            params = SamplingParams(
                temperature=0, max_tokens=20, logprobs=1, structured_outputs=constraint
            )
            found.append(generate(llm, params))
        return found

    assert_equal_from_slots(checkpoint, ask)


@pytest.mark.exhaustive
def test_logprobs_of_the_prompt(checkpoint):
    """Those of every token of the prompts, chunked prefill included."""

    def ask(llm):
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        return [
            [p and {t: x.logprob for t, x in p.items()} for p in output.prompt_logprobs]
            for output in outputs
        ]

    assert_equal_from_slots(checkpoint, ask)


def test_embeddings(checkpoint):
    """A pooling model with MoE layers."""

    def ask(llm):
        return [o.outputs.embedding for o in llm.embed(PROMPTS, use_tqdm=False)]

    assert_equal_from_slots(checkpoint, ask, runner="pooling", convert="embed")


@pytest.mark.parametrize(
    "arguments",
    [
        _exhaustive({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}),
        _exhaustive({"enable_prefix_caching": False}),
        _exhaustive({"async_scheduling": True}),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_scheduling(checkpoint, arguments):
    """The scheduler's options. (On the CPU platform vLLM turns asynchronous scheduling
    off by itself.)"""
    assert_equal_from_slots(checkpoint, **arguments)


def test_preemption(checkpoint):
    """Requests whose KV cache outgrows its blocks are preempted and recomputed.

    Four blocks can be used. Each of the four requests begins in one and needs a second
    after 128 tokens.
    """

    def ask(llm):
        prompts = [{"prompt_token_ids": [3 + i] * 120} for i in range(4)]
        params = SamplingParams(
            temperature=0, max_tokens=16, logprobs=1, ignore_eos=True
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        preemptions = metrics["vllm:num_preemptions"].value
        assert preemptions > 0
        return answers(outputs), preemptions

    assert_equal_from_slots(
        checkpoint,
        ask,
        num_gpu_blocks_override=5,
        block_size=128,
        max_num_batched_tokens=512,
        disable_log_stats=False,
    )


@pytest.mark.exhaustive
def test_offload_of_other_weights(checkpoint):
    """It is accepted. (On the CPU platform vLLM's offload does nothing.)"""
    assert_equal_from_slots(
        checkpoint, cpu_offload_gb=1, cpu_offload_params={"self_attn"}
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("load_format", ["safetensors", "dummy", "runai_streamer"])
def test_load_formats(checkpoint, load_format):
    """Random weights, and checkpoints read by other loaders."""
    assert_equal_from_slots(checkpoint, load_format=load_format)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("load_format", "name"),
    [
        ("pt", "model.pt"),
        ("npcache", "pytorch_model.bin"),
        ("mistral", "consolidated.safetensors"),
    ],
)
def test_other_files(checkpoint, tmp_path, load_format, name):
    """The same weights under other names and as pickled state dictionaries."""
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other, ignore=shutil.ignore_patterns("*.safetensors"))
    if name.endswith("safetensors"):
        shutil.copy(checkpoint / "model.safetensors", other / name)
    else:  # in float32: numpy, which one of the two goes through, has no bfloat16
        tensors = load_file(checkpoint / "model.safetensors").items()
        torch.save({name: tensor.float() for name, tensor in tensors}, other / name)
    assert_equal_from_slots(other, load_format=load_format)


def test_saving_from_slots_is_refused(checkpoint, tmp_path):
    """The parameters are slots, not the model: saved, they would be no checkpoint of
    it."""
    llm = start(checkpoint, slots=SLOTS)
    with pytest.raises(
        MoEPrefetchError, match=r"8 of 32 experts.*without --moe-gpu-prefetch"
    ):
        llm.collective_rpc("save_sharded_state", args=(str(tmp_path / "saved"),))
    assert not list(tmp_path.glob("saved/*.safetensors"))


def test_calls_that_take_parameters_for_the_model_are_refused(checkpoint):
    """By name, before anything has changed; the engine goes on with stock's bits."""
    llm = start(checkpoint)
    stock = generate(llm)
    del llm
    gc.collect()
    llm = start(checkpoint, slots=SLOTS)
    for call in ("reload_weights", "reset_weights", "compute_weight_checksums"):
        with pytest.raises(
            MoEPrefetchError, match=rf"{call} cannot be called.*Nothing was changed"
        ):
            llm.collective_rpc(call)
    with pytest.raises(
        MoEPrefetchError, match=r"save_tensorized_model cannot be called"
    ):
        llm.collective_rpc("save_tensorized_model", args=(None,))
    assert generate(llm) == stock


@pytest.mark.exhaustive
def test_requests_that_are_answered_twice_agree(checkpoint):
    """What slots held before leaves no trace in an answer: both are stock's."""
    llm = start(checkpoint, enable_prefix_caching=False)
    stock = answers(llm.generate(PROMPTS, sampling(8), use_tqdm=False))
    del llm
    gc.collect()
    llm = start(checkpoint, slots=SLOTS, enable_prefix_caching=False)
    assert answers(llm.generate(PROMPTS, sampling(8), use_tqdm=False)) == stock
    llm.generate(["other words altogether"] * 3, sampling(8), use_tqdm=False)
    assert answers(llm.generate(PROMPTS, sampling(8), use_tqdm=False)) == stock
