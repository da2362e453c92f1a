# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The wiring of `--moe-gpu-prefetch` into stock vLLM."""

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`. Each vLLM process calls it; it is cheap,
    and a second call does nothing.

    It wraps all methods that it has to, or none. It never raises: that would end vLLM's
    start. Where this vLLM lacks what the slots need, it adds the flag alone, which is
    refused with the reason.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.plugins.moe_gpu_prefetch.stock import seams, unsupported

    reason = seams.unsupported_version()
    if reason is None:
        try:
            from vllm.plugins.moe_gpu_prefetch import failures, flag, loader
            from vllm.plugins.moe_gpu_prefetch.stock import wrapping

            reason = seams.first_broken(at_start=True)
            wraps = (
                () if reason else (*flag.wraps(), *loader.wraps(), *failures.wraps())
            )
        except Exception as error:
            reason = seams.not_as_known(f"{type(error).__name__}: {error}")
    if reason is None:
        wrapping.install(*wraps)
    else:
        unsupported.install(reason)
