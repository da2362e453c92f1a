# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models that see pictures: a small tower for vision, and transformers' processor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from tests.support.architectures.model import (
    COMMON,
    EXPERTS,
    FIRST_DENSE,
    HEADS,
    LINEAR_ATTENTION,
    NUMBERED,
    ROUTED,
    SHARED_EXPERT,
    SLIDING,
    TOP_K,
    WIDTH,
    Architecture,
)
from tests.support.sample import make_tokenizer

_FIRST_ADDED = COMMON["vocab_size"]
_VOCABULARY = {"vocab_size": 1040}


@dataclass(frozen=True, eq=False)
class Seeing(Architecture):
    """A row with a picture in one of its prompts.

    Attributes:
        tokens: those that the tokenizer gets besides, by their names in it.
        picture: what stands for the picture in a prompt.
        processor: made of the tokenizer.
    """

    tokens: dict[str, str] | None = None
    picture: str = ""
    processor: Callable[[Any], Any] | None = None

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        assert self.tokens
        trained = make_tokenizer()
        trained.add_tokens(list(self.tokens.values()), special_tokens=True)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=trained.backend_tokenizer,
            eos_token=trained.eos_token,
            pad_token=trained.pad_token,
            extra_special_tokens=self.tokens,
        )


def _ids(tokens: dict[str, str], *names: str) -> dict[str, int]:
    """The ids of the added tokens, by the names that a configuration gives them."""
    places = list(tokens)
    return {f"{name}_id": _FIRST_ADDED + places.index(name) for name in names}


def _text(*parts: dict[str, Any], **config: Any) -> dict[str, Any]:
    text = COMMON | _VOCABULARY
    for part in parts:
        text = text | part
    return text | config


def _turns(*section: int, **more: Any) -> dict[str, Any]:
    """Rotary positions in three dimensions."""
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": list(section),
        **more,
    }


def _grid(kind: str, **config: Any) -> Callable[[Any], Any]:
    """A processor of the models that cut a picture into patches of 16 pixels."""

    def processor(tokenizer: Any) -> Any:
        image, video, whole = (
            getattr(transformers, name) for name in _PROCESSORS[kind]
        )
        sizes = {
            "size": {"shortest_edge": 64 * 64, "longest_edge": 96 * 96},
            "patch_size": 16,
            **config,
        }
        return whole(
            image_processor=image(**sizes),
            tokenizer=tokenizer,
            video_processor=video(**sizes),
            chat_template=tokenizer.chat_template,
        )

    return processor


_PROCESSORS = {
    "qwen": ("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", "Qwen3VLProcessor"),
    "glm": ("Glm4vImageProcessor", "Glm4vVideoProcessor", "Glm4vProcessor"),
}
_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 128,
    "initializer_range": 0.1,
}
_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_GLM = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
_GEMMA = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}
_LLAMA = {
    "image_token": "<|image|>",
    "boi_token": "<|image_start|>",
    "eoi_token": "<|image_end|>",
    "patch_token": "<|patch|>",
    "tile_x": "<|tile_x_separator|>",
    "tile_y": "<|tile_y_separator|>",
}


def _gemma(tokenizer: Any) -> Any:
    return transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=transformers.Gemma4VideoProcessor(),
        image_seq_length=70,
        chat_template=tokenizer.chat_template,
    )


def _llama(tokenizer: Any) -> Any:
    return transformers.Llama4Processor(
        image_processor=transformers.Llama4ImageProcessor(
            size={"height": 56, "width": 56}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        chat_template=tokenizer.chat_template,
    )


SEEING = (
    Seeing(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {
            "text_config": _text(
                *(NUMBERED, WIDTH, HEADS, SHARED_EXPERT, LINEAR_ATTENTION),
                rope_parameters=_turns(
                    *(2, 1, 1), mrope_interleaved=True, partial_rotary_factor=0.25
                ),
            ),
            "vision_config": {**_TOWER, "num_position_embeddings": 36},
            **_ids(_QWEN, *_QWEN),
        },
        tokens=_QWEN,
        picture=_QWEN_PICTURE,
        processor=_grid("qwen"),
    ),
    Seeing(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": _text(
                *(NUMBERED, WIDTH, HEADS),
                norm_topk_prob=True,
                rope_parameters=_turns(6, 5, 5, mrope_interleaved=True),
            ),
            "vision_config": {
                **_TOWER,
                "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0],
            },
            **_ids(_QWEN, *_QWEN),
        },
        tokens=_QWEN,
        picture=_QWEN_PICTURE,
        processor=_grid("qwen"),
        transposed=r"experts\.(gate_up|down)_proj$",
    ),
    Seeing(
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        {
            "text_config": _text(
                *(ROUTED, WIDTH, HEADS, FIRST_DENSE),
                n_shared_experts=1,
                use_qk_norm=False,
                rope_parameters=_turns(2, 3, 3, partial_rotary_factor=0.5),
            ),
            "vision_config": {**_TOWER, "image_size": 96},
            **_ids(_GLM, *_GLM),
        },
        tokens=_GLM,
        picture="<|begin_of_image|><|image|><|end_of_image|>",
        processor=_grid("glm"),
    ),
    Seeing(
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": _text(
                *(WIDTH, HEADS, SLIDING),
                enable_moe_block=True,
                num_experts=EXPERTS,
                top_k_experts=TOP_K,
                global_head_dim=32,
                num_global_key_value_heads=2,
                hidden_size_per_layer_input=0,
                attention_k_eq_v=True,
            ),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "default_output_length": 70,
                "initializer_range": 0.1,
            },
            "audio_config": None,
            "tie_word_embeddings": False,
            **_ids(_GEMMA, "image_token", "boi_token", "eoi_token", "video_token"),
        },
        tokens=_GEMMA,
        picture="<|image|>",
        processor=_gemma,
    ),
    Seeing(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": _text(
                HEADS,
                num_local_experts=EXPERTS,
                num_experts_per_tok=1,
                intermediate_size_mlp=128,
            ),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "initializer_range": 0.1,
            },
            **{
                name.replace("_id", "_index"): number
                for name, number in _ids(
                    _LLAMA, "image_token", "boi_token", "eoi_token"
                ).items()
            },
        },
        top_k=1,
        tokens=_LLAMA,
        picture="<|image|>",
        processor=_llama,
    ),
)
