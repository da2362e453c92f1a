# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What stands in for a jitted kernel: compiled as a launch would specialise it, then
simulated."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx import ptxsim
from tests.ptx.ptx_instructions import parse
from tests.ptx.ptx_state import Memory
from tests.ptx.triton_versions import Compiler
from tests.support.pair import Pair
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    gather_kernel,
    manager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.plan_kernel import (
    plan_kernel,
)

KERNELS = Path(gather_kernel.__file__).parent
_TYPES = {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
compiler = cache(Compiler)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    whole = tensor.untyped_storage()
    return (
        torch.empty(0, dtype=torch.uint8)
        .set_(whole, 0, (whole.nbytes(),), (1,))
        .numpy()
    )


class Simulated:
    """A kernel of ours.

    Attributes:
        reached: tensors that it reaches by address.
        races: how many words raced, by kind. Reads of what another thread writes were
            shown not to matter: with garbage in their place, the launch does the same.
        ordering: the barriers that order global memory, as `ptxsim.Launch` takes them.
    """

    ordering: frozenset[str] | None = None

    def __init__(
        self, kernel: Any, path: Path, version: str, architecture: int, seed: int
    ):
        self._kernel, self._path = kernel, path
        self._version, self._architecture = version, architecture
        self._rng = np.random.default_rng(seed)
        self.reached: list[torch.Tensor] = []
        self.races: Counter[ptxsim.Race] = Counter()
        self.launches: list[ptxsim.Launch] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments, **options: self._launch(grid[0], arguments, options)

    def _launch(self, grid: int, arguments: tuple, options: dict[str, Any]) -> None:
        program, shared = self._program(arguments, dict(options))
        memory = Memory()
        for tensor in (
            *(a for a in arguments if isinstance(a, torch.Tensor)),
            *self.reached,
        ):
            memory.add(_bytes(tensor))
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]

        def run(poison: dict) -> ptxsim.Launch:
            launch = ptxsim.Launch(
                program,
                memory,
                values,
                grid,
                shared,
                self._rng,
                poison,
                ordering=self.ordering,
            )
            launch.run()
            self.races.update(launch.races)
            return launch

        before = [b.copy() for b in memory.buffers()]
        launch = run({})
        self.launches.append(launch)
        if launch.racy_reads:
            after = [b.copy() for b in memory.buffers()]
            for buffer, old in zip(memory.buffers(), before, strict=True):
                buffer[:] = old
            run(dict(launch.racy_reads))
            for buffer, expected in zip(memory.buffers(), after, strict=True):
                assert np.array_equal(buffer, expected), [*map(str, launch.races)]

    def _program(self, arguments: tuple, options: dict) -> tuple[ptxsim.Program, int]:
        """As Triton specialises: by type, and by whether an address is a multiple of
        16."""
        num_warps, signature, aligned = options.pop("num_warps"), {}, []
        for name, value in zip(self._kernel.arg_names, arguments, strict=False):
            if isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    aligned.append(name)
            else:
                signature[name] = "i32" if value < 1 << 31 else "i64"
        return _compiled(
            self._version,
            (str(self._path), self._kernel.__name__, self._architecture, num_warps),
            (*signature.items(),),
            (*options.items(),),
            (*aligned,),
        )


@cache
def _compiled(
    version: str, what: tuple, signature: tuple, constants: tuple, aligned: tuple
):
    path, kernel, architecture, num_warps = what
    ptx, shared = compiler(version).ptx(
        path=path,
        kernel=kernel,
        architecture=architecture,
        num_warps=num_warps,
        signature=dict(signature),
        constants=dict(constants),
        aligned=aligned,
    )
    return parse(ptx), shared


@contextmanager
def simulated(
    version: str,
    architecture: int = 90,
    seed: int = 0,
    programs: int = 2,
    plan_source: Path = KERNELS / "plan_kernel.py",
) -> Iterator[tuple[Simulated, Simulated]]:
    """Both kernels, which every layer's manager launches meanwhile."""
    plan = Simulated(plan_kernel, plan_source, version, architecture, seed)
    path = KERNELS / "gather_kernel.py"
    gather = Simulated(
        gather_kernel.gather_kernel, path, version, architecture, seed + 1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "plan_kernel", plan)
        patch.setattr(gather_kernel, "gather_kernel", gather)
        patch.setattr(gather_kernel, "PROGRAMS", programs)
        yield plan, gather


def make_pair(
    plan: Simulated, gather: Simulated, *arguments: Any, **options: Any
) -> Pair:
    pair = Pair(*arguments, **options)
    device = pair.device
    plan.reached = [device.counters.tensor]
    if device.ring is not None:
        plan.reached.append(device.ring.tensor)
    gather.reached = [*device.store.tensors.values(), *device.rows.tensors.values()]
    return pair
