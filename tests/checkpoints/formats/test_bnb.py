"""bitsandbytes folders, nf4 and fp4: the tool's file, made ones, double quantization, saving and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qzo
from qzo.checkpoints.formats import bnb
from qzo.kernels.table import FP4, NF4
from tests.support import tiny
from tests.support.close import assert_same_bits
from tests.support.paths import FIXTURES

FIXTURE = FIXTURES / "bnb-nf4"
TENSOR = "model.layers.0.mlp.down_proj.weight"


def decoded(tensors, name):
    """float32 [N, K] of a layer, code by code."""
    state = json.loads(bytes(next(v for k, v in tensors.items() if k.startswith(name + ".quant_state")).tolist()))
    n, k = state["shape"]
    absmax = tensors[name + ".absmax"]
    if absmax.dtype == torch.uint8:
        nested = [float(tensors[name + ".nested_absmax"][i // state["nested_blocksize"]]) for i in range(len(absmax))]
        entries = tensors[name + ".nested_quant_map"]
        absmax = torch.stack([entries[int(a)] * b for a, b in zip(absmax, nested, strict=True)])
        absmax += state["nested_offset"]
    codes = [half for byte in tensors[name].flatten().tolist() for half in (byte >> 4, byte & 15)]
    values = tensors[name + ".quant_map"][torch.tensor(codes)]
    return (values * absmax.repeat_interleave(state["blocksize"])[: n * k]).view(n, k)


def packed_tensors(weight, kind, double=False, size=64):
    """The tensors of a layer as bitsandbytes writes them, made here from a float [N, K]."""
    table = torch.tensor({"nf4": NF4, "fp4": FP4}[kind])
    blocks = weight.reshape(-1, size)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1).flatten()
    state = {"quant_type": kind, "blocksize": size, "dtype": "float16", "shape": list(weight.shape)}
    made = {"": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], ".absmax": absmax, ".quant_map": table}
    if double:
        offset = float(absmax.mean())
        entries = torch.linspace(-1, 1, 256)
        nested = (absmax - offset).abs().view(-1).split(16)
        largest = torch.stack([part.amax() for part in nested])
        unit = (absmax - offset) / largest.repeat_interleave(16)[: len(absmax)]
        made[".absmax"] = (unit[:, None] - entries).abs().argmin(1).to(torch.uint8)
        made |= {".nested_absmax": largest, ".nested_quant_map": entries}
        state |= {"nested_blocksize": 16, "nested_offset": offset, "nested_dtype": "float32"}
    made[f".quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return made


def folder_of(path, kind="nf4", double=False, size=64):
    """A folder of a tiny Llama; returns (path, its tensors)."""
    tiny.save_checkpoint(path, hidden=128)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        tensors |= {name + part: value for part, value in packed_tensors(weight, kind, double, size).items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path, tensors


def train(model, lr):
    optimizer = qzo.QZO(model, lr=lr)
    batch = {"input_ids": torch.arange(1, 25).view(2, 12), "labels": torch.arange(1, 25).view(2, 12)}
    optimizer.step(lambda: qzo.losses(model, batch, 2))
    return model


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------------------- reading


def test_the_tools_own_file():
    model = qzo.from_pretrained(FIXTURE, device="cpu")
    want = load_file(FIXTURE / "expected.safetensors")
    with torch.no_grad():
        got = model(want["input_ids"]).logits
    assert float((got - want["logits"]).norm() / want["logits"].norm()) < 2e-5
    tensors = load_file(FIXTURE / "model.safetensors")
    for name in [name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")]:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert (layer.table, layer.group_size) == (NF4, 64)
        assert_same_bits(layer.dequantize(), decoded(tensors, name))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_made_folders(tmp_path, kind, double):
    path, tensors = folder_of(tmp_path / "source", kind, double)
    model = qzo.from_pretrained(path, device="cpu")
    for name in [name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")]:
        got = model.get_submodule(name.removesuffix(".weight")).dequantize()
        torch.testing.assert_close(got, decoded(tensors, name), rtol=2e-7, atol=0)


def test_blocks_that_are_no_groups_of_a_row_stay_dense(tmp_path):
    path, tensors = folder_of(tmp_path / "source", size=256)
    with pytest.warns(UserWarning, match="stays dense and frozen"), pytest.raises(ValueError, match="nothing to train"):
        qzo.from_pretrained(path, device="cpu")
    parts = {p.removeprefix(TENSOR).lstrip("."): t for p, t in tensors.items() if p.startswith(TENSOR)}
    named = {"weight" + ("." + part if part else ""): t for part, t in parts.items()}
    with pytest.warns(UserWarning, match="blocks of 256"):
        dense = bnb._packed("down_proj", named, torch.float32)
    torch.testing.assert_close(dense, decoded(tensors, TENSOR), rtol=2e-7, atol=0)


# ----------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("make", ["fixture", "nf4", "double"])
def test_a_step_without_a_rate_saves_the_same_bytes(tmp_path, make):
    path = tmp_path / "source"
    if make == "fixture":
        shutil.copytree(FIXTURE, path)
    else:
        folder_of(path, double=make == "double")
    model = train(qzo.from_pretrained(path, device="cpu"), 0.0)
    qzo.save_pretrained(model, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(path)


def test_a_step_changes_absmax_and_nothing_else(tmp_path):
    model = train(qzo.from_pretrained(FIXTURE, device="cpu"), 0.1)
    qzo.save_pretrained(model, tmp_path / "out")
    before, after = load_file(FIXTURE / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".absmax")}
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    for name, scales in qzo.scales(model).items():
        assert_same_bits(qzo.scales(again)[name], scales)


def test_double_quantized_scales_that_moved_are_written_plain(tmp_path):
    path, before = folder_of(tmp_path / "source", double=True)
    model = train(qzo.from_pretrained(path, device="cpu"), 0.1)
    report = qzo.save_pretrained(
        model,
        tmp_path / "out",
        {"input_ids": torch.ones(1, 8, dtype=torch.int64), "labels": torch.ones(1, 8, dtype=torch.int64)},
    )
    assert report["loss_before"] == report["loss_after"]  # float32 absmax: nothing is rounded
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        after, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert metadata == {"format": "pt"}
    assert not any(".nested_" in name for name in after)
    same = [name for name in after if not name.endswith(".absmax") and ".quant_state" not in name]
    assert all(torch.equal(after[name], before[name]) for name in same)
    for name, scales in qzo.scales(model).items():
        assert_same_bits(after[name + ".weight.absmax"], scales.T.flatten().contiguous())
    state = json.loads(bytes(after[TENSOR + ".quant_state.bitsandbytes__nf4"].tolist()))
    assert not any(key.startswith("nested") for key in state)
    assert state["blocksize"] == 64
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is False
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    ids = torch.ones(1, 8, dtype=torch.int64)
    assert_same_bits(again(ids).logits, model(ids).logits)


# -------------------------------------------------------------------------------------------- quantizing to nf4


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_float_model_on_a_table(tmp_path, kind):
    model = LlamaForCausalLM.from_pretrained(tiny.save_checkpoint(tmp_path / "float", hidden=128))
    ours = qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=64, table=kind)
    qzo.save_pretrained(ours, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    want = packed_tensors(model.get_submodule(name).weight.detach(), kind)
    assert torch.equal(tensors[name + ".weight"], want[""]) or kind == "fp4"  # fp4 has two codes for zero
    torch.testing.assert_close(tensors[name + ".weight.absmax"], want[".absmax"])
    assert_same_bits(decoded(tensors, name + ".weight"), ours.get_submodule(name).dequantize())
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    ids = torch.arange(1, 13).view(1, 12)
    assert_same_bits(again(ids).logits, ours(ids).logits)
    with pytest.raises(ValueError, match="save it as bitsandbytes"):
        qzo.export(ours, tmp_path / "no", format="gptq")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("hidden", "block"), [(96, 32), (192, 64), (256, 256)])
def test_rows_that_are_no_block_are_written_in_blocks_that_the_tool_has(tmp_path, hidden, block):
    """bitsandbytes takes blocks of 32, 64 and so on to 4096 only, and each layer may have its own."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=320,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=30,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    ours = qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=-1, table="nf4")
    qzo.save_pretrained(ours, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    sizes = {"mlp.gate_proj": block, "mlp.down_proj": 64}  # 320 = 5 x 64
    for name, size in {f"model.layers.0.{leaf}": size for leaf, size in sizes.items()}.items():
        state = json.loads(bytes(tensors[f"{name}.weight.quant_state.bitsandbytes__nf4"].tolist()))
        assert state["blocksize"] == size
        assert_same_bits(decoded(tensors, f"{name}.weight"), ours.get_submodule(name).dequantize())
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    ids = torch.arange(1, 13).view(1, 12)
    torch.testing.assert_close(again(ids).logits, ours(ids).logits)


def test_the_derivative_of_a_table_layer():
    layer = qzo.QZOLinear.from_linear(torch.nn.Linear(128, 24), group_size=64, table="nf4")
    x, eps = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)), 3e-2
    with qzo.evaluating(layer, qzo.Evaluations([3, 3], [eps, -eps])):
        plus, minus = layer(x.repeat(2, 1)).double().split(6)
    z = qzo.noise("rademacher", 3, qzo.scale_index(layer)[""])
    slope = layer.dequantize().double() * z.T.repeat_interleave(64, 1)
    want = x.double() @ slope.T
    assert float(((plus - minus) / (2 * eps) - want).norm() / want.norm()) < 1e-5


