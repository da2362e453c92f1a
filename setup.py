# SPDX-License-Identifier: Apache-2.0
"""Packages the files this patch adds to vLLM's tree; stock vLLM owns every package above them."""

from setuptools import setup

setup(
    packages=[
        "vllm.model_executor.layers.fused_moe.expert_slots",
        *(
            f"vllm.model_executor.layers.fused_moe.expert_slots.{room}"
            for room in ("cpu", "cuda", "decisions", "weights")
        ),
        "vllm.plugins.moe_gpu_prefetch",
    ],
)
