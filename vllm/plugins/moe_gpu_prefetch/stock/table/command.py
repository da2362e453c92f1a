# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command `vllm-moe-prefetch`, which may answer for a GPU on another machine."""

from vllm.plugins.moe_gpu_prefetch.stock.seam import V0_32, V0_33, relied_on

COMMAND = (
    relied_on(
        "vllm.utils.argparse_utils:FlexibleArgumentParser",
        "is the parser of `vllm-moe-prefetch plan`",
        in_tree="`vllm moe-prefetch plan`, a subcommand",
    ),
    *(
        relied_on(
            f"{module}:make_arg_parser",
            "gives the plan command the options of `vllm serve`",
            "parser",
            versions=versions,
            deferred=True,
        )
        for module, versions in (
            ("vllm.entrypoints.launchers.cli_args", V0_32),
            ("vllm.entrypoints.common.cli_args", V0_33),
        )
    ),
    relied_on(
        "vllm.platforms:_current_platform", "is set to the GPU on another machine"
    ),
    relied_on(
        "vllm.platforms:vllm_version_matches_substr",
        "returns False, so vLLM keeps Triton on a CPU build",
        "substr",
    ),
    relied_on(
        "vllm.platforms.cuda:CudaPlatformBase",
        "is extended to that GPU's platform",
        deferred=True,
        on_cuda=True,
    ),
    relied_on(
        "vllm.platforms.interface:DeviceCapability",
        "is that GPU's compute capability",
    ),
)
