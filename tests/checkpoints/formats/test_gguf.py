import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from qzo.checkpoints.formats.gguf_file import GGUFFile
from tests.support.checkpoints import (
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    SHAPES,
    TYPES,
    VOCAB,
    blocks,
    decode_gguf,
    quantized,
    relative_error,
    scale_randomly,
    write_gguf,
)
from tests.support.paths import FIXTURES

UP = "blk.0.ffn_up.weight"
FIXTURE = FIXTURES / "gguf-q4_1"
LOGITS_FP32 = 2e-5  # float32 sums in another order; a wrong code, zero point or row gives 1e-2 to 1.4


def tensor_data(path, name):
    return next(t.data for t in gguf.GGUFReader(path).tensors if t.name == name)


def load(path):
    return qzo.from_pretrained(path, device="cpu")


@pytest.fixture(params=[TYPES.Q4_0, TYPES.Q4_1, TYPES.Q8_0], ids=lambda kind: kind.name.lower())
def tiny(request, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, request.param)
    return path


def test_fixture_logits():
    expected = load_file(FIXTURE / "expected.safetensors")
    with torch.no_grad():
        logits = load(FIXTURE)(expected["input_ids"]).logits
    assert relative_error(logits, expected["logits"]) < LOGITS_FP32


def test_weights_equal_the_packages_own(tiny):
    model, expected = load(tiny), decode_gguf(tiny)
    assert set(quantized(model)) == set(expected)
    for name, layer in quantized(model).items():
        # Q4_1 is d*q + m there and d*(q - zf) here: two roundings of numbers up to 16 d
        torch.testing.assert_close(layer.dequantize(), expected[name], rtol=0, atol=1e-6, msg=name)


def test_logits_equal_plain_llama_of_decoded_weights(tiny):
    # rope_theta, eps, heads, tied embeddings and the order of q and k rows all enter
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCAB,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    plain, model = LlamaForCausalLM(config).eval(), load(tiny)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    state |= {name + ".weight": weight for name, weight in decode_gguf(tiny).items()}
    plain.load_state_dict(state)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert relative_error(model(ids).logits, plain(ids).logits) < LOGITS_FP32


