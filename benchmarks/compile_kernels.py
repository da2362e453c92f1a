# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for sm_80, sm_90 and sm_120, which takes no GPU, and prints what each one
uses: registers a thread, bytes spilled to local memory, bytes of shared memory a program, and how
many loads of 16 bytes a thread has in flight (what the gather needs to fill the bus)."""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# vLLM drops triton where no driver is active; compiling needs none, so one stands in meanwhile.
_STAND_IN = "cpu"
if not any(backend.driver.is_active() for backend in backends.values()):
    driver = type("CompilerOnly", (), {"is_active": staticmethod(lambda: True)})
    backends[_STAND_IN] = SimpleNamespace(driver=driver)  # type: ignore[index]

from vllm.model_executor.layers.fused_moe.expert_slots.gather_kernel import (  # noqa: E402
    UNIT_BYTES,
    gather_kernel,
)
from vllm.model_executor.layers.fused_moe.expert_slots.plan_kernel import IDS, plan_kernel  # noqa: E402
from vllm.model_executor.layers.fused_moe.expert_slots.reference import (  # noqa: E402
    max_waves,
    stream_width,
)

backends.pop(_STAND_IN, None)

ARCHITECTURES = (80, 90, 120)
_POINTERS = {
    "is_padding": "*u8",
    **dict.fromkeys(("last_needed", "frequency", "totals", "mirror", "order", "unit_lane"), "*i64"),
    **dict.fromkeys(("homes", "slots", "row_lanes"), "*i64"),
}
_SCALARS = {"num_ids": "i32", "bytes_per_expert": "i64", "wave": "i32", "waves": "i32"}


def plan_constants(experts: int, slots: int, top_k: int, tokens: int, lfu: bool) -> dict[str, Any]:
    width = stream_width(slots)
    slots_pad = triton.next_power_of_2(slots)
    return {
        **{"E": experts, "N": slots, "TOP_K": top_k, "LFU": lfu, "HALF_LIFE": 128, "UNIT": 1024},
        "ONE_WAVE": max_waves(experts, slots, tokens * top_k) == 1,
        **{"WIDTH": width, "RING": min(slots, 2 * width), "HAS_PADDING": True},
        **{"E_PAD": triton.next_power_of_2(experts), "N_PAD": slots_pad},
        **{"IDS": IDS, "CHUNK": max(1, 4096 // slots_pad)},
    }


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and constants of each compilation: decode and prefill of small and large."""
    for experts, slots, top_k, tokens in (
        *((32, 8, 4, 1), (128, 64, 8, 1), (128, 64, 8, 64)),
        *((512, 256, 10, 1), (512, 256, 10, 8192), (512, 511, 16, 8192)),
    ):
        for policy in ("lru", "lfu"):
            name = f"plan E={experts} N={slots} top-{top_k}, {tokens} tokens, {policy}"
            constants = plan_constants(experts, slots, top_k, tokens, policy == "lfu")
            yield name, plan_kernel, constants
    lanes = UNIT_BYTES // 16
    yield "gather", gather_kernel, {"UNITS": 288, "WIDTH": 8, "LANES": lanes}


def compile_for(kernel: Any, constants: dict[str, Any], architecture: int) -> Any:
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _SCALARS.get(name) or _POINTERS.get(name, "*i32")
        if signature[name].startswith("*") and name != "wave_tables":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
        attrs=attributes,
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": 8})


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and shared memory, as the CUDA toolkit's reader states them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    as_json = parser.parse_args().json
    rows = []
    for name, kernel, constants in variants():
        for architecture in ARCHITECTURES:
            compiled = compile_for(kernel, constants, architecture)
            used = usage(compiled.asm["cubin"]) | {"shared_bytes": compiled.metadata.shared}
            wide = re.findall(r"ld\.global\S*\.(?:v2\.b64|v4\.b32)", compiled.asm["ptx"])
            used["wide_loads"] = len(wide)
            rows.append({"kernel": name, "architecture": f"sm_{architecture}", **used})
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(
        "kernel", "architecture", "registers", "spilled bytes", "shared bytes", "wide loads"
    )
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
