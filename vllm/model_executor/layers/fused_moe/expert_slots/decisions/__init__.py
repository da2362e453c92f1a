# SPDX-License-Identifier: Apache-2.0
"""What a step does: needed experts, victims, rows. No device, no copies."""
