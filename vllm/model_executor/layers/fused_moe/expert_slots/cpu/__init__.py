# SPDX-License-Identifier: Apache-2.0
"""Expert slots on the CPU platform."""
