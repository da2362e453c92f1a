# SPDX-License-Identifier: Apache-2.0
"""The wiring of `--moe-gpu-prefetch` into stock vLLM."""

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every vLLM process, cheap and idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.plugins.moe_gpu_prefetch import arguments, seams

    # On an unsupported vLLM the flag is still there, to be refused with the reason.
    arguments.install()
    if seams.unsupported_version() is None:
        from vllm.plugins.moe_gpu_prefetch import layers, loading

        layers.install()
        loading.install()
