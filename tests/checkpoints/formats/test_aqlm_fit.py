"""The tests' own fit of AQLM codebooks: exact where it can be, better with every round, written in AQLM's layout."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.support import aqlm_fit, tiny


@pytest.fixture(scope="module")
def weight():
    """[256, 128] whose rows differ in size by powers of two, which only their scales can follow."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(256, 128, generator=generator) * 2.0 ** torch.arange(256).remainder(9)[:, None]


def error(weight, fitted):
    unit = weight.square().mean(1, keepdim=True).sqrt()
    return float(((aqlm_fit.decode(*fitted) - weight) / unit).norm() / math.sqrt(weight.numel()))


def test_as_many_entries_as_vectors_leave_nothing(weight):
    """16 different vectors, a codebook of 16: k-means starts on all of them and stays."""
    few = weight[:2, :64].reshape(16, 8)
    codes, codebooks, scales = aqlm_fit.fit(few.reshape(2, 64), books=1, bits=4)
    assert (codes.shape, codes.dtype) == ((2, 8, 1), torch.int64)
    assert (codebooks.shape, scales.shape) == ((1, 16, 8), (2,))
    assert sorted(codes.flatten().tolist()) == list(range(16))
    torch.testing.assert_close(aqlm_fit.decode(codes, codebooks, scales), few.reshape(2, 64))


def test_rounds_and_codebooks_lower_the_error(weight):
    errors = [error(weight, aqlm_fit.fit(weight, bits=6, rounds=rounds)) for rounds in (0, 1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.99 * errors[0]
    by_books = [error(weight, aqlm_fit.fit(weight, books, bits=6)) for books in (1, 2, 3)]
    assert by_books[1] < 0.8 * by_books[0]
    assert by_books[2] < 0.8 * by_books[1]


def test_entries_are_means_and_codes_are_nearest(weight):
    codes, [book], scales = aqlm_fit.fit(weight, books=1, bits=5, rounds=80)
    vectors = (weight / scales[:, None]).view(-1, 8)
    assert torch.equal(codes.flatten(), torch.cdist(vectors.double(), book.double()).argmin(1))
    for entry in range(0, 32, 5):
        mean = vectors[codes.flatten() == entry].mean(0)
        torch.testing.assert_close(book[entry], mean)


def test_the_seed_decides_all_bits(weight):
    first, again, other = (aqlm_fit.fit(weight, bits=5, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_a_row_of_zeros_stays_zero(weight):
    gap = torch.cat([weight[:8], torch.zeros(1, 128)])
    decoded = aqlm_fit.decode(*aqlm_fit.fit(gap, bits=4))
    assert torch.isfinite(decoded).all()
    assert not decoded[8].any()


@pytest.mark.parametrize("shape", [(256, 60), (2, 64)])
def test_weights_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match=rf"\[{shape[0]}, {shape[1]}\] has no 256 or more vectors"):
        aqlm_fit.fit(torch.ones(shape))


@pytest.mark.parametrize(("books", "bits", "kind"), [(2, 8, torch.int8), (1, 9, torch.int16)])
def test_the_folder_is_in_aqlms_layout(tmp_path, books, bits, kind):
    """Decoded from the files as the format has it: an index is the code modulo 2^bits."""
    model = LlamaForCausalLM.from_pretrained(tiny.save_checkpoint(tmp_path / "float", hidden=128))
    chosen = ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    held = aqlm_fit.write_folder(
        tmp_path / "aqlm", model.config.to_dict(), dict(model.state_dict()), chosen, books=books, bits=bits, rounds=1
    )
    tensors = load_file(tmp_path / "aqlm/model.safetensors")
    assert held.keys() == set(chosen)
    for name in chosen:
        codes, codebooks, scales = (tensors.pop(f"{name}.{part}") for part in ("codes", "codebooks", "scales"))
        assert (codes.shape, codes.dtype, int(codes.min()) < 0) == ((128, 16, books), kind, True)
        assert (codebooks.shape, codebooks.dtype) == ((books, 1 << bits, 1, 8), torch.float16)
        assert (scales.shape, scales.dtype) == ((128, 1, 1, 1), torch.float16)
        index = codes.long() % (1 << bits)
        total = torch.stack([codebooks[c, index[..., c], 0].float() for c in range(books)]).sum(0).view(128, 128)
        assert torch.equal(total * scales.float().view(128, 1), held[name])
        weight = model.get_submodule(name).weight.detach()
        assert float((held[name] - weight).norm() / weight.norm()) < 0.6
    assert tensors.keys() == model.state_dict().keys() - {f"{name}.weight" for name in chosen}
    assert all(torch.equal(t, model.state_dict()[name].half()) for name, t in tensors.items())
    config = json.loads((tmp_path / "aqlm/config.json").read_text())
    assert config["hidden_size"] == 128
    assert len(config["quantization_config"].pop("linear_weights_not_to_quantize")) == 1 + 12
    assert config["quantization_config"] == {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": books,
        "nbits_per_codebook": bits,
    }
