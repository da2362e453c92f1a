# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What tests, benchmarks and examples share: checkpoints with random weights, engines,
servers, processes of their own, and stand-ins for a GPU's driver and libraries."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository; `python -m tests.support.NAME` works from here."""
