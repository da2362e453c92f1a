# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The compiled kernels' PTX, run as a GPU would run it (`ptxsim`), equals the CPU's
decisions after every step and has no race that matters, with every Triton that users
have."""

import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.ptx.simulated import KERNELS, Simulated, make_pair, simulated
from tests.ptx.triton_versions import INSTALLED, RELEASES, VERSIONS, Compiler
from tests.support import ROOT
from tests.support.pair import Pair, make_rows, make_store, routing
from tools.compile_kernels import ARCHITECTURES
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)

BARRIER = "tl.debug_barrier()"


@dataclass(frozen=True)
class Case:
    """One layer and the tokens of its steps."""

    version: str
    architecture: int
    experts: int
    slots: int
    top_k: int
    policy: str
    tokens: tuple[int, ...]
    skew: float = 0.1
    wide_ids: bool = False
    has_map: bool = False
    programs: int = 2

    def __str__(self) -> str:
        options = "-wide" * self.wide_ids + "-map" * self.has_map
        return (
            f"{self.version}-sm_{self.architecture}-E{self.experts}-N{self.slots}"
            f"-top{self.top_k}-{self.policy}{options}-{max(self.tokens)}"
        )


OLD, NEW = RELEASES
CASES = [
    Case(OLD, 80, 128, 64, 8, "lru", (1, 2, 1, 20), wide_ids=True),
    Case(OLD, 90, 60, 18, 4, "lfu", (1, 3, 9, 40), has_map=True),
    Case(OLD, 120, 5, 1, 2, "lru", (1, 2, 1, 3, 200), programs=6),
    Case(NEW, 80, 96, 95, 8, "lfu", (1, 9, 20), has_map=True, wide_ids=True),
    Case(NEW, 90, 128, 64, 8, "lfu", (1, 2, 1, 20, 150), 0.02),
    Case(NEW, 120, 60, 18, 4, "lru", (1, 3, 300)),
    Case(OLD, 86, 128, 64, 8, "lfu", (1, 2, 20, 150), 0.02),
    Case(OLD, 89, 60, 18, 4, "lru", (1, 3, 9, 40), has_map=True),
    Case(NEW, 86, 96, 95, 8, "lru", (1, 9, 20), wide_ids=True),
    Case(NEW, 89, 128, 64, 8, "lfu", (1, 2, 1, 20, 150), programs=6),
    Case(INSTALLED, 80, 5, 4, 2, "lfu", (1, 2, 1, 3)),
    Case(INSTALLED, 90, 128, 64, 8, "lru", (1, 2, 1, 20, 1), programs=6),
    Case(INSTALLED, 120, 512, 300, 16, "lfu", (1, 8, 20), 0.01),
]
ALL_CASES = [
    Case(version, architecture, *layer, policy, (1, 2, 1, 9, 20, 150), has_map=has_map)
    for version in VERSIONS
    for architecture in ARCHITECTURES
    for layer in (
        (5, 3, 2),
        (60, 18, 4),
        (96, 40, 8),
        (128, 1, 1),
        (128, 127, 8),
        (512, 64, 10),
    )
    for policy, has_map in (("lru", False), ("lfu", True))
]


def test_every_architecture_is_simulated_and_named():
    assert {case.architecture for case in CASES} == set(ARCHITECTURES)
    for page in ("README.md", "docs/limits.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text()
        assert all(f"sm_{number}" in text for number in ARCHITECTURES), page


def play(case: Case, plan: Simulated, gather: Simulated) -> Pair:
    """Steps with padding by id in each and by mask in every other one."""
    generator = torch.Generator().manual_seed(case.slots)
    model, expert_map = case.experts, None
    if case.has_map:
        model = 2 * case.experts + 3
        expert_map = torch.full((model,), -1, dtype=torch.int32)
        here = torch.randperm(model, generator=generator)[: case.experts]
        expert_map[here] = torch.arange(case.experts, dtype=torch.int32)
    pair = make_pair(
        plan,
        gather,
        case.experts,
        case.slots,
        case.policy,
        half_life=3,
        expert_map=expert_map,
    )
    for step, tokens in enumerate(case.tokens):
        ids = routing(generator, tokens, model, case.top_k, case.skew)
        ids[torch.rand(tokens, generator=generator) < 0.1] = -1
        mask = torch.rand(tokens, generator=generator) < 0.2 if step % 2 else None
        pair.step(ids.long() if case.wide_ids else ids, mask)
    return pair


def check_races(plan: Simulated, gather: Simulated) -> None:
    """Several threads may write the same value; nothing else may race."""
    harmful = [race for race in plan.races if race.kind != "ww-same"]
    assert not harmful, [*map(str, harmful)]
    assert not gather.races, [*map(str, gather.races)]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in ALL_CASES)],
    ids=str,
)
def test_a_gpu_decides_and_copies_as_the_reference(case):
    seed = random.Random(str(case)).randrange(1 << 30)
    with simulated(case.version, case.architecture, seed, case.programs) as (
        plan,
        gather,
    ):
        play(case, plan, gather)
        check_races(plan, gather)


@pytest.mark.parametrize("version", VERSIONS)
def test_steps_of_every_kind(version):
    """Hits alone, misses that fit, and misses that are staged, named and counted."""
    with simulated(version) as (plan, gather):
        pair = make_pair(plan, gather, 16, 6, "lru")
        for experts in (
            [0, 5],
            [7, 1],
            [2, 9],
            [8, 9, 10, 11],
            [0, 1, 2, 3, 4, 5, 6, 7],
        ):
            pair.step(torch.tensor([experts], dtype=torch.int32))
        pair.step(torch.full((4, 2), -1, dtype=torch.int32))
        counters = pair.device.counters
        assert counters.steps == 5 and counters.hits > 2
        assert counters.evictions > counters.staged > 0
        check_races(plan, gather)


def test_gather_copies_rows_of_several_units():
    with simulated(INSTALLED, programs=6) as (_, gather):
        store = make_store(8, width=2500)
        device = CudaSlotManager(
            MoEPrefetchConfig(slots=3), make_rows(store, 3, CPUMemory())
        )
        gather.reached = [*store.tensors.values(), *device.rows.tensors.values()]
        device.num_loads.fill_(2)
        device.load_experts[:2] = torch.tensor([6, 4])
        device.load_rows[:2] = torch.tensor([7, 1])
        device.load()
        for name, home in store.tensors.items():
            assert torch.equal(device.rows.tensors[name][[7, 1]], home[[6, 4]])
        assert not gather.races


def without(barriers: tuple[int, ...], directory: Path) -> tuple[Path, frozenset[str]]:
    """A copy of the plan kernel without some of its barriers, and the places of the
    others."""
    copy = directory / "plan_copy.py"
    first, *parts = (KERNELS / "plan_kernel.py").read_text().split(BARRIER)
    kept = ("pass" if i in barriers else BARRIER for i in range(len(parts)))
    text = first + "".join(map("".join, zip(kept, parts, strict=True)))
    copy.write_text(text)
    lines = enumerate(text.splitlines(), 1)
    places = (f"{copy.name}:{n}" for n, line in lines if line.strip() == BARRIER)
    return copy, frozenset(places)


def play_every_path(plan: Simulated, gather: Simulated) -> None:
    """Hits alone, misses that fit, and so many ids that flags in memory take them.
    Without a trace, whose sum over the ids brings barriers of Triton's."""
    pair = make_pair(plan, gather, 128, 24, "lfu", half_life=3, traced=False)
    generator = torch.Generator().manual_seed(0)
    pair.step(torch.arange(8, dtype=torch.int32).view(1, 8))
    for tokens in (2, 20):
        pair.step(routing(generator, tokens, 128, 8, 0.02))
    check_races(plan, gather)


def test_missing_barriers_are_noticed(tmp_path):
    """Triton's own barriers do not make up for ours."""
    copy, _ = without((0, 1, 2, 3), tmp_path)
    with (
        simulated(INSTALLED, plan_source=copy) as kernels,
        pytest.raises(AssertionError),
    ):
        play_every_path(*kernels)


@pytest.mark.parametrize("missing", [None, 0, 1, 2, 3])
def test_our_barriers_order_global_memory(missing, tmp_path):
    """All are needed, and no others. Triton puts barriers of its own around what
    passes through shared memory, and some lie beside ours. Here those order shared
    memory alone."""
    copy, ours = without(() if missing is None else (missing,), tmp_path)
    assert len(ours) == (4 if missing is None else 3)
    expected = nullcontext() if missing is None else pytest.raises(AssertionError)
    with simulated(INSTALLED, plan_source=copy) as (plan, gather), expected:
        plan.ordering = ours
        play_every_path(plan, gather)


@pytest.mark.parametrize(
    ("version", "expected"), [*zip(RELEASES, RELEASES, strict=True)]
)
def test_the_releases_compile(version, expected):
    """Not the installed Triton under another's name."""
    process = Compiler(version)
    process.close()
    assert process.version == expected
