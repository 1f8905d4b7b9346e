"""Tiny random vision-language models of the common kinds."""

from typing import Any

import transformers as t

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP, SIGLIP = IMAGE | {"model_type": "clip_vision_model"}, IMAGE | {"model_type": "siglip_vision_model"}
PIXTRAL = IMAGE | {"model_type": "pixtral", "head_dim": 16}
LLAMA, QWEN2 = TEXT | {"model_type": "llama"}, TEXT | {"model_type": "qwen2"}
MISTRAL = TEXT | {"model_type": "mistral", "head_dim": 16}
QWEN = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
GLM = {
    "image_token_id": 90,
    "video_token_id": 91,
    "image_start_token_id": 92,
    "image_end_token_id": 93,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
BLOCKS = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = TEXT | {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
GLM_SECTIONS = TEXT | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
LLAMA4 = TEXT | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2, "interleave_moe_layer_step": 2}
CROSS = TEXT | {"cross_attention_layers": [1], "rope_parameters": ROPE}
TILES = {
    "num_global_layers": 1,
    "attention_heads": 2,
    "vision_output_dim": 64,
    "intermediate_layers_indices": [0],
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
}

# class -> arguments of its config
MODELS: dict[str, dict[str, Any]] = {
    "Llava": {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 90},
    "LlavaNext": {
        "text_config": MISTRAL,
        "vision_config": CLIP,
        "image_token_index": 90,
        "image_grid_pinpoints": [[28, 28]],
    },
    "LlavaOnevision": {
        "text_config": QWEN2,
        "vision_config": SIGLIP,
        "image_token_index": 90,
        "image_grid_pinpoints": [[28, 28]],
    },
    "VideoLlava": {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 90, "video_token_index": 91},
    "Qwen2VL": {
        "text_config": SECTIONS,
        **QWEN,
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
    },
    "Qwen2_5_VL": {"text_config": SECTIONS, **QWEN, "vision_config": BLOCKS | {"fullatt_block_indexes": [0]}},
    "Qwen3VL": {
        "text_config": SECTIONS | {"head_dim": 16},
        **QWEN,
        "vision_config": BLOCKS | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "Glm4v": {"text_config": GLM_SECTIONS, **GLM, "vision_config": BLOCKS | {"image_size": 28}},
    "Idefics3": {"text_config": LLAMA, "vision_config": IMAGE, "image_token_id": 90, "scale_factor": 1},
    "SmolVLM": {"text_config": LLAMA, "vision_config": IMAGE, "image_token_id": 90, "scale_factor": 1},
    "PaliGemma": {
        "text_config": TEXT | {"model_type": "gemma", "head_dim": 16},
        "image_token_index": 90,
        "vision_config": SIGLIP | {"vision_use_head": False},
        "projection_dim": 64,
    },
    "Gemma3": {
        "text_config": TEXT | {"head_dim": 16},
        "vision_config": SIGLIP | {"vision_use_head": False},
        "image_token_index": 90,
        "mm_tokens_per_image": 4,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "InternVL": {
        "text_config": QWEN2,
        "image_token_id": 90,
        "vision_config": IMAGE | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "Mistral3": {"text_config": MISTRAL, "vision_config": PIXTRAL, "image_token_index": 90, "spatial_merge_size": 2},
    "Mllama": {"text_config": CROSS, "vision_config": IMAGE | TILES, "image_token_index": 90},
    "AyaVision": {
        "text_config": TEXT | {"model_type": "cohere2", "head_dim": 16},
        "image_token_index": 90,
        "vision_config": SIGLIP | {"vision_use_head": False},
        "downsample_factor": 1,
    },
    "Llama4": LLAMA4,  # Llama4ForCausalLM; the whole model cannot run without images in 5.24
}


def build(name, tied):
    """The model with random weights, in eval mode; tied: whether its output head is the embedding."""
    arguments = {key: dict(value) if isinstance(value, dict) else value for key, value in MODELS[name].items()}
    if name == "Llama4":
        config, cls = t.Llama4TextConfig(**arguments), t.Llama4ForCausalLM
    else:
        config, cls = getattr(t, f"{name}Config")(**arguments), getattr(t, f"{name}ForConditionalGeneration")
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "tie_word_embeddings"):  # some have it in the config above only
            part.tie_word_embeddings = tied
    return cls(config).eval()
