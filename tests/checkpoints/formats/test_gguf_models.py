"""GGUF's architectures: tiny random models, written by llama.cpp's rules; names by the gguf package."""

import dataclasses
import itertools
import math

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import qzo
from tests.support.checkpoints import HALVES, TYPES, quantized, relative_error

LOGITS_FP32 = 2e-5  # float32 sums in another order; a wrong row, norm, window or cap gives 1e-3 to 1
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "initializer_range": 0.3,
    "rms_norm_eps": 3e-5,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformers model type, what differs from SIZES, further metadata of its file, its types in turn."""

    model_type: str
    arguments: dict
    metadata: dict = dataclasses.field(default_factory=dict)
    layers: int = 2
    kinds: tuple = (TYPES.Q4_0, TYPES.Q4_1)


def rope(kind="default", theta=3000.0, **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0], "partial_rotary_factor": 0.375}
WINDOW = {"attention.sliding_window": 16}
HEAD_32 = {"attention.key_length": 32, "attention.value_length": 32}
K_QUANTS = (
    TYPES.Q4_K,
    TYPES.Q6_K,
    TYPES.Q4_0,
    TYPES.Q5_K,
    TYPES.Q2_K,
    TYPES.Q3_K,
    TYPES.IQ4_NL,
    TYPES.Q5_0,
    TYPES.Q5_1,
    TYPES.Q4_1,
    TYPES.F16,
)
CASES = {
    "llama-bias": Case(
        "llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope(), "tie_word_embeddings": True}
    ),
    "llama-linear": Case(
        "llama",
        {"rope_parameters": rope("linear", factor=4.0)},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama3": Case("llama", {"rope_parameters": rope("llama3", 500000.0, **LLAMA3), "head_dim": 32}),
    "mistral": Case("mistral", {"rope_parameters": rope(), "head_dim": 32, "sliding_window": None}),
    "qwen2": Case("qwen2", {"rope_parameters": rope(), "tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"rope_parameters": rope(), "head_dim": 32}, HEAD_32),
    "qwen2-k-quants": Case(
        "qwen2", {"rope_parameters": rope(), "hidden_size": 256, "intermediate_size": 256}, kinds=K_QUANTS
    ),
    "gemma2": Case(
        "gemma2",
        {
            "rope_parameters": rope(),
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0} | HEAD_32 | WINDOW,
        layers=3,
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": rope("linear", factor=8.0), "sliding_attention": rope(theta=10000.0)},
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
        },
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0} | HEAD_32 | WINDOW,
        layers=7,
    ),
    "gemma3-q8": Case(
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": rope(), "sliding_attention": rope(theta=500.0)},
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
        },
        {"attention.sliding_window_pattern": [False, True], "rope.freq_base_swa": 500.0, "final_logit_softcapping": 3.0}
        | WINDOW,
        kinds=(TYPES.Q8_0,),
    ),
    "phi3": Case("phi3", {"rope_parameters": rope(), "sliding_window": 16, "tie_word_embeddings": False}, WINDOW),
    "phi3-long": Case(
        "phi3",
        {
            "rope_parameters": rope("longrope", **LONG),
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 32,
        },
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 6,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(32768 / 32) / math.log(32)),
        },
    ),
}
HEADS = {TYPES.Q4_0: 2, TYPES.Q4_1: 4, TYPES.Q8_0: 2}  # bytes of d, or d and m, before the codes
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def original(case):
    """The model before quantization: everything random, so that no two tensors may be exchanged."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.model_type, num_hidden_layers=case.layers, **SIZES | case.arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) - 0.5 + ("gemma" not in case.model_type))
    return model


