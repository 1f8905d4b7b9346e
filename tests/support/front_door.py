"""Models through transformers' own from_pretrained, and what is compared of them."""

import copy
import json

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import qzo
from qzo.checkpoints.formats import GATHERED
from qzo.nn.layers import layers
from tests.support.paths import FIXTURES

FOLDERS = sorted(
    path.name
    for path in FIXTURES.iterdir()
    if (path / "config.json").exists()
    and json.loads((path / "config.json").read_text()).get("quantization_config", {}).get("quant_method") in GATHERED
)
GPTQ = FIXTURES / "gptqmodel-gptq-sym-g128"
IDS = torch.arange(24).view(2, 12)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TINY, tie_word_embeddings=False)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**TINY, tie_word_embeddings=True)),
    "qwen2-bias": (Qwen2ForCausalLM, Qwen2Config(**TINY)),
}


def make(name, folder, dtype=torch.bfloat16):
    """A folder of a float model with random weights and biases."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(path, **options):
    with qzo.loading():
        return AutoModelForCausalLM.from_pretrained(path, **options)


def quantize(path, group_size=32, cls=AutoModelForCausalLM, dtype="auto", **options):
    return cls.from_pretrained(path, dtype=dtype, quantization_config=qzo.QZOConfig(group_size=group_size, **options))


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder):
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return found


def same(got, want):
    """Names, dtypes and bytes."""
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def same_layers(got, want):
    """Every bit of every QZOLinear, the same names."""
    got, want = layers(got, trainable=None), layers(want, trainable=None)
    assert set(got) == set(want)
    for name, layer in want.items():
        assert torch.equal(got[name].codes, layer.codes), name
        assert torch.equal(got[name].read_scales(), layer.read_scales()), name
        assert (got[name].zeros is None) == (layer.zeros is None), name
        assert layer.zeros is None or torch.equal(got[name].zeros, layer.zeros), name
