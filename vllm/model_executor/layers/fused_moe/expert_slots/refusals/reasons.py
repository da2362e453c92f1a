# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reasons that are given in two places: for arguments, before the start; and for a
layer, while it is built, or for a call of the running worker. The environment
(VLLM_DP_SIZE) and a VllmConfig that a script makes itself reach a layer without any
arguments."""

DATA_PARALLEL = (
    "data-parallel ranks exchange tokens after the slots were chosen; exact results "
    "have not been verified for this"
)
CONTEXT_PARALLEL = (
    "ranks of prefill context parallelism exchange tokens after the slots were chosen; "
    "exact results have not been verified for this"
)
EPLB = "EPLB moves experts between ranks, and the slots' tables would not follow"
LORA = "adapters are indexed by expert id, and the kernel gets row numbers"
NO_EXPERT_MAP = "stock's CPU kernels take no expert map"
NEVER_WRITTEN = "the experts in host memory are never written after loading"
OWN_DECODE = "a model's own decode kernels read the experts' weights by expert id"
OTHER_CHECKPOINT = (
    "Serve a checkpoint in a format of docs/quantisation.md (compressed-tensors, GPTQ, "
    "AWQ, FP8, MXFP4, NVFP4)"
)
OTHER_BACKEND = "Use --moe-backend triton or marlin, whichever takes the format"
CHANNEL_SCALES = "Serve a checkpoint with a scale for each channel, and dynamic ones"