def test_a_state_dict_carries_the_table():
    layer = qzo.QZOLinear.from_linear(torch.nn.Linear(64, 8), group_size=64, table="fp4")
    other = qzo.QZOLinear.from_linear(torch.nn.Linear(64, 8), group_size=64)
    other.load_state_dict(layer.state_dict())
    assert other.table == FP4
    assert_same_bits(other.dequantize(), layer.dequantize())


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({".quant_map": torch.zeros(15)}, "16 finite entries"),
        ({".quant_map": torch.full((16,), float("nan"))}, "16 finite entries"),
        ({".quant_map": None}, "no weight.quant_map"),
        ({".absmax": torch.full((3,), 1.0)}, "3 of absmax do not fit"),
        ({".absmax": torch.zeros(1, dtype=torch.uint8)}, "no weight.nested_absmax"),
        ({".quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)}, "quant_state is damaged"),
        ({".quant_state.bitsandbytes__nf4": None}, "quant_state.bitsandbytes__nf4 or"),
        ({"": torch.zeros(3, 1, dtype=torch.uint8)}, "3 bytes of codes"),
        (
            {".quant_state.bitsandbytes__nf4": torch.full((100_000,), ord("["), dtype=torch.uint8)},
            "quant_state is damaged",
        ),
    ],
)
def test_damaged_layers_are_one_clear_line(tmp_path, change, message):
    path, tensors = folder_of(tmp_path / "source")
    for part, value in change.items():
        tensors.pop(TENSOR + part)
        if value is not None:
            tensors[TENSOR + part] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        qzo.from_pretrained(path, device="cpu")
    assert TENSOR in str(error.value)


