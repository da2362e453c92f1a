# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What stands in for a name of vLLM's goes when its time is over, however that ends."""

from types import SimpleNamespace

import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced


def test_what_was_replaced_comes_back():
    owner = SimpleNamespace(name="stock")
    with pytest.raises(KeyError), replaced(owner, "name", "ours"):
        assert owner.name == "ours"
        raise KeyError
    assert owner.name == "stock"
