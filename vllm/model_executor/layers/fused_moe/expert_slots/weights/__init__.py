# SPDX-License-Identifier: Apache-2.0
"""The memory of a layer's experts: rows on the device, and host pages that kernels can reach."""
