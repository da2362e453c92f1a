# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether expert slots can work in this process, with its vLLM and its other plugins.
Asked when slots are asked for: by then all plugins have been loaded."""

from vllm.logger import init_logger

from vllm.plugins.moe_gpu_prefetch import layers
from vllm.plugins.moe_gpu_prefetch.stock import seams, wrapping

logger = init_logger(__name__)


def objection() -> str | None:
    """Why not, in one sentence that names the cause and the way out; None if they
    can."""
    return seams.unsupported_version() or seams.first_broken() or another_plugin()


def another_plugin() -> str | None:
    """Another plugin stands where the slots would have to be: who."""
    taken = layers.held_by_another() or wrapping.lost()
    return taken and layers.replaced(taken)


def say_what_is_shared() -> None:
    """One line on other plugins that wrap the same methods. They work together if each
    calls what it wraps; who looks for a fault should know."""
    if shared := wrapping.shared():
        logger.info(
            "Expert slots share methods with other plugins. %s.", "; ".join(shared)
        )