def test_a_double_quantized_layer_needs_its_offset(tmp_path):
    path, tensors = folder_of(tmp_path / "source", double=True)
    key = TENSOR + ".quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    del state["nested_offset"]
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="nested_offset is None in its quant_state; expected a number"):
        qzo.from_pretrained(path, device="cpu")


@pytest.mark.parametrize(("options", "got"), [({"bits": 8}, "bits=8"), ({"symmetric": False}, "symmetric=False")])
def test_a_table_has_four_bits_and_no_zero_points(tmp_path, options, got):
    linear = torch.nn.Linear(64, 8)
    for attempt in (
        lambda: qzo.QZOLinear.from_linear(linear, group_size=64, table="nf4", **options),
        lambda: qzo.quantize_(torch.nn.Sequential(linear), group_size=64, table="nf4", **options),
        lambda: qzo.from_pretrained(tmp_path, table="nf4", **options),
    ):
        with pytest.raises(ValueError, match=f"4 bits and no zero points, got {got}"):
            attempt()


@pytest.mark.parametrize(("config", "message"), [({"load_in_8bit": True}, "LLM.int8"), ({}, "without load_in_4bit")])
def test_configs_that_are_refused(tmp_path, config, message):
    path, _ = folder_of(tmp_path / "source")
    whole = json.loads((path / "config.json").read_text())
    whole["quantization_config"] = {"quant_method": "bitsandbytes"} | config
    (path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=message):
        qzo.from_pretrained(path, device="cpu")


def test_integers_are_no_table(tmp_path):
    tiny.save_checkpoint(tmp_path / "float")
    model = qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=32)
    with pytest.raises(ValueError, match=r"all fp4, in groups .*; these have other codes in groups of 32"):
        qzo.export(model, tmp_path / "out", format="bitsandbytes")
    assert not (tmp_path / "out").exists()


def test_rows_that_no_block_divides_are_refused(tmp_path):
    config = LlamaConfig(
        hidden_size=80, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"blocks of 32 to 4096 weights fill; .* in groups of 80"):
        qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=-1, table="nf4")


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="'nf4', 'fp4'"):
        qzo.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 8)), group_size=64, table="nf5")
