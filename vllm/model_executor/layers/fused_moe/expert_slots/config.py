# SPDX-License-Identifier: Apache-2.0
"""What the user asked for: one validated object, carried by `VllmConfig.additional_config`."""

from typing import Any, Literal

from pydantic import Field, ValidationError
from vllm.config.utils import config

SLOTS_KEY = "moe_gpu_prefetch"
OPTIONS_KEY = "moe_gpu_prefetch_config"


class MoEPrefetchError(ValueError):
    """The request cannot be served; the message says what was asked, why not, and the way out."""


@config
class MoEPrefetchConfig:
    """Expert slots for Mixture-of-Experts models."""

    slots: int = Field(ge=1)
    """Number of expert slots per MoE layer and rank. Every routed expert lives in host memory; this
    many are resident at a time. Raised to the router's top-k when it is lower; at or above the
    number of experts nothing is offloaded. Not given: stock vLLM."""

    policy: Literal["lru", "lfu"] = "lru"
    """Which resident expert is evicted first: `lru`, the one needed longest ago; `lfu`, the one
    needed least often, counts decaying with `lfu_half_life`."""

    lfu_half_life: int = Field(default=128, ge=1, le=1 << 20)
    """For `lfu`: the number of steps of a layer after which a count is worth half."""

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "MoEPrefetchConfig | None":
        """Reads the request out of `VllmConfig.additional_config`.

        Returns:
            The validated configuration, or None where expert slots were not asked for.

        Raises:
            MoEPrefetchError: a value is out of range, of the wrong type, or unknown.
        """
        if not isinstance(additional_config, dict):
            return None
        slots = additional_config.get(SLOTS_KEY)
        options = additional_config.get(OPTIONS_KEY)
        if slots is None:
            if options:
                raise MoEPrefetchError(
                    f"{OPTIONS_KEY}={options!r} was given without {SLOTS_KEY}. "
                    "Add --moe-gpu-prefetch N, or drop the options."
                )
            return None
        return cls.validated(slots, options or {})

    @classmethod
    def validated(cls, slots: Any, options: Any) -> "MoEPrefetchConfig":
        """Builds the configuration from a slot count and an options mapping, both untrusted."""
        if slots == "auto":
            raise MoEPrefetchError(
                "--moe-gpu-prefetch auto is not available yet: give the number of slots per MoE "
                "layer, for example --moe-gpu-prefetch 32."
            )
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch {slots!r}: the number of expert slots per MoE layer must be "
                "an integer of at least 1."
            )
        if not isinstance(options, dict) or "slots" in options:
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch-config {options!r}: expected a JSON object with the keys "
                "policy and lfu_half_life; the slot count goes to --moe-gpu-prefetch."
            )
        try:
            return cls(slots=slots, **options)  # type: ignore[call-arg]
        except (ValidationError, TypeError) as error:
            if not isinstance(error, ValidationError):
                raise MoEPrefetchError(f"--moe-gpu-prefetch-config: {error}") from None
            reasons = "; ".join(
                f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()
            )
            raise MoEPrefetchError(f"--moe-gpu-prefetch-config: {reasons}") from None
