# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Packages the files this patch adds to vLLM's tree; stock vLLM owns every package
above them."""

from setuptools import find_namespace_packages, setup

OURS = (
    "vllm.model_executor.layers.fused_moe.expert_slots",
    "vllm.plugins.moe_gpu_prefetch",
)

packages = find_namespace_packages(include=[f"{package}*" for package in OURS])
setup(packages=packages, package_data={package: ["py.typed"] for package in OURS})
