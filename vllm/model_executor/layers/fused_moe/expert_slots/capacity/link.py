# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The link between host and GPU: its bandwidth, and the time that misses take on it.

If routing is uniform and independent from step to step, an expert that a token needs is
resident with probability N / E, whatever the policy. So a decode step of one sequence
loads

    sum over the MoE layers:  top_k * (1 - N / E) * bytes of an expert

and takes at least this divided by the bandwidth, because a layer's kernel waits for its
loads. Real routing repeats experts and loads less: this is the high end, as in
`planner.distinct_experts`.

vLLM's `--cpu-offload-gb` on the experts is bound by the same link. Its kernel reads
every expert that a token needs and that is not on the GPU. With the same GPU memory it
keeps L * N + (E - N) experts there, for L MoE layers, so a token reads (L - 1) / L of
the bytes above. So the warning does not advise it. `--offload-backend prefetch` copies
whole layers while others compute. That can be faster if a step needs nearly all experts
(long prompts, large batches), and is slower if it needs few.
"""

import argparse
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.model_executor.layers.fused_moe.expert_slots.sizes import size_in_bytes

if TYPE_CHECKING:
    import torch

    from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import (
        ExpertRows,
    )

SLOW_LINK = 10e9
"""Bytes a second that every PCIe 3.0 x16 link exceeds: 12 to 14 GB/s are measured on
it, 25 to 27 on PCIe 4.0 x16, about 53 on PCIe 5.0 x16."""

FEW_TOKENS = 5.0
"""Tokens a second of one sequence below which the warning comes: about the speed of
reading."""

_PIECE = 32 << 20
"""Bytes of one copy. At 50 GB/s the start of the copy is then about 2 % of its time."""

_LEAST = 1 << 20
"""Bytes below which a copy measures its start, not the link."""

_ENOUGH, _PATIENCE_S = 256 << 20, 0.25
"""Measuring ends after this many bytes, or on a slow link after this many seconds."""


def bandwidth(text: str) -> int:
    """Reads `25GB/s` or `25 GiB/s`, as a type for argparse. Returns bytes a second."""
    try:
        if re.search("[KMGT]b", text):
            raise ValueError("bits or bytes")
        return size_in_bytes(re.sub(r"/\s*s\s*$", "", text, flags=re.IGNORECASE))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a bandwidth like 25GB/s or 25GiB/s"
        ) from None


def staging_copies(
    rows: "ExpertRows",
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """Copies that measure the link without further memory: for each tensor of a layer,
    experts from the host store into staging rows. No later step reads what a staging
    row holds.

    Yields:
        (target, source): rows on the device and in the host store, `_PIECE` bytes or
            one row.
    """
    for name, tensor in rows.tensors.items():
        count = min(rows.num_staged, max(1, _PIECE // tensor[0].nbytes))
        yield tensor[:count], rows.store.tensors[name][:count]


def measured_bandwidth(
    copies: Iterable[tuple["torch.Tensor", "torch.Tensor"]],
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Host-to-device bandwidth in bytes a second, measured within half a second.

    The copies are torch's, done by the GPU's copy engine. A step's loads are made by a
    kernel that reads the same pinned memory (`cuda/gather_kernel.py`);
    `benchmarks/gpu/proof.py micro` times both. Not yet run on a GPU.

    Args:
        copies: (target on the device, source in pinned host memory), as
            `staging_copies` gives them. The first is also made once before, untimed,
            to warm up.
        clock: seconds.

    Returns:
        None if no copy is large enough.
    """
    large = [(target, source) for target, source in copies if target.nbytes >= _LEAST]
    if not large:
        return None
    large[0][0].copy_(large[0][1])
    moved, begin = 0, clock()
    for target, source in itertools.cycle(large):
        target.copy_(source)  # returns when the bytes are there
        moved += target.nbytes
        spent = clock() - begin
        if moved >= _ENOUGH or spent >= _PATIENCE_S:
            break
    return moved / spent


@dataclass(frozen=True)
class LinkCost:
    """The time that misses take on a link.

    Attributes:
        bandwidth: host to device, bytes a second.
        bytes_per_expert: of the layer whose experts are largest.
        bytes_per_token: what a decode step of one sequence loads if routing is uniform.
    """

    bandwidth: float
    bytes_per_expert: int
    bytes_per_token: float

    @property
    def seconds_per_miss(self) -> float:
        return self.bytes_per_expert / self.bandwidth

    @property
    def seconds_per_token(self) -> float:
        """The least that a decode step of one sequence takes, if routing is uniform."""
        return self.bytes_per_token / self.bandwidth

    @property
    def tokens_per_second(self) -> float:
        """The most that one sequence decodes, if routing is uniform; infinite without
        misses."""
        return 1 / self.seconds_per_token if self.bytes_per_token else math.inf

    def sentence(self, origin: str = "measured") -> str:
        """The figures in words.

        Args:
            origin: where the bandwidth is from: "measured" or "given".
        """
        link = f"Host-to-device: {_decimal(self.bandwidth)}/s {origin}"
        if not self.bytes_per_token:
            return f"{link}; every expert has its slot, so no token loads one."
        return (
            f"{link}; an expert of {_decimal(self.bytes_per_expert)} takes "
            f"{_milliseconds(self.seconds_per_miss)}. With uniform routing a token of "
            f"one sequence loads {_decimal(self.bytes_per_token)}, which takes "
            f"{_milliseconds(self.seconds_per_token)} (at most "
            f"{self.tokens_per_second:,.1f} tokens/s); real routing repeats experts "
            "and loads less."
        )

    def warning(self) -> str | None:
        """Why slots are likely to be slow on this link, and the way out; or None."""
        reasons = []
        if self.bytes_per_token and self.bandwidth < SLOW_LINK:
            reasons.append(
                f"Host-to-device bandwidth is {_decimal(self.bandwidth)}/s; PCIe 3.0 "
                "x16 gives about 12 GB/s. Look for a narrow PCIe connection, a riser "
                "or a link that was trained down: nvidia-smi "
                "--query-gpu=pcie.link.gen.max,pcie.link.width.current --format=csv."
            )
        if self.tokens_per_second < FEW_TOKENS:
            reasons.append(
                "Loading experts over this link limits one sequence to about "
                f"{self.tokens_per_second:,.1f} tokens/s if routing is uniform. Raise "
                "--moe-gpu-prefetch, or serve a model that fits the GPU without "
                "slots (smaller, or quantised). --cpu-offload-gb is bound by the "
                "same link."
            )
        return " ".join(reasons) or None


def link_cost(
    bandwidth: float, layers: Iterable[tuple[int, float, int, int]]
) -> LinkCost:
    """The cost of misses of `layers`.

    Args:
        bandwidth: bytes a second, host to device.
        layers: (experts, top-k, slots, bytes of an expert) of every MoE layer of a
            rank, or of one rank of each pipeline stage. Under expert parallelism
            experts are those of the rank, and top-k is its share.
    """
    layers = list(layers)
    return LinkCost(
        bandwidth,
        max((size for *_, size in layers), default=0),
        sum(
            top_k * (1 - slots / experts) * size
            for experts, top_k, slots, size in layers
        ),
    )


def _decimal(num_bytes: float) -> str:
    """A size in powers of ten, as bandwidths are."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return (
                f"{num_bytes / scale:,.{1 if num_bytes >= 10 * scale else 2}f} {unit}"
            )
    return f"{num_bytes:,.0f} B"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{0 if seconds >= 0.1 else 2}f} ms"
