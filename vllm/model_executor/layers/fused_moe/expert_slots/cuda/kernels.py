# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which of stock's kernels run on rows, and how stock is led to choose one of them.

For each format stock tries its kernels in an order that depends on the GPU, and takes
the first that supports the layer. Here only those in `SERVED` support a layer with
slots. So the order stays stock's, on every GPU and in every version: Triton for FP8 on
a GPU that has it and Marlin on an older one, Marlin for 4 bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.experts import (
    TRITON_EXPERTS_CLASSES,
    SlottedExperts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts import (
    MARLIN_EXPERTS_CLASSES,
    SlottedMarlinExperts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import reasons
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.formats import (
    kernel_reason,
)
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

SERVED: dict[str, type] = {
    **dict.fromkeys(TRITON_EXPERTS_CLASSES, SlottedExperts),
    **dict.fromkeys(MARLIN_EXPERTS_CLASSES, SlottedMarlinExperts),
}
"""Stock's experts classes by name, and what is mixed in to run one on rows."""


@contextmanager
def choosing_among_served(moe_config: Any) -> Iterator[None]:
    """Within, stock finds that no kernel but those in `SERVED` supports a layer.

    Args:
        moe_config: the layer's, with the user's --moe-backend.

    Raises:
        MoEPrefetchError: stock has none of these for the layer.
    """
    stock = FusedMoEExperts.is_supported_config
    rejected: list[str] = []
    accepted = False

    def is_supported(cls: type, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        nonlocal accepted
        answer = stock(cls, *args, **kwargs)
        if not answer[0]:
            return answer
        if cls.__name__ in SERVED:
            accepted = True
            return answer
        rejected.append(cls.__name__)
        return False, f"expert slots do not serve {cls.__name__}"

    # Stock's classes that override it call it.
    with replaced(FusedMoEExperts, "is_supported_config", staticmethod(is_supported)):
        try:
            yield
        except (NotImplementedError, ValueError) as error:
            if accepted or not rejected:
                raise  # for another reason
            asked = moe_config.moe_backend
            name = rejected[0]
            known = kernel_reason(name)
            reason, way_out = known or (
                "it is not known to give the same bits from slots",
                reasons.OTHER_CHECKPOINT,
            )
            if asked != "auto":
                way_out = f"Drop --moe-backend {asked}"
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch cannot serve this model's experts: vLLM would run "
                f"them with {name}: {reason}. {way_out}, or serve without "
                f"--moe-gpu-prefetch. (vLLM has no other kernel here: {error})"
            ) from error
