# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels, simulated. In a process of its own, as `tests/kernels`: vLLM's engine,
which other tests run, must not find a Triton that has no driver."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / "kernels"), str(_TESTS.parent / "benchmarks")]

if "vllm.triton_utils" in sys.modules:
    collect_ignore_glob = ["test_*.py"]
else:
    import compile_kernels  # noqa: F401  # imports the kernels though no driver is active
