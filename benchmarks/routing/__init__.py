# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Routing for benchmarks on random weights, which route almost uniformly where real
models do not.

`odds` draws the ids, `strategy` makes vLLM use them, `published` holds them against
what is published of real models.
"""
