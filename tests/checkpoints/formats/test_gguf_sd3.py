"""GGUF files of Stable Diffusion 3 transformers: read as diffusers reads them, written back, and read by diffusers."""

import gguf
import numpy as np
import pytest
import torch

from qzo.checkpoints.formats import gguf_sd3
from qzo.diffusion.pipeline import open_pipeline
from qzo.diffusion.transformer import load_transformer, save_pipeline
from qzo.nn.layers import arena_of, layers
from tests.support import pipelines, sd3_gguf
from tests.support.checkpoints import relative_error
from tests.support.pipelines import output

pytest.importorskip("diffusers")
CPU = torch.device("cpu")
ROUNDED = 3e-3  # of outputs, by weights of float16


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return open_pipeline(pipelines.save_pipeline(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(5)
    return pipelines.transformer()


def by_diffusers(path, pipeline):
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel

    return SD3Transformer2DModel.from_single_file(
        str(path),
        config=str(pipeline.path / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    ).eval()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_file_goes_in_and_out_with_diffusers_numbers(kind, pipeline, plain, tmp_path):
    """Ours, and diffusers' own loader, of the file and of what is saved of it with other scales. That loader rounds
    weights to float16, so outputs are near; ours are those of the gguf package's blocks, exactly."""
    path = sd3_gguf.write(tmp_path / "m.gguf", plain, kind)
    model, origin = load_transformer(pipeline, CPU, torch.float32, gguf=path)
    assert set(layers(model)) == {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, layer in layers(model).items():
        weight = plain.get_submodule(name).weight.detach().numpy()
        blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
        wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        assert torch.allclose(layer.dequantize(), torch.from_numpy(wanted), atol=1e-7), name
    assert relative_error(output(by_diffusers(path, pipeline)), output(model)) < ROUNDED
    assert 0 < float((output(model) - output(plain)).norm() / output(plain).norm()) < 0.3
    save_pipeline(model, origin, pipeline, tmp_path / "same")
    assert (tmp_path / "same" / "m.gguf").read_bytes() == path.read_bytes()
    arena_of(model).data.mul_(1.25)
    save_pipeline(model, origin, pipeline, tmp_path / "moved")
    again, _ = load_transformer(pipeline, CPU, torch.float32, gguf=tmp_path / "moved" / "m.gguf")
    assert torch.allclose(output(again), output(model), atol=2e-3)  # scales are rounded to float16 there
    assert not torch.allclose(output(again), output(plain), atol=2e-3)
    assert all(torch.equal(layer.codes, layers(again)[n].codes) for n, layer in layers(model).items())
    theirs = by_diffusers(tmp_path / "moved" / "m.gguf", pipeline)
    assert relative_error(output(theirs), output(again)) < ROUNDED


def test_a_file_of_another_architecture_is_refused(plain, tmp_path):
    path = sd3_gguf.write(tmp_path / "m.gguf", plain, architecture="flux")
    with pytest.raises(ValueError, match=r"general\.architecture is 'flux'; a transformer of Stable Diffusion 3"):
        gguf_sd3.open_file(path)


def test_a_file_without_blocks_that_train_is_refused(plain, tmp_path):
    file = gguf_sd3.open_file(sd3_gguf.write(tmp_path / "m.gguf", plain, "F16"))
    with pytest.raises(ValueError, match="no tensor can be trained: they are F16, F32, and only Q4_0, Q4_1, Q8_0"):
        list(gguf_sd3.weights(file, torch.float32))


def test_a_tensor_of_another_model_is_named(plain, tmp_path):
    file = gguf_sd3.open_file(sd3_gguf.write(tmp_path / "m.gguf", plain))
    info = file.tensors["joint_blocks.0.x_block.attn.qkv.weight"]
    assert [name for name, _ in gguf_sd3.parts_of(file, info)] == [
        f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"
    ]
    other = type(info)("single_blocks.0.linear1.weight", info.type, info.shape, info.offset, info.nbytes)
    with pytest.raises(ValueError, match=r"tensor single_blocks.0.linear1.weight is unknown"):
        gguf_sd3.parts_of(file, other)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "told"),
    [
        ("x_block.attn.qkv.weight", (32, 32), "Q4_0", "has 32 rows, which are not those of q, k and v"),
        ("x_block.attn.qkv.bias", (2,), "F32", "has 2 rows, which are not those of q, k and v"),
        ("x_block.attn.proj.bias", (32,), "Q4_0", r"Q4_0 of shape \[32\]; only matrices may be quantized"),
        ("x_block.attn.proj.bias", (32,), "Q8_0", r"Q8_0 of shape \[32\]; only matrices may be quantized"),
        ("context_block.adaLN_modulation.1.bias", (3,), "F32", "has 3 rows, which are not shift and scale"),
    ],
)
def test_a_tensor_of_another_size_is_named(tmp_path, name, shape, kind, told):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "sd3")
    sizes: list[tuple[str, tuple[int, ...], str]] = [("x_block.mlp.fc1.weight", (32, 32), "Q4_0"), (name, shape, kind)]
    for each, size, form in sizes:
        blocks = gguf.GGMLQuantizationType[form]
        data = gguf.quants.quantize(np.ones(size, np.float32), blocks)
        writer.add_tensor(f"joint_blocks.0.{each}", data, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=told):
        list(gguf_sd3.weights(gguf_sd3.open_file(tmp_path / "m.gguf"), torch.half))
