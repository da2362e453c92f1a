# SPDX-License-Identifier: Apache-2.0
"""Expert slots: a bounded, managed cache of active experts in front of a host store."""