def test_saved_unchanged_is_the_same_file(tiny, tmp_path):
    qzo.save_pretrained(load(tiny), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tiny.gguf"]
    assert (tmp_path / "out" / "tiny.gguf").read_bytes() == tiny.read_bytes()


def test_saved_scales_and_nothing_else(tiny, tmp_path):
    model = load(tiny)
    zeros = {name: layer.zeros for name, layer in quantized(model).items()}
    new = scale_randomly(model, keep=0.5)
    qzo.save_pretrained(model, tmp_path / "out")
    reloaded = quantized(load(tmp_path / "out"))
    for name, scales in new.items():
        rounded = scales.to(torch.float16).float()
        assert torch.equal(reloaded[name].read_scales(), rounded), name
        if zeros[name] is not None:
            # the zero point is kept up to the rounding of m = -d zf to float16, 2^-11 relative
            torch.testing.assert_close(reloaded[name].zeros, zeros[name], rtol=2**-10, atol=0, msg=name)
    assert_only_scales_differ(tiny, tmp_path / "out" / "tiny.gguf")


def assert_only_scales_differ(before, after):
    """Every byte outside d and m of the blocks that train is the same, and m only moves where d does."""
    old, new = np.fromfile(before, np.uint8), np.fromfile(after, np.uint8)
    assert len(old) == len(new)
    allowed = np.zeros(len(old), bool)
    for tensor in gguf.GGUFReader(before).tensors:
        size, head = {TYPES.Q4_0: (18, 2), TYPES.Q4_1: (20, 4), TYPES.Q8_0: (34, 2)}.get(tensor.tensor_type, (0, 0))
        if size and tensor.name.startswith("blk"):
            at = slice(tensor.data_offset, tensor.data_offset + int(tensor.n_bytes))
            moved = (old[at].reshape(-1, size)[:, :2] != new[at].reshape(-1, size)[:, :2]).any(1)
            assert 0 < moved.sum() < len(moved), tensor.name
            allowed[at].reshape(-1, size)[:, :head] = moved[:, None]
    assert not ((old != new) & ~allowed).any()


def test_minimum_follows_the_rounded_scale(tmp_path):
    write_gguf(tmp_path / "m.gguf", TYPES.Q4_1, layers=1)
    model = load(tmp_path / "m.gguf")
    name = "model.layers.0.mlp.up_proj"
    scale_randomly(model)
    zeros = quantized(model)[name].zeros.T
    qzo.save_pretrained(model, tmp_path / "out")
    data = tensor_data(tmp_path / "out" / "m.gguf", "blk.0.ffn_up.weight")
    heads = np.ascontiguousarray(data.reshape(-1, 20)[:, :4]).view(np.float16).astype(np.float32)
    d, m = torch.from_numpy(heads).view(FFN, -1, 2).unbind(-1)
    assert torch.equal(m, (-d * zeros).to(torch.float16).float())


def test_other_types_stay_dense_and_frozen(tmp_path):
    rng = np.random.default_rng(1)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)} | SHAPES
    frozen = [
        ("blk.0.", "attn_q", TYPES.Q5_0),
        ("blk.0.", "ffn_down", TYPES.Q5_1),
        ("blk.1.", "ffn_gate", TYPES.Q5_1),
        ("blk.1.", "ffn_up", TYPES.F16),
        ("", "output", TYPES.Q8_0),
        ("", "token_embd", TYPES.Q8_0),
    ]
    path = tmp_path / "mixed.gguf"
    write_gguf(
        path,
        tied=False,
        change={
            prefix + name + ".weight": (gguf.quantize(rng.normal(size=shapes[name]).astype("f4"), kind), kind)
            for prefix, name, kind in frozen
        },
    )
    with pytest.warns(UserWarning, match="stay frozen") as warned:
        model = load(path)
    assert len(warned) == 1
    assert "mixed.gguf: 4 of 14 layers stay frozen (2 Q5_1, 1 Q5_0, 1 F16); only Q4_0, Q4_1, Q8_0 train" in str(
        warned[0].message
    )
    expected = decode_gguf(path)
    assert type(model.lm_head) is torch.nn.Linear
    for name in ("0.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.up_proj"):
        layer = model.get_submodule("model.layers." + name)
        assert type(layer) is torch.nn.Linear
        assert torch.equal(layer.weight, expected["model.layers." + name]), name
    assert len(quantized(model)) == 7 * LAYERS - 4
    assert not any(p.requires_grad for p in model.parameters())
    scale_randomly(model, keep=0.5)
    qzo.save_pretrained(model, tmp_path / "out")
    assert_only_scales_differ(path, tmp_path / "out" / "mixed.gguf")


def test_four_bit_output_is_a_layer_and_four_bit_embedding_dense(tmp_path):
    rng = np.random.default_rng(2)
    path = tmp_path / "all.gguf"
    write_gguf(
        path,
        tied=False,
        change={
            "output.weight": (blocks((VOCAB, HIDDEN), TYPES.Q4_0, rng), TYPES.Q4_0),
            "token_embd.weight": (blocks((VOCAB, HIDDEN), TYPES.Q4_1, rng), TYPES.Q4_1),
        },
    )
    model = load(path)
    assert isinstance(model.lm_head, qzo.QZOLinear)
    expected = gguf.dequantize(tensor_data(path, "token_embd.weight"), TYPES.Q4_1)
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(expected))


