# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a step does: needed experts, victims, rows. Without a device and copies."""
