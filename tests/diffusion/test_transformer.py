"""A pipeline's transformer in, and out in a form that diffusers reads."""

import json
import shutil

import pytest
import torch

from qzo.diffusion.pipeline import open_pipeline
from qzo.diffusion.transformer import load_transformer, save_pipeline, save_transformer
from qzo.kernels.table import NAMED
from qzo.nn.layers import arena_of, layers

CPU = torch.device("cpu")


def inputs(rows=2):
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(rows, 5, 64, generator=generator),
        "pooled_projections": torch.randn(rows, 64, generator=generator),
        "timestep": torch.linspace(100, 900, rows),
    }


def output(model, rows=2):
    with torch.no_grad():
        return model(**inputs(rows), return_dict=False)[0]


@pytest.fixture
def loaded(pipeline_dir):
    pipeline = open_pipeline(pipeline_dir)
    return pipeline, *load_transformer(pipeline, CPU, torch.float32, group_size=32)


def test_a_float_transformer_is_quantized_on_the_way_in(pipeline_dir, loaded):
    """Every Linear, adaLN's too; the output stays near the float one's."""
    from diffusers import SD3Transformer2DModel

    _, model, _ = loaded
    plain = SD3Transformer2DModel.from_pretrained(pipeline_dir / "transformer").eval()
    linears = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(layers(model)) == linears
    assert "norm_out.linear" in linears
    want, got = output(plain), output(model)
    assert 0 < float((got - want).norm() / want.norm()) < 0.3
    for name, layer in layers(model).items():
        weight = plain.get_submodule(name).weight
        assert float((layer.dequantize() - weight).norm() / weight.norm()) < 0.15, name


def test_what_is_saved_loads_again_with_the_same_numbers(loaded, tmp_path):
    """NF4 folder out, in, and out once more with other scales: the codes keep their bytes."""
    pipeline, model, origin = loaded
    arena_of(model).data.mul_(1.25)
    save_pipeline(model, origin, pipeline, tmp_path / "first")
    again = open_pipeline(tmp_path / "first")
    second, from_folder = load_transformer(again, CPU, torch.float32)
    assert from_folder.method == "bitsandbytes"
    assert torch.equal(output(second), output(model))
    arena_of(second).data.mul_(0.5)
    save_transformer(second, from_folder, tmp_path / "second" / "transformer")
    third = tmp_path / "second"
    for part in again.parts:
        if part != "transformer":
            shutil.copytree(tmp_path / "first" / part, third / part)
    shutil.copy(tmp_path / "first" / "model_index.json", third)
    reloaded, _ = load_transformer(open_pipeline(third), CPU, torch.float32)
    assert torch.equal(output(reloaded), output(second))
    assert all(torch.equal(a.codes, layers(reloaded)[n].codes) for n, a in layers(model).items())


def test_the_folder_is_laid_out_as_diffusers_writes_one(loaded, tmp_path):
    """Names, dtypes and shapes of bitsandbytes; every other part is the source's own files."""
    from safetensors.torch import load_file

    pipeline, model, origin = loaded
    save_pipeline(model, origin, pipeline, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SD3Transformer2DModel"
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    name, layer = next(iter(layers(model).items()))
    n, k = layer.out_features, layer.in_features
    assert tensors[f"{name}.weight"].shape == (n * k // 2, 1)
    assert tensors[f"{name}.weight.absmax"].shape == (n * k // 32,)
    nibbles = torch.stack([tensors[f"{name}.weight"] >> 4, tensors[f"{name}.weight"] & 15], -1).flatten()
    weight = torch.tensor(NAMED["nf4"])[nibbles.long()].view(-1, 32) * tensors[f"{name}.weight.absmax"].unsqueeze(1)
    assert torch.equal(weight.view(n, k), layer.dequantize())
    assert set(tensors) >= {f"{name}.bias", "pos_embed.pos_embed", "pos_embed.proj.weight"}
    for part in pipeline.parts:
        if part != "transformer":
            there = {f.relative_to(pipeline.path): f.read_bytes() for f in (pipeline.path / part).rglob("*.*")}
            assert all((tmp_path / "out" / f).read_bytes() == held for f, held in there.items())


def test_rows_of_evaluations_are_those_of_the_model_itself(loaded):
    """Row blocks keep their order through the transformer: two copies give the output twice."""
    _, model, _ = loaded
    once = output(model)
    with torch.no_grad():
        twice = model(**{k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in inputs().items()}, return_dict=False)[0]
    assert torch.allclose(twice[:2], once, atol=1e-6)
    assert torch.allclose(twice[2:], once, atol=1e-6)


def test_the_source_is_never_overwritten(loaded):
    pipeline, model, origin = loaded
    with pytest.raises(ValueError, match="the source is never overwritten"):
        save_transformer(model, origin, pipeline.path / "transformer")


def test_a_quantization_that_cannot_be_read_is_named(pipeline_dir, tmp_path):
    folder = shutil.copytree(pipeline_dir, tmp_path / "p")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "quanto"}}))
    with pytest.raises(ValueError, match="quant_method 'quanto' cannot be read; a transformer is float, bitsandbytes"):
        load_transformer(open_pipeline(folder), CPU, torch.float32)


def test_an_incomplete_folder_is_refused(pipeline_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(pipeline_dir, tmp_path / "p")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    held = load_file(path)
    held.pop("proj_out.weight")
    save_file(held, path)
    with pytest.raises(ValueError, match=r"1 tensors are missing, the first is proj_out\.weight"):
        load_transformer(open_pipeline(folder), CPU, torch.float32, 32)


def test_sharded_weights_are_read_by_their_index(pipeline_dir, loaded, tmp_path):
    """As diffusers writes large ones."""
    folder = shutil.copytree(pipeline_dir, tmp_path / "p")
    shutil.rmtree(folder / "transformer")
    from diffusers import SD3Transformer2DModel

    plain = SD3Transformer2DModel.from_pretrained(pipeline_dir / "transformer")
    plain.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    model, _ = load_transformer(open_pipeline(folder), CPU, torch.float32, 32)
    assert torch.equal(output(model), output(loaded[1]))
