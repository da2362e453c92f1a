# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prints the table of docs/sizing.md: what `auto` takes, and what is left for the KV
cache, on five GPUs for four published models in bfloat16. Minutes, no GPU, no
weights."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import (
    Gemma4TextConfig,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

GPUS = ("RTX 4090", "RTX 5090", "A100-40", "A100-80", "H100")
OPTIONS = ("--max-model-len", "8192", "--max-num-seqs", "16")


def qwen3_30b_a3b() -> PretrainedConfig:
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )


def gemma_4_26b_a4b() -> PretrainedConfig:
    """The text model."""
    return Gemma4TextConfig(
        architectures=["Gemma4ForCausalLM"],
        vocab_size=262144,
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 5,
        sliding_window=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        max_position_embeddings=262144,
    )


def gpt_oss_20b() -> PretrainedConfig:
    """In bfloat16; published in MXFP4."""
    return GptOssConfig(
        architectures=["GptOssForCausalLM"],
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131072,
    )


def mixtral_8x7b() -> PretrainedConfig:
    return MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
    )


MODELS = {
    "Qwen3-30B-A3B": qwen3_30b_a3b,
    "gemma-4-26B-A4B": gemma_4_26b_a4b,
    "gpt-oss-20b": gpt_oss_20b,
    "Mixtral-8x7B": mixtral_8x7b,
}


def write(name: str, directory: Path) -> Path:
    """The config.json of one of `MODELS`, in a directory of its name."""
    config = MODELS[name]()
    config.dtype = "bfloat16"
    config.save_pretrained(directory / name)
    return directory / name


def cell(model: Path, gpu: str) -> str:
    """What `auto` takes on `gpu`, and the KV cache that is left; or that nothing
    fits."""
    command = Path(sys.executable).with_name("vllm-moe-prefetch")
    asked = [
        str(command),
        "plan",
        str(model),
        "--gpu",
        gpu,
        "--slots",
        "auto",
        "--json",
        *OPTIONS,
    ]
    result = subprocess.run(asked, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        sys.exit(result.stderr)
    (plan,) = json.loads(result.stdout)
    if not plan["fits"]:
        return "does not fit"
    gpu_gib, kv_gib = plan["gpu_bytes"] / (1 << 30), plan["kv_cache_bytes"] / (1 << 30)
    return f"{plan['slots']} of {plan['experts']}; {gpu_gib:.1f} + {kv_gib:.1f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"| model | {' | '.join(GPUS)} |")
    print(f"|---|{'---|' * len(GPUS)}")
    with tempfile.TemporaryDirectory() as place:
        for name in MODELS:
            model = write(name, Path(place))
            print(
                f"| {name} | {' | '.join(cell(model, gpu) for gpu in GPUS)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
