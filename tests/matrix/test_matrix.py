# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every architecture gives stock's token ids and logprobs from slots, eager and
compiled.

`make test` runs the most used ones at a quarter of their experts, eager; `make
test-all` runs all at every number of slots, eager and compiled.
"""

import gc
import multiprocessing
import traceback
from functools import cache

import pytest
import torch

from tests.matrix.rows import COMPILED, assert_meaningful, rows_of
from tests.support.architectures import (
    DESCRIBED,
    EXPERTS,
    STOCK_ENDS,
    TEXT,
    Architecture,
)
from tests.support.engine import Outputs, assert_offloaded, run


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


@pytest.mark.parametrize(
    ("architecture", "slots", "compiled"), rows_of((*TEXT, *DESCRIBED))
)
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


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(
            a, id=a.name, marks=pytest.mark.exhaustive if a.model_class is None else ()
        )
        for a in STOCK_ENDS
    ],
)
def test_stock_cannot_run_it_on_the_cpu_platform(architecture, checkpoint_of):
    """What is listed as beyond stock on the CPU platform is: a vLLM that can run it
    fails here, and the row moves up."""
    assert architecture.stock_error in last_words(architecture, checkpoint_of)


def last_words(architecture: Architecture, checkpoint_of) -> str:
    """What stock ends with, in a copy of this process: some of these models import
    libraries after which vLLM starts no other model here."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        torch._C.set_num_threads(1)
        try:
            run(checkpoint_of(architecture), **architecture.engine)
            text = "it runs"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].name
            text = f"{where}: {type(error).__name__}: {error}"
        sender.send(text)

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(120) else "it says nothing"
    finally:
        process.kill()
        process.join()
