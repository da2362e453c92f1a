# SPDX-License-Identifier: Apache-2.0
"""Expert slots on CUDA: decisions and loads are kernels."""
