# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether expert slots can work in this process, with its vLLM and its other plugins.
Asked when slots are asked for: by then all plugins have been loaded."""

from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.plugins.moe_gpu_prefetch import registry
from vllm.plugins.moe_gpu_prefetch.stock import seams, wrapping

logger = init_logger(__name__)


def objection() -> str | None:
    """Why slots cannot work here, with the cause and the way out; None if they can."""
    return seams.unsupported_version() or seams.first_broken() or another_plugin()


def refuse_where_slots_cannot_work() -> None:
    """Refuses slots on a vLLM, or beside a plugin, with which they cannot work.

    Raises:
        MoEPrefetchError: vLLM or another plugin is not as the slots need it.
    """
    if reason := objection():
        raise MoEPrefetchError(reason)


def another_plugin() -> str | None:
    """Why another plugin keeps the slots from working, or None."""
    if taken := registry.held_by_another():
        return registry.replaced(taken)
    if lost := wrapping.lost():
        return (
            f"another plugin replaced {lost}, which does not show that it calls expert "
            "slots (functools.wraps does). Disable one of the two with VLLM_PLUGINS, "
            "or serve without --moe-gpu-prefetch."
        )
    return None


def log_shared_methods() -> None:
    """Logs the other plugins that wrap the same methods, in one line: each works, but a
    search for a fault should know of them."""
    if shared := wrapping.shared():
        logger.info(
            "Other plugins wrap the methods that expert slots wrap. %s.",
            "; ".join(shared),
        )
