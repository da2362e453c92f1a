# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An expert that is not whole is never served: unquantised tensors through stock's own
loaders, into layers of stock's classes."""

import re
from typing import Any

import pytest
import torch
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

from tests.support.expert_loading import (
    EXPERTS,
    HIDDEN,
    WIDTH,
    assert_refused,
    bf16,
    load,
    make_layer,
    whole,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights.coverage import (
    LoadCoverage,
    watching,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "first of two ranks": {"ranks": 2},
    "second of two ranks": {"ranks": 2, "rank": 1},
    "expert parallel": {"expert_ranks": 2},
    "padded hidden size": {"padding": (8, 0)},
    "padded width": {"padding": (0, 8)},
    "padded both, second of two ranks": {"padding": (16, 20), "ranks": 2, "rank": 1},
    "not gated": {"gated": False},
    "biases": {"bias": True},
    "biases, second of two ranks": {"bias": True, "ranks": 2, "rank": 1},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_whole_checkpoint_is_loaded_in_every_layout(name):
    """Nothing is refused that stock loads whole, and what it loads is where stock puts
    it."""
    layout = LAYOUTS[name]
    layer = make_layer(**layout)
    tensors = whole(layout.get("gated", True), layout.get("bias", False))
    load(layer, tensors)
    width = WIDTH // layout.get("ranks", 1)
    mine = slice(width * layout.get("rank", 0), width * (layout.get("rank", 0) + 1))
    last = tensors[f"{EXPERTS - 1}.down_proj.weight"]
    assert torch.equal(layer.w2_weight[-1, :HIDDEN, :width], last[:, mine])


def changed(tensor):
    """`tensor` in all shapes that are not its own."""
    cut = {
        "scalar": tensor.reshape(-1)[0],
        "empty": tensor[:0],
        "flat": tensor.reshape(-1, 1)[:1],
    }
    for dim, size in enumerate(tensor.shape):
        cut[f"half of dimension {dim}"] = tensor.narrow(dim, 0, size // 2)
        cut[f"less one in dimension {dim}"] = tensor.narrow(dim, 0, size - 1)
        cut[f"one of dimension {dim}"] = tensor.narrow(dim, 0, 1)
        cut[f"none of dimension {dim}"] = tensor.narrow(dim, 0, 0)
        cut[f"one more in dimension {dim}"] = torch.cat(
            [tensor, tensor.narrow(dim, 0, 1)], dim
        )
        cut[f"twice in dimension {dim}"] = torch.cat([tensor, tensor], dim)
    if tensor.dim() == 2:
        cut["transposed"] = tensor.t()
    return cut


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "not gated"])
@pytest.mark.parametrize(
    "part", ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
)
def test_a_tensor_of_another_shape_is_refused(layout, part):
    """In every direction, padded or not (a larger one may fit into the padding), on
    every rank, before another tensor is read; with the layer, the parameter, the expert
    and both shapes."""
    name = f"3.{part}"
    for wrong in changed(whole()[name]).values():
        layer = make_layer(**LAYOUTS[layout])
        shard = {"gate": "w1", "up": "w3", "down": "w2"}[part.split("_")[0]]
        found, needed = list(wrong.shape), list(whole()[name].shape)
        words = (
            rf"w\d+_weight takes {shard} of expert 3 as \{needed}, the checkpoint has "
            rf"\{found}"
        )
        assert_refused(layer, {name: wrong}, words.replace("]", r"\]"))


@pytest.mark.parametrize("layout", ["biases", "biases, second of two ranks"])
@pytest.mark.parametrize("part", ["gate_proj.bias", "up_proj.bias", "down_proj.bias"])
def test_so_is_a_bias(layout, part):
    """Biases are one dimension less."""
    name = f"3.{part}"
    for wrong in changed(whole(bias=True)[name]).values():
        assert_refused(
            make_layer(**LAYOUTS[layout]), {name: wrong}, r"takes w\d of expert 3 as \["
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_tensor_is_refused_by_name(layout):
    """Each of an expert's: with its number in the checkpoint, and how much there is."""
    options = LAYOUTS[layout]
    tensors = whole(options.get("gated", True), options.get("bias", False))
    for name in [name for name in tensors if name.startswith("3.")]:
        parameter = "w2" if "down" in name else "w13"
        kind = name.rpartition(".")[2]
        half = parameter == "w13" and options.get("gated", True)
        rest = {n: t for n, t in tensors.items() if n != name}
        words = (
            rf"incomplete: .*\.{parameter}_{kind} got (\d+) of (\d+) elements of "
            rf"expert 3\. "
        )
        with pytest.raises(MoEPrefetchError) as refusal:
            load(make_layer(**options), rest)
        got, needed = map(int, re.search(words, str(refusal.value)).groups())
        assert got == (needed // 2 if half else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_is_a_part_that_all_experts_lack(layout):
    """No expert has more than another, and none is whole."""
    options = LAYOUTS[layout]
    tensors = whole(options.get("gated", True), options.get("bias", False))
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if ".up_proj.weight" not in name
    }
    assert_refused(
        make_layer(**options), rest, r"w13_weight got \d+ of \d+ elements of expert \d"
    )


def fused(tensors, transposed):
    """The same with all experts in one tensor, [E, 2 * width, hidden] and [E, hidden,
    width]."""
    of = {
        part: torch.stack([tensors[f"{e}.{part}.weight"] for e in range(EXPERTS)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    made = {
        "gate_up_proj": torch.cat([of["gate_proj"], of["up_proj"]], 1),
        "down_proj": of["down_proj"],
    }
    return {
        n: t.transpose(1, 2).contiguous() if transposed else t for n, t in made.items()
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["whole", "second of two ranks", "padded width"])
def test_fused_files(layout, transposed):
    """All experts in a tensor, gate and up in one, in both orientations: whole is
    loaded as the per-expert files are, any other shape is refused."""
    tensors = whole()
    one, other = (
        make_layer(**LAYOUTS[layout]),
        make_layer(**LAYOUTS[layout], transposed=transposed),
    )
    for layer in (one, other):
        for parameter in layer.parameters():
            parameter.data.zero_()
    load(one, tensors)
    load(other, fused(tensors, transposed))
    assert torch.equal(one.w13_weight, other.w13_weight)
    assert torch.equal(one.w2_weight, other.w2_weight)
    for name, tensor in fused(tensors, transposed).items():
        for dim in (0, 1, 2):
            files = fused(tensors, transposed)
            for size in {1, tensor.shape[dim] // 2, tensor.shape[dim] - 2}:
                files[name] = tensor.narrow(dim, 0, size)
                layer = make_layer(**LAYOUTS[layout], transposed=transposed)
                assert_refused(
                    layer, files, rf"\.{'w13' if 'up' in name else 'w2'}_weight "
                )


def test_one_tensor_for_the_weight_loader_with_all_experts():
    """As Llama-4's loader hands it over: [E, width, hidden], in one call."""
    layer = make_layer()
    for experts in (EXPERTS, 1, 3):
        gate = bf16(experts, WIDTH, HIDDEN)
        call = (layer.w13_weight, gate, "w13_weight", "w1", 0)
        if experts == EXPERTS:
            layer.weight_loader(*call)
            assert torch.equal(layer.w13_weight[:, :WIDTH], gate)
            continue
        with pytest.raises(
            MoEPrefetchError, match=r"w1 of all experts as \[4, 24, 16\]"
        ):
            layer.weight_loader(*call)


def test_experts_that_gpt_oss_streams():
    """Its own weight loader would cut a larger tensor and fill a part with a smaller
    one."""
    parts = {
        ("w13_weight", "gpt_oss_w13"): (HIDDEN, 2 * WIDTH),
        ("w2_weight", "gpt_oss_w2"): (WIDTH, HIDDEN),
        ("w13_bias", "gpt_oss_w13"): (2 * WIDTH,),
        ("w2_bias", "gpt_oss_w2"): (HIDDEN,),
    }
    for rank in (0, 1):
        layer = make_layer(GptOssRoutedExperts, bias=True, ranks=2, rank=rank)
        with watching([layer.load_coverage]):
            for (name, shard), shape in parts.items():
                for expert in range(EXPERTS):
                    layer.weight_loader(
                        getattr(layer, name), bf16(*shape), name, shard, expert
                    )
        for (name, shard), shape in parts.items():
            for wrong in changed(bf16(*shape)).values():
                with pytest.raises(
                    MoEPrefetchError, match=rf"{name} takes {shard} of expert 2 as"
                ):
                    layer.weight_loader(getattr(layer, name), wrong, name, shard, 2)


def test_what_a_model_copies_itself_is_watched():
    """Whole tensors, one expert's and a half at a time; a copy that Torch would repeat
    over the experts is refused, and so is an expert that nothing was copied to."""
    layer = make_layer()
    with watching([layer.load_coverage]):
        layer.w13_weight.copy_(bf16(EXPERTS, 2 * WIDTH, HIDDEN))
        layer.w2_weight.data.transpose(1, 2)[...] = bf16(EXPERTS, WIDTH, HIDDEN)
    assert (
        not layer.load_coverage.watched
    )  # or the memory would be held beside what it becomes
    layer = make_layer()
    with watching([layer.load_coverage]):
        for half in (slice(0, WIDTH), slice(WIDTH, None)):
            layer.w13_weight.data[:, half] = bf16(EXPERTS, WIDTH, HIDDEN)
        for expert in range(EXPERTS):
            layer.w2_weight.data[expert].view(-1).copy_(bf16(HIDDEN * WIDTH))
    words = "w13_weight got 0 of 768 elements of expert 0 and of 3 more"
    with (
        pytest.raises(MoEPrefetchError, match=words),
        watching([make_layer().load_coverage]),
    ):
        pass
    words = (
        r"w13_weight takes all experts as \[4, 48, 16\], the checkpoint has \[1, 48, "
        r"16\]"
    )
    layer = make_layer()
    with pytest.raises(MoEPrefetchError, match=words), watching([layer.load_coverage]):
        layer.w13_weight.copy_(bf16(1, 2 * WIDTH, HIDDEN))
    layer = make_layer()
    words = "w2_weight got 360 of 384 elements of expert 1 and of 2 more"
    with pytest.raises(MoEPrefetchError, match=words), watching([layer.load_coverage]):
        layer.w13_weight.copy_(bf16(EXPERTS, 2 * WIDTH, HIDDEN))
        layer.w2_weight.data[0].copy_(bf16(HIDDEN, WIDTH))
        layer.w2_weight.data[1:, :-1].copy_(bf16(EXPERTS - 1, HIDDEN - 1, WIDTH))


def test_experts_that_a_model_sets_to_zero():
    """Padding of its layout counts as whole; a whole parameter does not, or a missing
    expert would be served as zeros."""
    for fill in (torch.Tensor.zero_, lambda part: part.fill_(0.0)):
        layer = make_layer()
        with watching([layer.load_coverage]):
            for parameter in (layer.w13_weight.data, layer.w2_weight.data):
                parameter[:-1] = bf16(EXPERTS - 1, *parameter.shape[1:])
                fill(parameter[-1])
        layer = make_layer()
        words = "w13_weight got 0 of 768 elements of expert 0 and of 3 more"
        with (
            pytest.raises(MoEPrefetchError, match=words),
            watching([layer.load_coverage]),
        ):
            for parameter in (layer.w13_weight.data, layer.w2_weight.data):
                fill(parameter)


def test_other_formats_are_not_watched():
    """Dummy weights are no checkpoint, and may be anything."""
    layer = make_layer()
    coverage = LoadCoverage(layer, "dummy")
    with watching([coverage]):
        assert coverage.watched == {}
