"""A model from its config alone: which class, nothing in memory but what it computes."""

import pytest
import torch
import transformers
from transformers import LlamaConfig

from qzo.checkpoints.empty import auto_class, build_empty

TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
}


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({}, "AutoModelForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM"),
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "LlavaForConditionalGeneration"),
        ({"architectures": ["NobodysModel"]}, "AutoModel"),
        (
            {"architectures": ["MyVision"], "auto_map": {"AutoModelForImageTextToText": "code.MyVision"}},
            "AutoModelForImageTextToText",
        ),
        (
            {"architectures": ["MyForCausalLM"], "auto_map": {"AutoConfig": "code.MyForCausalLM"}},
            "AutoModelForCausalLM",
        ),
    ],
)
def test_the_class_that_a_checkpoint_asks_for(said, name):
    assert auto_class(LlamaConfig(**TINY, **said)) is getattr(transformers, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parameters_take_no_byte_and_what_is_computed_is_real(dtype):
    model = build_empty(LlamaConfig(**TINY), dtype)
    assert type(model) is transformers.LlamaForCausalLM
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(p.is_meta for p in model.parameters() if p.dim() > 1)  # norms begin with ones
    angles = model.model.rotary_emb.inv_freq
    assert angles[0] == 1
    assert angles.dtype == torch.float32
    assert not torch.empty(1).is_meta  # outside nothing has changed


class Diffuser(torch.nn.Module):
    """As diffusers makes its models."""

    @classmethod
    def from_config(cls, config):
        model = cls()
        model.weight = torch.nn.Parameter(torch.empty(config))
        return model


def test_a_class_of_another_library():
    model = build_empty((2, 3), torch.bfloat16, Diffuser)
    assert (model.weight.is_meta, model.weight.shape, model.weight.dtype) == (True, (2, 3), torch.bfloat16)


def test_a_config_that_makes_no_model_is_one_clear_line():
    config = LlamaConfig(**TINY, hidden_act="x")
    config.name_or_path = "a/folder"
    with pytest.raises(ValueError, match=r"^a/folder: its config makes no model: KeyError: 'x'$"):
        build_empty(config, torch.float32)
    with pytest.raises(ValueError, match=r"^LlamaConfig: its config makes no model"):
        build_empty(LlamaConfig(**TINY, hidden_act="x"), torch.float32)
