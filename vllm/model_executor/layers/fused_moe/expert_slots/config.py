# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The user's request: one validated object, carried by
`VllmConfig.additional_config`."""

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from vllm.config.utils import config

from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    MAX_HALF_LIFE,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import size_in_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

SLOTS_KEY = "moe_gpu_prefetch"
OPTIONS_KEY = "moe_gpu_prefetch_config"


class MoEPrefetchError(ValueError):
    """The request cannot be served. The message says what was asked, why it cannot be
    served, and the way out."""


def clamp(slots: int, top_k: int, num_experts: int) -> int:
    """The slots of a layer that was asked to have `slots`: at least the router's top-k,
    at most one for every expert."""
    return min(num_experts, max(slots, top_k))


def _usable_as_path(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path has no NUL in it")
    os.fsencode(text)
    return text


def _at_least_a_mib(text: str) -> str:
    if size_in_bytes(text) < 1 << 20:
        raise ValueError("a trace needs at least 1MiB")
    return text


def _auto_or_size(text: str) -> str:
    if text != "auto":
        size_in_bytes(text)
    return text


@config
class MoEPrefetchConfig:
    """Expert slots for Mixture-of-Experts models."""

    slots: Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(_auto_or_size)]
    """Number of expert slots per MoE layer and rank. Every routed expert lives in host
    memory; this many are resident at a time. Raised to the router's top-k when it is
    lower; at or above the number of experts nothing is offloaded. A size like 12GiB:
    the largest number whose slots and staging take no more of a GPU. `auto`: the
    largest number that leaves the KV cache its room. Not given: stock vLLM."""

    policy: Literal["lru", "lfu"] = "lfu"
    """Which resident expert is evicted first: `lfu`, the one needed least often, counts
    decaying with `lfu_half_life`; `lru`, the one needed longest ago."""

    lfu_half_life: int = Field(default=8, ge=1, le=MAX_HALF_LIFE, strict=True)
    """For `lfu`: the number of steps of a layer after which a count is worth half."""

    draft_slots: Annotated[int, Field(ge=1, strict=True)] | None = None
    """In speculative decoding, the number of expert slots per MoE layer of the draft
    model or of the MTP layers. Not given: as many as the model's own."""

    host_memory_reserve: (
        Annotated[float, Field(ge=0, le=1 << 30, strict=True)] | None
    ) = None
    """GiB of host memory that the experts must leave available, else the start is
    refused. Not given: 8 GiB or a tenth of the memory, whichever is more."""

    shared_store: (
        Annotated[str, Field(min_length=1), AfterValidator(_usable_as_path)] | None
    ) = None
    """A directory in shared memory, for example /dev/shm/expert-stores, where the
    experts of a checkpoint are kept once for all servers of this machine and for the
    next start. Not given: every server has its own copy."""

    warm_start: (
        Annotated[str, Field(min_length=1), AfterValidator(_usable_as_path)] | None
    ) = None
    """A directory where the resident experts of every layer are written: when the
    engine is idle, every five minutes under load, and at its end. The next start of the
    same model fills its slots with them. Not given: slots start with experts 0 ...
    N-1."""

    trace: (
        Annotated[str, Field(min_length=1), AfterValidator(_usable_as_path)] | None
    ) = None
    """A file that records which experts each step of each layer needed, for
    `vllm-moe-prefetch tune`. It holds no text. Rank R beyond the first adds `.rankR` to
    the name, and tensor-parallel ranks, which need the same, record nothing. A file of
    that name is kept as `NAME.previous`. Not given: nothing is recorded."""

    trace_limit: Annotated[str, AfterValidator(_at_least_a_mib)] = "256MiB"
    """The size at which the recording of a rank ends, at least 1MiB."""

    @classmethod
    def of(cls, carrier: "EngineArgs | VllmConfig") -> "MoEPrefetchConfig | None":
        """The request in `carrier.additional_config`: the only place that reads it.

        Returns:
            The validated request, or None if expert slots were not asked for.

        Raises:
            MoEPrefetchError: a value is out of range, of the wrong type, or unknown.
        """
        additional = carrier.additional_config
        if not isinstance(additional, dict):
            return None
        slots = additional.get(SLOTS_KEY)
        options = additional.get(OPTIONS_KEY)
        if slots is None:
            if options is not None and options != {}:
                raise MoEPrefetchError(
                    f"{OPTIONS_KEY}={options!r} was given without {SLOTS_KEY}. "
                    "Add --moe-gpu-prefetch N, or drop the options."
                )
            return None
        return cls.validated(slots, {} if options is None else options)

    def slots_of(self, draft: bool) -> int | str:
        """Slots per MoE layer of the model, or of its draft."""
        return (
            self.draft_slots if draft and self.draft_slots is not None else self.slots
        )

    @classmethod
    def validated(cls, slots: Any, options: Any) -> "MoEPrefetchConfig":
        """Builds the request from a slot count and options, both unchecked.

        Raises:
            MoEPrefetchError: a value is out of range, of the wrong type, or unknown.
        """
        number = isinstance(slots, int) and not isinstance(slots, bool) and slots >= 1
        size = (
            isinstance(slots, str) and slots[:1].isdecimal() and not slots.isdecimal()
        )
        if size:
            try:
                size_in_bytes(slots)
            except ValueError as error:
                raise MoEPrefetchError(
                    f"--moe-gpu-prefetch {slots}: {error}."
                ) from None
        if slots != "auto" and not number and not size:
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch {slots!r}: expected the number of expert slots "
                "per MoE layer, an integer of at least 1; or a size like 12GiB; or "
                "auto."
            )
        if not isinstance(options, dict) or not options.keys() <= set(_OPTIONS):
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch-config {options!r}: expected a JSON object with "
                f"keys of {', '.join(_OPTIONS)}; the slot count goes to "
                "--moe-gpu-prefetch."
            )
        try:
            made = cls(slots=slots, **options)  # type: ignore[call-arg]
        except ValidationError as error:
            reasons = "; ".join(
                f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}"
                for e in error.errors()
            )
            raise MoEPrefetchError(f"--moe-gpu-prefetch-config: {reasons}") from None
        for option, used, where, way in (
            ("lfu_half_life", made.policy == "lfu", "with policy lru", "policy lfu"),
            ("trace_limit", made.trace is not None, "without trace", "trace FILE"),
        ):
            if not used and getattr(made, option) != getattr(cls, option):
                raise MoEPrefetchError(
                    f"--moe-gpu-prefetch-config.{option} {options[option]} has no "
                    f"effect {where}. Add {way}, or drop it."
                )
        return made


_OPTIONS = [field.name for field in fields(MoEPrefetchConfig) if field.name != "slots"]  # type: ignore[arg-type]
