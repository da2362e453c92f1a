# SPDX-License-Identifier: Apache-2.0
"""The wiring of `--moe-gpu-prefetch` into stock vLLM."""

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every vLLM process, cheap and idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.plugins.moe_gpu_prefetch import arguments, layers

    arguments.install()
    layers.install()
