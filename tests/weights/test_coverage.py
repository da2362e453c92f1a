# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An expert that is not whole is never served. Tensors go through stock's own loaders,
into layers of stock's classes; the engine is started on checkpoints that were cut."""

import re
import shutil
from dataclasses import replace
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

from tests.support.engine import start
from tests.support.sample import make_checkpoint, make_gpt_oss
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.layer import slotted_class
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import stores
from vllm.model_executor.layers.fused_moe.expert_slots.weights.coverage import (
    LoadCoverage,
    _by_row,
    _elements,
    watching,
)

EXPERTS, HIDDEN, WIDTH = 4, 16, 24
UNQUANTIZED = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
FP8_METHOD = "vllm.model_executor.layers.quantization.fp8"

slotted = cache(slotted_class)


def make_layer(
    stock=RoutedExperts,
    *,
    ranks=1,
    rank=0,
    expert_ranks=1,
    bias=False,
    gated=True,
    padding=(0, 0),
    transposed=False,
    method=None,
):
    """A layer of `stock`'s class with empty parameters and our weight loader.

    Args:
        expert_ranks: ranks that share the experts; this is the last.
        padding: what the method adds to the hidden size and to the width.
        method: makes a quantisation method of a FusedMoEConfig; None for stock's
            unquantised one.
    """

    real = stock._get_quant_method

    def padding_method(self, prefix, quant_config, moe_config):
        made = method(moe_config) if method else real(self, prefix, None, moe_config)
        made.maybe_roundup_sizes = lambda hidden, width, *_: (
            hidden + padding[0],
            width + padding[1],
        )
        return made

    parallel = replace(
        FusedMoEParallelConfig.make_no_parallel(),
        tp_size=ranks,
        tp_rank=rank,
        ep_size=expert_ranks,
        ep_rank=expert_ranks - 1,
        use_ep=expert_ranks > 1,
    )
    config = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=2,
        hidden_dim=HIDDEN,
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS // expert_ranks,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        has_bias=bias,
    )
    if not gated:  # which the CPU platform refuses
        config.activation = MoEActivation.RELU2_NO_MUL
    with (
        set_current_vllm_config(VllmConfig()),
        patch(
            f"{UNQUANTIZED}.select_unquantized_moe_backend", lambda **_: (None, None)
        ),
        patch(f"{FP8_METHOD}.validate_fp8_block_shape_moe"),
        patch.object(stock, "_get_quant_method", padding_method),
    ):
        layer = (cls := slotted(stock)).__new__(cls)
        stock.__init__(
            layer,
            layer_name="model.layers.1.mlp.experts",
            params_dtype=torch.bfloat16,
            moe_config=config,
            quant_config=None,
            expert_map_manager=ExpertMapManager(
                max_num_batched_tokens=8,
                top_k=2,
                global_num_experts=EXPERTS,
                num_redundant_experts=0,
                num_expert_group=None,
                moe_parallel_config=parallel,
                placement_strategy="linear",
                enable_eplb=False,
            ),
            ckpt_up_proj_name="up_proj" if gated else None,
            ckpt_gate_proj_name="gate_proj" if gated else "up_proj",
            is_fused_checkpoint_transposed=transposed,
        )
    layer.load_coverage = LoadCoverage(layer, "auto")
    return layer


def bf16(*shape):
    return torch.randn(shape).bfloat16()


def whole(gated=True, bias=False):
    """A layer's tensors, one an expert and projection, by their names in a
    checkpoint."""
    up = ["gate_proj", "up_proj"] if gated else ["up_proj"]
    tensors = {}
    for expert in range(EXPERTS):
        tensors |= {f"{expert}.{name}.weight": bf16(WIDTH, HIDDEN) for name in up}
        tensors[f"{expert}.down_proj.weight"] = bf16(HIDDEN, WIDTH)
        if bias:
            tensors |= {f"{expert}.{name}.bias": bf16(WIDTH) for name in up}
            tensors[f"{expert}.down_proj.bias"] = bf16(HIDDEN)
    return tensors


def load(layer, tensors):
    """By stock's loader, under the watch that a start has."""
    with watching([layer.load_coverage]):
        for _ in layer.load_weights(tensors.items()):
            pass


def assert_refused(layer, tensors, words):
    """In one line that names the layer and says what to do."""
    with pytest.raises(MoEPrefetchError, match=words) as refusal:
        load(layer, tensors)
    line = str(refusal.value)
    assert "\n" not in line and "Fetch the checkpoint again" in line
    assert "model.layers.1.mlp.experts.w" in line


