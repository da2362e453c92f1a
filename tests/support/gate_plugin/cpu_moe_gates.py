# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A plugin of the tests: opens the gates of vLLM's four classes of quantised experts on
the CPU. vLLM takes them on x86 with AMX alone, though their kernel also runs without.

The product opens no gate. `torch.cpu._is_amx_tile_supported` stays as it is, since
attention and linear layers ask it too and would take code that needs AMX.
"""

CLASSES = ("CPUExpertsFp8", "CPUExpertsMxfp4", "CPUExpertsInt4", "CPUExpertsInt8")


def register(replace=setattr):
    """`replace(owner, name, value)` may be a way that can be undone."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in CLASSES:
        experts = getattr(cpu_moe, name)
        replace(experts, "_supports_current_device", staticmethod(is_x86_cpu))
    fit_older_kernel(replace)


def is_x86_cpu():
    """What is left of the gate."""
    from vllm.platforms import CpuArchEnum, current_platform

    return (
        current_platform.is_cpu()
        and current_platform.get_cpu_architecture() == CpuArchEnum.X86
    )


def fit_older_kernel(replace):
    """Has vLLM 0.33 call the compiled kernel of 0.32, over which the tests run it. The
    older kernel knows the activation by itself: SiLU, or swiglu where it gets the
    latter's parameters. 0.33 names it in a last argument, which is left out."""
    import torch

    from vllm import _custom_ops

    kernel = getattr(torch.ops._C, "fused_experts_cpu", None)
    activations = getattr(_custom_ops, "CPUActMethod", None)
    if kernel is None or activations is None or not hasattr(kernel, "default"):
        return
    taken = len(kernel.default._schema.arguments)

    def fused_experts_cpu(*arguments):
        *arguments, activation = arguments
        assert activation in (activations.SILU_AND_MUL, activations.SWIGLU)
        assert len(arguments) == taken
        return kernel(*arguments)

    if taken == 18:
        replace(torch.ops._C, "fused_experts_cpu", fused_experts_cpu)
