# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Traces: which experts each step of a layer needed, recorded to a file."""