LAYOUTS = {
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
    layer.load_coverage = LoadCoverage(layer, "dummy")
    with watching([layer.load_coverage]):
        pass


def without_init(cls, **attributes):
    """A quantisation method of stock's whose kernel needs a GPU, for its
    create_weights."""

    def make(moe_config):
        method = cls.__new__(cls)
        method.moe, method.moe_quant_config, method.moe_kernel = moe_config, None, None
        vars(method).update(attributes)
        return method

    return make


def fp8(block):
    config = SimpleNamespace(activation_scheme="dynamic")
    name = "weight_scale_inv" if block else "weight_scale"
    return without_init(
        Fp8MoEMethod,
        quant_config=config,
        block_quant=bool(block),
        weight_block_size=block,
        moe_block_shape=block,
        weight_scale_refine=None,
        weight_scale_name=name,
    )


def gptq():
    config = SimpleNamespace(group_size=8, pack_factor=8)
    return without_init(AutoGPTQMoEMethod, quant_config=config, input_dtype=None)


def wna16():
    return without_init(
        CompressedTensorsWNA16MoEMethod,
        strategy="group",
        group_size=8,
        symmetric=True,
        packed_factor=Fraction(8),
    )


def packed(parts):
    """A checkpoint of a packed format.

    Args:
        parts: suffix of a tensor's name -> (dtype, shape of gate and up, shape of
            down).
    """
    tensors = {}
    for expert in range(EXPERTS):
        for suffix, (dtype, up, down) in parts.items():
            for part, shape in (
                ("gate_proj", up),
                ("up_proj", up),
                ("down_proj", down),
            ):
                tensors[f"{expert}.{part}.{suffix}"] = torch.ones(shape).to(dtype)
    return tensors


FP8, INT, F32 = torch.float8_e4m3fn, torch.int32, torch.float32
WEIGHT = {"weight": (FP8, (WIDTH, HIDDEN), (HIDDEN, WIDTH))}
PACKED = {
    "fp8, a scale each": (fp8(None), WEIGHT | {"weight_scale": (F32, (), ())}),
    "fp8, a scale each in a list": (
        fp8(None),
        WEIGHT | {"weight_scale": (F32, (1,), (1,))},
    ),
    "fp8, a scale a block": (
        fp8([8, 8]),
        WEIGHT | {"weight_scale_inv": (F32, (3, 2), (2, 3))},
    ),
    "gptq": (
        gptq(),
        {
            "qweight": (INT, (HIDDEN // 8, WIDTH), (WIDTH // 8, HIDDEN)),
            "scales": (F32, (2, WIDTH), (3, HIDDEN)),
            "qzeros": (INT, (2, WIDTH // 8), (3, HIDDEN // 8)),
        },
    ),
    "compressed tensors": (
        wna16(),
        {
            "weight_packed": (INT, (WIDTH, HIDDEN // 8), (HIDDEN, WIDTH // 8)),
            "weight_scale": (F32, (WIDTH, 2), (HIDDEN, 3)),
            "weight_shape": (F32, (2,), (2,)),
        },
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_formats_as_they_come(name):
    """What is whole is loaded, padded too. Their shapes are not known beforehand: an
    expert that got less than another is refused, whatever of it is missing or cut."""
    method, parts = PACKED[name]
    tensors = packed(parts)
    load(make_layer(method=method), tensors)
    if "fp8" in name:
        load(make_layer(method=method, padding=(8, 8)), tensors)
    for key in [key for key in tensors if key.startswith("2.")]:
        if "up_proj.weight_shape" in key or "gate_proj.weight_shape" in key:
            continue  # One parameter for both: each fills it.
        rest = {n: t for n, t in tensors.items() if n != key}
        assert_refused(
            make_layer(method=method), rest, r"got \d+ of \d+ elements of expert 2\."
        )
        if tensors[key].dim() == 2:
            cut = tensors | {key: tensors[key][:-1]}
            assert_refused(make_layer(method=method), cut, r"elements of expert 2\.")
    for suffix in parts:
        required = suffix in ("weight", "weight_packed", "qweight")
        rest = {n: t for n, t in tensors.items() if not n.endswith(f".{suffix}")}
        if required:
            words = r"got 0 of \d+ elements of expert 0 and of 3 more"
            assert_refused(make_layer(method=method), rest, words)


def test_regions_are_counted_as_torch_writes_them():
    """Views of every kind, against a tensor that they are written to."""
    shape = (3, 4, 5)
    views = [
        lambda t: t,
        lambda t: t[1],
        lambda t: t[2, 3, 4],
        lambda t: t[:, 1:3],
        lambda t: t[1:, :, ::2],
        lambda t: t.transpose(0, 2)[1:3],
        lambda t: t.transpose(1, 2)[:, 2:],
        lambda t: t.view(-1)[7:49],
        lambda t: t.view(12, 5)[3:9, 1:3],
        lambda t: t.view(-1)[3::7],
        lambda t: t.permute(2, 0, 1)[::3, :2, ::2],
    ]
    for first in views:
        for second in views:
            written, counted = (
                torch.zeros(shape, dtype=torch.bool),
                [set() for _ in range(3)],
            )
            for view in (first(written), second(written)):
                view.fill_(True)
                extents = [
                    (s, n)
                    for s, n in zip(view.stride(), view.shape, strict=True)
                    if n > 1
                ]
                extents.sort(reverse=True)
                for row, region in _by_row(view.storage_offset(), tuple(extents), 20):
                    counted[row].add(region)
            got = [_elements(20, frozenset(regions)) for regions in counted]
            assert got == written.flatten(1).sum(1).tolist()


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