def write(path, case, model):
    """Write the model, and put into it the values that the file now holds. Returns {parameter: type}."""
    config, arch = model.config, ARCHITECTURES.get(case.model_type, case.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    everywhere = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(everywhere["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim(config))
        writer.add_key_length(head_dim(config))
    for key, value in case.metadata.items():
        held = {int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{held}")(f"{arch}.{key}", value)
    for name, factors in rope_tensors(config).items():
        writer.add_tensor(name, np.array(factors, np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], case.layers)
    kinds, turn = {}, itertools.cycle(case.kinds)
    for name, tensor in model.named_parameters():  # tied tensors come once
        head = "embed_tokens" in name or "lm_head" in name
        kind = TYPES.F32 if tensor.dim() == 1 else TYPES.Q8_0 if head else next(turn)
        shift = 1 if "gemma" in arch and name.endswith("norm.weight") else 0
        data = encode(tensor.detach().numpy() + np.float32(shift), kind)
        tensor.data.copy_(torch.from_numpy(gguf.dequantize(data, kind).astype(np.float32)) - shift)
        stored = interleaved(data, name, config) if arch == "llama" else data
        writer.add_tensor(str(names.get_name(name, (".weight", ".bias"))), stored, raw_dtype=kind)
        kinds[name] = kind
    finish(writer)
    return kinds


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encode(data, kind):
    """Rows in blocks of a type. The gguf package cannot quantize to K quants: those are random bytes."""
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    if per_block != 256 and kind != TYPES.IQ4_NL:
        return gguf.quantize(data, kind)
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (len(data), data.shape[1] // per_block, size), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        factor = rng.uniform(2e-4, 1e-3, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = factor.view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw.reshape(len(data), -1)


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def interleaved(data, name, config):
    """Rows of a head in the order 0, d/2, 1, d/2 + 1, ..."""
    if not ("q_proj" in name or "k_proj" in name):
        return data
    half = head_dim(config) // 2
    order = [
        head * 2 * half + row
        for head in range(len(data) // (2 * half))
        for pair in range(half)
        for row in (pair, half + pair)
    ]
    return data[order]


def rope_tensors(config):
    parameters = config.rope_parameters
    if parameters.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": parameters[f"{which}_factor"] for which in ("long", "short")}
    if parameters.get("rope_type") != "llama3":
        return {}
    plain = 1 / parameters["rope_theta"] ** (torch.arange(0, head_dim(config), 2).float() / head_dim(config))
    rotary = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    return {"rope_freqs.weight": (plain / rotary).tolist()}


def load(path):
    return qzo.from_pretrained(path, device="cpu")


def logits(model, length=48):
    with torch.no_grad():
        return model((torch.arange(2 * length) * 37 % SIZES["vocab_size"]).view(2, length)).logits


pytestmark = pytest.mark.filterwarnings("ignore:.*stay frozen:UserWarning")  # of the K quants


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """(path of the file, the model whose weights are what the file holds, {parameter: type in the file})."""
    path, case = tmp_path_factory.mktemp(request.param) / "m.gguf", CASES[request.param]
    model = original(case)
    return path, model, write(path, case, model)


def test_logits(made):
    path, model, kinds = made
    ours = load(path)
    trained = {name for name, kind in kinds.items() if kind in HEADS and name.startswith("model.layers")}
    assert {name + ".weight" for name in quantized(ours)} == trained
    assert ours.config.tie_word_embeddings == model.config.tie_word_embeddings
    for length in (16, 48):  # within windows and beyond; Phi-3's short factors and the long ones
        assert relative_error(logits(ours, length), logits(model, length)) < LOGITS_FP32, length


def test_transformers_own_loader(made):
    path, model, _ = made
    ours = load(path)
    cls, config = type(model), model.config
    if config.model_type == "mistral":  # the loader knows it as Llama
        config = transformers.LlamaConfig(
            **{key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        )
        cls = transformers.LlamaForCausalLM
    theirs = cls(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"]
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"] * config.tie_word_embeddings
    assert relative_error(logits(ours), logits(theirs)) < LOGITS_FP32


def step(model, lr):
    """One step of QZO on next tokens."""
    ids = (torch.arange(24) * 29 % SIZES["vocab_size"]).view(2, 12)
    qzo.QZO(model, lr=lr).step(lambda: qzo.losses(model, {"input_ids": ids, "labels": ids}, 2))


def test_a_step_moves_scales_only(made, tmp_path):
    path, _, _ = made
    model = load(path)
    step(model, lr=0.0)
    qzo.save_pretrained(model, tmp_path / "still")
    assert (tmp_path / "still" / "m.gguf").read_bytes() == path.read_bytes()
    step(model, lr=0.05)
    qzo.save_pretrained(model, tmp_path / "moved")
    old, new = np.fromfile(path, np.uint8), np.fromfile(tmp_path / "moved" / "m.gguf", np.uint8)
    assert len(old) == len(new)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type in HEADS and tensor.name.startswith("blk"):
            size, head = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1], HEADS[tensor.tensor_type]
            at = slice(tensor.data_offset, tensor.data_offset + int(tensor.n_bytes))
            before, after = old[at].reshape(-1, size)[:, :head], new[at].reshape(-1, size)[:, :head]
            assert (before != after).any(1).mean() > 0.9, tensor.name
            before[:] = after
    assert (old == new).all()
    # d and m are rounded to float16
    assert relative_error(logits(load(tmp_path / "moved")), logits(model)) < 1e-2
