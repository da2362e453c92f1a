# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every architecture gives stock's token ids and logprobs from slots, eager and
compiled.

`make test` runs each at a quarter of its experts, eager; `make test-all` at every
number of slots, eager and compiled.
"""

import gc
import json
import math
import re
import traceback
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm.model_executor.models import ModelRegistry

from tests.support.architectures import ARCHITECTURES, COMMON, EXPERTS, Architecture
from tests.support.engine import Outputs, assert_offloaded, run
from tests.support.sample import write

COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 3}}


def write_checkpoint(directory: Path, architecture: Architecture) -> Path:
    config = getattr(transformers, architecture.config_class)(
        **(COMMON | architecture.config)
    )
    checkpoint = directory / architecture.name
    write(checkpoint, getattr(transformers, architecture.model_class), config)
    if architecture.left_out:
        (weights,) = checkpoint.glob("*.safetensors")
        tensors = load_file(weights).items()
        kept = {
            name: t for name, t in tensors if not re.search(architecture.left_out, name)
        }
        save_file(kept, weights, {"format": "pt"})
    if architecture.published:
        path = checkpoint / "config.json"
        published = json.loads(path.read_text()) | {
            "architectures": [architecture.published]
        }
        path.write_text(json.dumps(published))
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """The checkpoint of an architecture, written once. Its class is also imported here:
    vLLM would look at each in a process of its own, which takes longer than all of its
    runs."""
    directory = tmp_path_factory.mktemp("matrix")

    @cache
    def checkpoint(architecture: Architecture) -> Path:
        name = architecture.name
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
        return write_checkpoint(directory, architecture)

    return checkpoint


@pytest.fixture(scope="module")
def stock_of(checkpoint_of):
    """Stock's answers, asked once."""

    @cache
    def stock(architecture: Architecture, compiled: bool) -> Outputs:
        engine = COMPILED if compiled else {}
        outputs = run(
            checkpoint_of(architecture), **engine, **architecture.engine
        ).outputs
        assert_meaningful(outputs)
        return outputs

    return stock


def assert_meaningful(outputs: Outputs) -> None:
    """Numbers, and not the same token again and again: a broken model would agree with
    itself."""
    for _, logprobs in outputs:
        assert all(math.isfinite(p) for step in logprobs for p in step.values())
    assert len({token for tokens, _ in outputs for token in tokens}) > 5


def rows():
    for architecture in ARCHITECTURES:
        for compiled in (False, True):
            for slots in architecture.slot_counts:
                short = slots == EXPERTS // 4 and not compiled
                yield pytest.param(
                    architecture,
                    slots,
                    compiled,
                    marks=() if short else pytest.mark.exhaustive,
                    id=f"{architecture.name}-{slots}-"
                    + ("compiled" if compiled else "eager"),
                )


RUNNABLE = [row for row in rows() if not row.values[0].stock_error]
NOT_RUNNABLE = [
    architecture for architecture in ARCHITECTURES if architecture.stock_error
]


@pytest.mark.parametrize(("architecture", "slots", "compiled"), RUNNABLE)
def test_outputs_equal_stock(architecture, slots, compiled, checkpoint_of, stock_of):
    """Token ids and logprobs are stock's; every MoE layer's experts were in slots,
    loads happened, and where the slots are few, overflow steps did too."""
    stock = stock_of(architecture, compiled)
    engine = COMPILED if compiled else {}
    slotted = run(
        checkpoint_of(architecture), slots=slots, **engine, **architecture.engine
    )
    assert_offloaded(slotted.layers, slots, EXPERTS)
    assert len(slotted.counters) == len(slotted.layers) == 2
    if slots <= EXPERTS // 4:
        assert slotted.total("overflow_steps") > 0
    assert slotted.outputs == stock
    torch._dynamo.reset()
    del slotted
    gc.collect()


@pytest.mark.parametrize("architecture", NOT_RUNNABLE, ids=lambda a: a.name)
def test_stock_cannot_run_it_on_the_cpu_platform(architecture, checkpoint_of):
    """What is listed as beyond stock on the CPU platform is: a vLLM that can run it
    fails here, and the row moves up."""
    with pytest.raises(Exception) as error:
        run(checkpoint_of(architecture), **architecture.engine)
    where = traceback.extract_tb(error.tb)[-1].name
    text = f"{where}: {error.type.__name__}: {error.value}"
    assert architecture.stock_error in text
