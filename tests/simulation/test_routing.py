# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The routing of benchmarks has the figures that are published of real models, and
vLLM's rows get the ids of their own sequence and position."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks.routing import published
from benchmarks.routing.odds import STRATEGIES, draw, stream
from benchmarks.routing.strategy import Rows
from tests.benchmarks.test_bench import printed
from tests.benchmarks.test_proof_engines import UNION


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small: threads that wait for each other take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_command():
    output = printed("benchmarks.routing", "--steps", "20")
    assert output.count("│ lru,") == 10 and "experts with 90 %" in output, output
    for name in STRATEGIES:
        assert output.count(f"│ {name.ljust(14)} │ lru  ") == 5, output


@pytest.mark.parametrize("name", published.MODELS)
def test_published_figures(name):
    """Shares within 3 points, counts within 8 %."""
    model = published.MODELS[name]
    ours = published.figures(published.drawn(model, STRATEGIES[name]))
    for what, value in published.figures(model).items():
        tolerance = {"abs": 0.03} if value < 1 else {"rel": 0.08}
        assert ours[what] == pytest.approx(value, **tolerance), what


def test_the_union_that_the_proof_is_tested_with():
    assert published.MODELS["topics-qwen1.5"].unions[8] == UNION


def test_uniform_routing():
    """Every expert and every pair of sequences alike: the union is the formula's."""
    ids = stream(STRATEGIES["uniform"], 60, 4, batch=8, groups=2, length=200)
    unions = [len(step.unique()) for step in ids]
    expected = 60 * (1 - (1 - 4 / 60) ** 8)
    assert sum(unions) / len(unions) == pytest.approx(expected, rel=0.02)


def test_calibration_goes_down():
    """From other odds it finds nearer ones."""
    small = {
        "sequences": 4,
        "length": 60,
        "hits": {("lru", 1, 30): 0.567},
        "unions": {},
    }
    model = dataclasses.replace(published.MODELS["topics-qwen1.5"], **small)
    far = dataclasses.replace(STRATEGIES["topics-qwen1.5"], fixed=1.5)
    found = published.calibrate(model, far)
    assert published.distance(model, found) < published.distance(model, far) / 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_id_depends_on_its_own_row_alone(name):
    sequences = torch.tensor([3, 3, 7, 3])
    positions = torch.tensor([40, 41, 40, 40])
    ids = draw(STRATEGIES[name], sequences, positions, 1, 32, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert torch.equal(ids[0], ids[3]) and not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])
    alone = draw(STRATEGIES[name], sequences[1:2], positions[1:2], 1, 32, 4)
    assert torch.equal(alone[0], ids[1])
    other = draw(STRATEGIES[name], sequences, positions, 2, 32, 4)
    assert not torch.equal(other[0], ids[0])


CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=12))


def test_rows_of_a_step():
    """Two sequences decode, one prefills in chunks, and the rest is padding of the
    graph: its requests have no tokens."""
    rows = Rows()
    rows.begin(None, CONFIG)
    rows.layer, place = 5, rows.sequences.data_ptr()
    metadata = SimpleNamespace(
        query_start_loc=torch.tensor([0, 1, 2, 6, 6], dtype=torch.int32),
        seq_lens=torch.tensor([10, 1, 9, 0], dtype=torch.int32),
        block_table=torch.tensor([[4, 5], [8, 0], [2, 3], [0, 0]], dtype=torch.int32),
        num_actual_tokens=6,
    )
    rows.begin({"a": SimpleNamespace(), "b": metadata}, CONFIG)
    assert rows.layer == 0 and rows.sequences.data_ptr() == place
    assert rows.sequences.tolist() == [4, 8, 2, 2, 2, 2] + [0] * 6
    assert rows.positions.tolist() == [9, 0, 5, 6, 7, 8] + [0] * 6


def test_rows_that_no_metadata_tells_are_refused():
    with pytest.raises(RuntimeError, match=r"SimpleNamespace.*TRITON_ATTN"):
        Rows().begin({"a": SimpleNamespace()}, CONFIG)
    with pytest.raises(RuntimeError, match="two batches a step"):
        Rows().begin([{}, {}], CONFIG)
