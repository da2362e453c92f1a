# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compiles every kernel for `ARCHITECTURES`, which takes no GPU, and prints what each
one uses: registers a thread, bytes spilled to local memory, bytes of shared memory a
program, and the loads of 16 bytes that a thread has in flight. The gather kernel needs
such loads to fill the link to the host."""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# vLLM does without triton if no driver is active. Compiling needs no driver, so a
# stand-in is active while the kernels are imported.
_STAND_IN = "cpu"
if not any(backend.driver.is_active() for backend in backends.values()):
    driver = type("CompilerOnly", (), {"is_active": staticmethod(lambda: True)})
    backends[_STAND_IN] = SimpleNamespace(driver=driver)  # type: ignore[index]

from vllm.model_executor.layers.fused_moe.expert_slots.cuda.block_map_kernel import (  # noqa: E402
    block_map_constants,
    block_map_kernel,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.gather_kernel import (  # noqa: E402
    gather_constants,
    gather_kernel,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.plan_kernel import (  # noqa: E402
    plan_constants,
    plan_kernel,
)

backends.pop(_STAND_IN, None)

ARCHITECTURES = (80, 86, 89, 90, 120)
_POINTERS = {
    "is_padding": "*u8",
    **dict.fromkeys(("last_needed", "frequency", "totals", "unit_begin"), "*i64"),
    **dict.fromkeys(("homes", "row_bytes"), "*i64"),
}
_SCALARS = {
    **dict.fromkeys(("num_ids", "num_ids_known", "num_blocks"), "i32"),
    **dict.fromkeys(("mirror", "ring", "bytes_per_expert"), "i64"),
}


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and constants of each compilation: small and large, with a map and a
    trace and without, with and without rows that are no multiple of 16 bytes."""
    for experts, slots, top_k in (
        (32, 8, 4),
        (128, 64, 8),
        (256, 64, 8),
        (512, 256, 10),
    ):
        for policy in ("lru", "lfu"):
            for has_map in (False, True):
                name = f"plan E={experts} N={slots} top-{top_k}, {policy}"
                constants = plan_constants(experts, slots, policy, 128, traced=has_map)
                constants |= {"TOP_K": top_k, "HAS_PADDING": True, "HAS_MAP": has_map}
                yield name + ", map, traced" * has_map, plan_kernel, constants
    for all_wide in (True, False):
        name = "gather" if all_wide else "gather, narrow rows"
        yield name, gather_kernel, gather_constants(288, all_wide)
    yield "block map", block_map_kernel, block_map_constants(128)


def compile_for(kernel: Any, constants: dict[str, Any], architecture: int) -> Any:
    constants = dict(constants)
    num_warps = constants.pop("num_warps")
    signature = {}
    for name in kernel.arg_names:
        if name not in constants:
            signature[name] = _SCALARS.get(name) or _POINTERS.get(name, "*i32")
            if name == "rows" and kernel is gather_kernel:
                signature[name] = "*i64"
    aligned = [name for name, kind in signature.items() if kind[0] == "*"]
    return compile_with(kernel, signature, constants, aligned, architecture, num_warps)


def compile_with(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: Sequence[str],
    architecture: int,
    num_warps: int,
) -> Any:
    """Args:
    signature: type of each argument that is no constant, such as "*i32".
    aligned: which of them are multiples of 16.
    """
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature={n: signature.get(n, "constexpr") for n in kernel.arg_names},
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory, as the CUDA toolkit's reader states them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {
        key: int(value)
        for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)
    }
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list instead of a table"
    )
    as_json = parser.parse_args().json
    rows = []
    for name, kernel, constants in variants():
        for architecture in ARCHITECTURES:
            compiled = compile_for(kernel, constants, architecture)
            used = usage(compiled.asm["cubin"]) | {
                "shared_bytes": compiled.metadata.shared
            }
            wide = re.findall(
                r"ld\.global\S*\.(?:v2\.b64|v4\.b32)", compiled.asm["ptx"]
            )
            used["wide_loads"] = len(wide)
            rows.append({"kernel": name, "architecture": f"sm_{architecture}", **used})
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(
        "kernel",
        "architecture",
        "registers",
        "spilled bytes",
        "shared bytes",
        "wide loads",
    )
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
