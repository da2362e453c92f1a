# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The entry point of `vllm-moe-prefetch`. It settles which GPU is asked about before it
imports vLLM: vLLM's modules ask for the platform while they are imported."""

import argparse
import logging
import os
import sys

from vllm.plugins.moe_gpu_prefetch.command.gpu_elsewhere import (
    UNNAMED,
    Gpu,
    gpu_called,
    pretend,
)


def main() -> None:
    """Runs the command, for this machine or for the GPU that the arguments name."""
    logging.disable(logging.WARNING)
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # `main.py` prints what matters
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--gpu")
    first.add_argument("--gpu-memory", "--gpu_memory")
    asked, _ = first.parse_known_args()
    if asked.gpu is not None or asked.gpu_memory is not None:
        try:
            pretend(
                Gpu("GPU", UNNAMED, 0) if asked.gpu is None else gpu_called(asked.gpu)
            )
        except ValueError as error:
            print(f"vllm-moe-prefetch: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    from vllm.plugins.moe_gpu_prefetch.command import main as command

    command.main()
