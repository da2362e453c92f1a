# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The memory of a layer's experts: the host store, rows on the device, and host pages
that kernels can reach."""