def test_damaged_block_of_a_frozen_layer(tmp_path):
    raw = np.zeros((FFN, HIDDEN // 32 * 22), np.uint8)
    raw[3, 23] = 0x7E
    write_gguf(tmp_path / "n.gguf", change={UP: (raw, TYPES.Q5_0)})
    message = r"blk\.0\.ffn_up\.weight in n\.gguf: a block holds NaN or infinity"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="1 of 14 layers stay"):
        load(tmp_path / "n.gguf")


def test_block_of_zeros_stays_zero(tmp_path):
    raw = blocks(SHAPES["ffn_up"], TYPES.Q4_1, np.random.default_rng(4))
    raw.reshape(FFN, -1, 20)[5, 1, :4] = 0
    write_gguf(tmp_path / "z.gguf", TYPES.Q4_1, change={"blk.0.ffn_up.weight": (raw, TYPES.Q4_1)})
    model = load(tmp_path / "z.gguf")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert float(layer.read_scales()[1, 5]) == 0
    assert float(layer.zeros[1, 5]) == 8
    scale_randomly(model)
    qzo.save_pretrained(model, tmp_path / "out")
    file = GGUFFile(tmp_path / "out" / "z.gguf")
    info = file.tensors["blk.0.ffn_up.weight"]
    assert torch.equal(info.blocks(file.raw(info))[5, 1], torch.from_numpy(raw).view(FFN, -1, 20)[5, 1])


def test_constant_block_keeps_its_layer_dense(tmp_path):
    raw = blocks(SHAPES["ffn_up"], TYPES.Q4_1, np.random.default_rng(5))
    raw.reshape(FFN, -1, 20)[5, 1, :2] = 0
    write_gguf(tmp_path / "c.gguf", TYPES.Q4_1, change={"blk.1.ffn_up.weight": (raw, TYPES.Q4_1)})
    with pytest.warns(UserWarning, match=r"blk\.1\.ffn_up\.weight .* stays dense and frozen"):
        model = load(tmp_path / "c.gguf")
    name = "model.layers.1.mlp.up_proj"
    assert name not in quantized(model)
    assert torch.equal(model.get_submodule(name).weight, decode_gguf(tmp_path / "c.gguf")[name])


def test_vanishing_scale_keeps_its_sign(tmp_path):
    write_gguf(tmp_path / "v.gguf", layers=1)
    model = load(tmp_path / "v.gguf")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    scales = layer.read_scales()
    layer.arena.write(layer.arena_name, scales.sign() * 1e-12)
    qzo.save_pretrained(model, tmp_path / "out")
    saved = load(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj").read_scales()
    assert torch.equal(saved, scales.sign() * 2.0**-24)
    assert {-1.0, 1.0} == set(scales.sign().flatten().tolist())


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_scale_too_large_writes_nothing(tmp_path, value):
    write_gguf(tmp_path / "o.gguf", layers=1)
    model = load(tmp_path / "o.gguf")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.arena.quads(layer.arena_name)[0, 3, 1] = value
    with pytest.raises(
        ValueError,
        match=r"up(_proj|\.weight): .*(not fit float16|NaN or inf).* the run has "
        "div",
    ):
        qzo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_minimum_too_large_writes_nothing(tmp_path):
    write_gguf(tmp_path / "o.gguf", TYPES.Q4_1, layers=1)
    model = load(tmp_path / "o.gguf")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.arena.quads(layer.arena_name)[0, 3, 1] = 6e4
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight: a minimum does not fit float16"):
        qzo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


DAMAGED = blocks(SHAPES["ffn_up"], TYPES.Q4_0, np.random.default_rng(6))
DAMAGED[7, :2] = [0x00, 0x7E]  # NaN
SMALL = (blocks((FFN, 32), TYPES.Q4_0, np.random.default_rng(7)), TYPES.Q4_0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metadata": {"architecture": "mamba"}}, "architecture 'mamba'; those that can be read are gemma2, ge"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "rotary scaling 'yarn'; what can be read for Llama"),
        (
            {"change": {"rope_freqs.weight": (np.full(16, 2, np.float32), None)}},
            r"rope_freqs\.weight holds 2 at 0, Llama 3's scaling by 2 has 1;",
        ),
        ({"metadata": {"rope.dimension_count": 16}}, "rotary embedding of 16 of 32"),
        ({"metadata": {"expert_count": 8}}, "8 experts"),
        ({"metadata": {"context_length": None}}, "no metadata llama.context_length"),
        ({"change": {"blk.0.ssm_a.weight": (np.ones(3, np.float32), None)}}, r"blk\.0\.ssm_a\.weight is unknown"),
        (
            {"change": {"blk.2.attn_norm.weight": (np.ones(HIDDEN, np.float32), None)}},
            r"blk\.2\.attn_norm\.weight in bad\.gguf: LlamaForCausalLM has no tensor",
        ),
        ({"change": {UP: (DAMAGED, TYPES.Q4_0)}}, r"blk\.0\.ffn_up\.weight in bad\.gguf: scales hold NaN"),
        ({"change": {UP: SMALL}}, r"blk\.0\.ffn_up\.weight in bad\.gguf: has shape \[160, 32\]"),
        (
            {
                "change": {
                    f"blk.{layer}.{name}.weight": (np.ones(shape, np.float32), None)
                    for layer in range(LAYERS)
                    for name, shape in SHAPES.items()
                }
            },
            r"no tensor can be trained: the layers are 14 F32, and only Q4_0, Q4_1, Q8_0 train; make",
        ),
    ],
)
def test_refused(tmp_path, arguments, message):
    write_gguf(tmp_path / "bad.gguf", **arguments)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad.gguf")
