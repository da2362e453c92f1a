# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What vLLM's start goes through before an engine runs."""

from vllm.plugins.moe_gpu_prefetch.stock.seam import relied_on, wrapped

_ARGUMENTS = "vllm.engine.arg_utils:EngineArgs"

START = (
    wrapped(
        f"{_ARGUMENTS}.add_cli_args",
        "adds the ExpertSlots group to the parser of each engine",
        "parser",
        in_tree="two fields on EngineArgs and a group of their own in this method",
    ),
    wrapped(
        f"{_ARGUMENTS}.from_cli_args",
        "merges the flags into additional_config; refuses conflicts before the start",
        "args",
        in_tree="nothing: the two fields are picked up as they are",
    ),
    wrapped(
        f"{_ARGUMENTS}.create_engine_config",
        "refuses conflicts for LLM(...) too; plans the memory; exposes the counters",
        in_tree="builds MoEPrefetchConfig, a field of OffloadConfig with the checks as "
        "its validator",
    ),
    wrapped(
        "vllm.v1.executor.abstract:Executor.__init__",
        "raises the refusal of a worker instead of an error without a reason",
        in_tree="a worker sends the reason through the pipe by which it says that it "
        "is ready",
    ),
    wrapped(
        "vllm.v1.engine.utils:wait_for_engine_startup",
        "raises the refusal of the engine instead of an error without a reason",
        in_tree="the engine sends the reason in the handshake",
    ),
    relied_on(
        "vllm.config.utils:get_attr_docs", "reads the help text from field docstrings"
    ),
    relied_on(
        "vllm.config.parallel:ParallelConfig._api_process_rank",
        "tells the process that starts engines from other API servers (a field)",
    ),
    relied_on(
        "vllm.config.parallel:ParallelConfig._api_process_count",
        "tells the process that starts engines from other API servers (a field)",
    ),
    relied_on(
        "vllm.config.speculative:SpeculativeConfig.draft_model_config",
        "tells whether a separate model drafts: its runner_type is 'draft' (a field)",
    ),
)
