# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Makes small checkpoints in Hugging Face format: random weights, a tokenizer trained
on the spot, a chat template. No network."""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaTextConfig,
    DbrxConfig,
    DbrxForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.aria.processing_aria import AriaProcessor
from transformers.utils.logging import disable_progress_bar

from tests.support import ROOT

TEXT = ROOT / "LICENSE"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on this repository's licence text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(TEXT)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


COMMON = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}


def _fill_what_is_left_at_zero(model: PreTrainedModel) -> None:
    """transformers leaves some routers and their biases at zero: every row would go to
    the same experts."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data.normal_(std=0.02)
        elif tensor.dim() == 2 and not tensor.any():
            tensor.data.normal_(std=0.1)


def write(
    directory: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> Path:
    """Writes a checkpoint, in one piece or not at all; does nothing where it is
    there."""
    if directory.exists():
        return directory
    tokenizer = make_tokenizer()
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = model_class(config).to(torch.bfloat16)
    _fill_what_is_left_at_zero(model)
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    disable_progress_bar()
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(directory)
    return directory


def make_checkpoint(
    directory: Path,
    experts: int = 32,
    top_k: int = 4,
    layers: int = 4,
    expert_width: int = 64,
    vocabulary: int = 1024,
    hidden: int = 128,
) -> Path:
    """A Qwen3-MoE."""
    config = Qwen3MoeConfig(
        **(COMMON | {"vocab_size": vocabulary, "hidden_size": hidden}),
        intermediate_size=256,
        moe_intermediate_size=expert_width,
        num_hidden_layers=layers,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )
    return write(directory, Qwen3MoeForCausalLM, config)


def make_narrow(directory: Path) -> Path:
    """A Qwen3-MoE whose experts' width stock pads on the CPU."""
    return make_checkpoint(directory, expert_width=40)


def make_large(directory: Path, width: int = 768) -> Path:
    """A Qwen3-MoE of 12 layers of 64 experts top-2 in one file: of 2.5 GiB of experts
    if they are 768 wide.

    Written tensor by tensor, as a model in memory would take twice its size.
    """
    if directory.exists():
        return directory
    small = make_checkpoint(
        directory.with_name(f"{directory.name}.small"),
        experts=2,
        top_k=2,
        layers=12,
        expert_width=8,
        hidden=width,
    )
    config = Qwen3MoeConfig.from_pretrained(small)
    config.num_experts, config.moe_intermediate_size = 64, width
    tensors = load_file(small / "model.safetensors")
    expert = re.compile(r"(model\.layers\.\d+\.mlp)\.experts\.0\.down_proj\.weight")
    pool = torch.empty(1 << 25, dtype=torch.bfloat16).normal_(std=0.1)
    place = 0
    for name in [name for name in tensors if expert.fullmatch(name)]:
        mlp = expert.fullmatch(name)[1]  # type: ignore[index]
        tensors[f"{mlp}.gate.weight"] = torch.randn(64, width, dtype=torch.bfloat16)
        for part in ("gate", "up", "down"):
            for number in range(64):
                begin = place % (len(pool) - width * width)
                row = pool[begin : begin + width * width].view(width, width)
                tensors[f"{mlp}.experts.{number}.{part}_proj.weight"] = row
                place += 4099
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(small, unfinished)
    save_shared(tensors, unfinished / "model.safetensors")
    config.save_pretrained(unfinished)
    unfinished.rename(directory)
    return directory


def save_shared(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file of tensors that may share memory, without a copy of
    them all."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy())


def make_dense(directory: Path) -> Path:
    """A Qwen3 without experts."""
    config = Qwen3Config(
        **COMMON, intermediate_size=256, num_hidden_layers=2, head_dim=32
    )
    return write(directory, Qwen3ForCausalLM, config)


def make_gpt_oss(directory: Path) -> Path:
    """An unquantised gpt-oss, 16 experts top-4."""
    config = GptOssConfig(
        **COMMON,
        intermediate_size=64,
        head_dim=32,
        num_hidden_layers=2,
        num_local_experts=16,
        num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return write(directory, GptOssForCausalLM, config)


def make_dbrx(directory: Path) -> Path:
    """A dbrx, 16 experts top-4."""
    config = DbrxConfig(
        d_model=128,
        n_heads=4,
        n_layers=2,
        max_seq_len=2048,
        vocab_size=1024,
        tie_word_embeddings=False,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={
            "hidden_size": 128,
            "ffn_hidden_size": 64,
            "moe_num_experts": 16,
            "moe_top_k": 4,
            "moe_normalize_expert_weights": 1.0,
        },
    )
    return write(directory, DbrxForCausalLM, config)


def make_with_mtp(directory: Path) -> Path:
    """A GLM-4-MoE, 16 experts top-2 in two of three layers, with one MTP layer.
    transformers does not write MTP layers; this one is the last layer once more, with
    what joins it to the model."""
    hidden = COMMON["hidden_size"]
    config = Glm4MoeConfig(
        **COMMON,
        intermediate_size=128,
        moe_intermediate_size=64,
        head_dim=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_shared_experts=1,
    )
    write(directory, Glm4MoeForCausalLM, config)
    tensors = load_file(directory / "model.safetensors")
    last = {n: t for n, t in tensors.items() if n.startswith("model.layers.2.")}
    mtp = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in last.items()}
    for name in ("enorm", "hnorm", "shared_head.norm"):
        mtp[f"model.layers.3.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    mtp["model.layers.3.eh_proj.weight"] = (
        torch.randn(hidden, 2 * hidden).bfloat16() * 0.1
    )
    mtp["model.layers.3.embed_tokens.weight"] = tensors[
        "model.embed_tokens.weight"
    ].clone()
    mtp["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | mtp, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1})
    )
    return directory


def make_aria(directory: Path) -> Path:
    """An Aria, vision and language: 16 experts top-2, eight tokens an image. Its image
    processor is the one that needs no torchvision."""
    trained = make_tokenizer()
    trained.add_tokens(["<|img|>"], special_tokens=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        eos_token=trained.eos_token,
        pad_token=trained.pad_token,
        extra_special_tokens={"image_token": "<|img|>"},
    )
    config = AriaConfig(
        text_config=AriaTextConfig(
            **(COMMON | {"vocab_size": 1032}),
            pad_token_id=0,
            intermediate_size=64,
            num_hidden_layers=2,
            moe_num_experts=16,
            moe_topk=2,
            moe_num_shared_experts=1,
        ),
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 980,
            "patch_size": 14,
        },
        image_token_index=tokenizer.image_token_id,
        projector_patch_to_query_dict={1225: 8, 4900: 8},
    )
    write(directory, AriaForConditionalGeneration, config)
    processor = AriaProcessor(
        AriaImageProcessorPil(), tokenizer, size_conversion={490: 8, 980: 8}
    )
    processor.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocabulary", type=int, default=1024)
    arguments = parser.parse_args()
    print(make_checkpoint(arguments.directory, vocabulary=arguments.vocabulary))
