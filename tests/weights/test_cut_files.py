# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine does not start on a checkpoint that was cut."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.support.engine import start
from tests.support.sample import make_checkpoint, make_gpt_oss
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    stores,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3-moe", layers=2)


def cut_copy(checkpoint, directory, name, tensor_of):
    """A copy of a checkpoint in which one tensor is `tensor_of(it)`."""
    shutil.copytree(checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensor_of(tensors[name]).contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_cut_file_ends_the_start_and_makes_no_store(small, tmp_path):
    """The case that was served: two runs differed. A shared store is not completed from
    it."""
    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    broken = cut_copy(small, tmp_path / "cut", name, lambda tensor: tensor[:, :32])
    place = tmp_path / "stores"
    words = (
        r"model\.layers\.1\.mlp\.experts\S*\.w2_weight takes w2 of expert 7 as \[128, "
        r"64\], the "
        r"checkpoint has \[128, 32\]\. Fetch the checkpoint again"
    )
    with pytest.raises(MoEPrefetchError, match=words):
        start(broken, slots=8, shared_store=str(place))
    assert stores(place) == []


def test_so_does_one_of_gpt_oss(tmp_path):
    """It copies whole tensors itself. Torch repeats one expert's tensor over all
    experts."""
    checkpoint = make_gpt_oss(tmp_path / "gpt-oss")
    name = "model.layers.1.mlp.experts.down_proj"
    broken = cut_copy(checkpoint, tmp_path / "cut", name, lambda tensor: tensor[:1])
    words = (
        r"w2_weight takes all experts as \[16, 128, 64\], the checkpoint has \[1, 128, "
        r"64\]"
    )
    with pytest.raises(MoEPrefetchError, match=words):
        start(broken, slots=8, dtype="bfloat16")
