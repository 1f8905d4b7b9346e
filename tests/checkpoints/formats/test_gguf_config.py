"""From a GGUF file's metadata to a transformers configuration, without a model."""

import math
import types

import pytest
import torch

from qzo.checkpoints.formats import gguf_config
from qzo.checkpoints.formats.gguf_file import TensorInfo


def rope(kind="default", theta=10000.0, **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


def file_of(architecture, change, tensors=()):
    """What gguf_config.config looks at: metadata, directory and the values of rotary factors, here 2."""
    keys = {
        "embedding_length": 128,
        "feed_forward_length": 256,
        "block_count": 2,
        "context_length": 64,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-6,
    } | change
    shapes = {"token_embd.weight": (80, 128)} | {f"blk.{i}.attn_norm.weight": (128,) for i in range(64)}
    found = {name: TensorInfo(name, 0, shape, 0, 0) for name, shape in (shapes | dict(tensors)).items()}
    return types.SimpleNamespace(
        path="m.gguf",
        tensors=found,
        dense=lambda info, dtype: torch.full(info.shape, 2.0),
        metadata={"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in keys.items()},
    )


@pytest.mark.parametrize(
    ("architecture", "change", "expected"),
    [
        ("gemma2", {"block_count": 26, "attention.key_length": 64}, {"query_pre_attn_scalar": 64, "head_dim": 64}),
        (
            "gemma2",
            {"block_count": 46, "attention.key_length": 64},
            {
                "query_pre_attn_scalar": 32,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "sliding_window": 4096,
            },
        ),
        ("gemma3", {"block_count": 62, "attention.key_length": 64}, {"query_pre_attn_scalar": 32}),
        ("gemma3", {}, {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": None}),
        (
            "gemma3",
            {"attention.sliding_window": 8, "rope.freq_base": 1e6},
            {
                "layer_types": ["sliding_attention"] * 2,
                "rope_parameters": {"full_attention": rope(theta=1e6), "sliding_attention": rope()},
            },
        ),
        ("llama", {"attention.head_count_kv": 1}, {"num_key_value_heads": 1, "attention_bias": False}),
        (
            "llama",
            {"rope.scale_linear": 2.0},
            {"num_key_value_heads": 4, "rope_parameters": rope("linear", factor=2.0)},
        ),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {"rope_parameters": rope()}),
        (
            "phi3",
            {"rope.dimension_count": 24},
            {"rope_parameters": rope(partial_rotary_factor=0.75), "sliding_window": None},
        ),
    ],
)
def test_configuration(architecture, change, expected):
    found = gguf_config.config(file_of(architecture, change))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("architecture", "change", "tensors", "message"),
    [
        ("llama", {"rope.freq_base": 0.0}, {}, "rope.freq_base is 0; rotary embeddings need a number above it"),
        ("gemma3", {"attention.sliding_window": 8, "rope.freq_base_swa": 0}, {}, "rope.freq_base_swa is 0; rotary"),
        (
            "gemma3",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": "6"},
            {},
            "sliding_window_pattern is '6'; it has to be int from 0 on",
        ),
        (
            "gemma3",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": -6},
            {},
            "pattern is -6; it has to",
        ),
        ("qwen2", {"attention.value_length": 64}, {}, "heads of 32 for keys and of 64 for values"),
        ("qwen3", {"rope.dimension_count": 16}, {}, "16 of 32 head dimensions; only whole heads .* Qwen3"),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "scaling 'yarn'; .*linear"),
        ("phi3", {"rope.scaling.factor": 4.0}, {}, "rotary scaling 'linear'; what can be read for Phi3"),
        ("llama", {"rope.scaling.factor": 4.0}, {"rope_freqs.weight": (16,)}, "scaling 'linear and llama3'"),
        ("qwen2", {}, {"rope_freqs.weight": (16,)}, "rotary scaling 'llama3'; what can be read for Qwen2"),
        ("llama", {}, {"rope_freqs.weight": (16,)}, "rope_freqs.weight holds 2 at 0, Llama 3's scaling by 2 has"),
        ("llama", {}, {"rope_freqs.weight": (8,)}, r"rope_freqs.weight is \[8\], the rotary .* needs \[16\]"),
        ("phi3", {}, {"rope_factors_long.weight": (16,)}, "rope_factors_short.weight is missing"),
        (
            "phi3",
            {},
            {"rope_factors_long.weight": (16,), "rope_factors_short.weight": (16,)},
            "no metadata phi3.rope.scaling.original_context_length",
        ),
        (
            "gemma3",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]},
            {},
            "tells of 1 layers, the model has 2",
        ),
        ("llama", {"attention.head_count_kv": [1, 2]}, {}, "llama.attention.head_count_kv differs from layer to"),
        ("llama", {"embedding_length": "128"}, {}, "llama.embedding_length is '128'; it has to be int from 0 on"),
        ("llama", {"rope.freq_base": math.nan}, {}, "llama.rope.freq_base is nan; it has to be int or"),
        ("llama", {"block_count": 2**30}, {}, "65 tensors are not 1073741824 layers"),
        ("qwen2", {"expert_count": 60}, {}, "a mixture of 60 experts; only dense models"),
    ],
)
def test_configuration_refused(architecture, change, tensors, message):
    with pytest.raises(ValueError, match="m.gguf: .*" + message):
        gguf_config.config(file_of(architecture, change, tensors))


@pytest.mark.parametrize(("factor", "theta", "size"), [(8.0, 500000.0, 128), (32.0, 500000.0, 64)])
def test_factors_of_llama_3_give_its_parameters(factor, theta, size):
    found = []
    for frequency in 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wavelength = 2 * math.pi / frequency  # float32, as llama.cpp's converter computes
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        plain = 1.0 if wavelength < 8192 / 4 else factor
        between = 8192 / 4 <= wavelength <= 8192
        found.append(float(1 / ((1 - smooth) / factor + smooth)) if between else plain)
    file = file_of(
        "llama",
        {"attention.key_length": size, "attention.value_length": size, "rope.freq_base": theta},
        {"rope_freqs.weight": (size // 2,)},
    )
    file.dense = lambda info, dtype: torch.tensor(found)
    assert gguf_config.config(file)["rope_parameters"] == rope(
        "llama3", theta, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    found[size // 4] *= 1.001
    with pytest.raises(ValueError, match=f"rope_freqs.weight holds .* at {size // 4}"):
        gguf_config.config(file)


@pytest.mark.parametrize(("count", "said"), [(3, "3"), ("2", "'2'"), ([1, 2], r"\[1, 2\]"), (-1, "-1")])
def test_a_part_of_a_split_model_is_refused(count, said):
    file = file_of("llama", {})
    file.metadata["split.count"] = count
    with pytest.raises(ValueError, match=f"m.gguf is one of {said} parts; merge them first"):
        gguf_config.config(file)
    file.metadata["split.count"] = 1
    assert gguf_config.config(file)["num_hidden_layers"] == 2
