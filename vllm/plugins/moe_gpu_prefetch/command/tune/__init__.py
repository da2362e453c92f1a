# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm-moe-prefetch tune`: what other numbers of slots and another policy would have
loaded, from a trace."""
