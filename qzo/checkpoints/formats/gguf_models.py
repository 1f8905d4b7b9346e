"""What each GGUF architecture is in transformers: names and conventions, as data.

Mistral is architecture "llama" there and computes the same; the window of its first version is in no file.
"""

import dataclasses

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# whole numbers that every architecture needs -> argument of the transformers configuration
NEEDED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, or a group of them that compute alike.

    model_type, cls : transformers' names of the configuration and of the class
    layer : tensor of a block -> module of a layer
    interleaved : rows of q and k lie in pairs for the rotary embedding; transformers has them in halves
    norm_offset : what the file's norm weights have on top of transformers'
    options : further metadata -> (argument of the configuration, its value where the file has none or 0)
    biases : argument of the configuration -> the tensor whose presence sets it
    scalings : rotary scalings that transformers' class has too: "linear", "llama3", "longrope"
    partial_rotary : only a part of a head may be rotated
    global_every : 0, or every so many-th layer attends to all and the others through a window
    local_theta : None, or the rotary base of the layers with a window
    wide_depth : the number of layers of the one size whose attention scale is 1 / sqrt(hidden / heads)
    """

    model_type: str
    cls: str
    layer: dict
    interleaved: bool = False
    norm_offset: float = 0.0
    options: dict = dataclasses.field(default_factory=dict)
    biases: dict = dataclasses.field(default_factory=dict)
    scalings: tuple = ("linear",)
    partial_rotary: bool = False
    global_every: int = 0
    local_theta: float | None = None
    wide_depth: int = 0


_WINDOW = "attention.sliding_window"
FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _ATTENTION | _MLP | _TWO_NORMS,
        interleaved=True,
        biases={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
        scalings=("linear", "llama3"),
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _ATTENTION | _MLP | _TWO_NORMS),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        _ATTENTION | _QK_NORMS | _MLP | _TWO_NORMS,
        biases={"attention_bias": "blk.0.attn_q.bias"},
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        _ATTENTION | _MLP | _FOUR_NORMS,
        norm_offset=1.0,
        options={
            _WINDOW: ("sliding_window", 4096),
            "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", 30.0),
        },
        global_every=2,
        wide_depth=46,
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _ATTENTION | _QK_NORMS | _MLP | _FOUR_NORMS,
        norm_offset=1.0,
        options={_WINDOW: ("sliding_window", 4096), "final_logit_softcapping": ("final_logit_softcapping", None)},
        global_every=6,
        local_theta=10000.0,
        wide_depth=62,
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        }
        | _TWO_NORMS,
        options={_WINDOW: ("sliding_window", None)},
        scalings=("longrope",),
        partial_rotary=True,
    ),
}
# tensors that say how the rotary embedding is scaled: the configuration takes them in
ROPE_TENSORS = {"llama3": ("rope_freqs.weight",), "longrope": ("rope_factors_short.weight", "rope_factors_long.weight")}
