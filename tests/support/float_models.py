"""Small float models of several families, with random weights, saved as transformers saves them."""

import copy

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ONE_BLOCK = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
}
TWO_BLOCKS = ONE_BLOCK | {"num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.2}
TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
# no K of the Llama is a multiple of 128
LLAMA = LlamaConfig(
    **TINY | {"num_attention_heads": 3},
    hidden_size=96,
    intermediate_size=160,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
QWEN2 = Qwen2Config(**TINY, hidden_size=128, intermediate_size=256, num_key_value_heads=1)
OPT = OPTConfig(**TINY, hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
BERT = BertConfig(**TINY, hidden_size=64, intermediate_size=128)
MODELS = {
    "llama-tied": (LlamaForCausalLM, LLAMA, 14),
    "qwen2-bias": (Qwen2ForCausalLM, QWEN2, 14),
    "opt-bias": (OPTForCausalLM, OPT, 12),
    "bert": (BertModel, BERT, 13),
}


def make(name, folder, dtype=torch.float32):
    """Save a model of MODELS to a folder, which is given back."""
    cls, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).to(dtype)
    for parameter in model.parameters():  # transformers starts biases at zero: one lost would not show
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder
