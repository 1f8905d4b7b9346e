"""Codebooks under an evaluation: the kernel (interpreted) and its reference have the oracle's bits."""
import pytest
import torch

from qzo.kernels import noise, perturb
from qzo.kernels.noise import LAWS
from tests import oracle
from tests.support.close import assert_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_poison")


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("base4", [0, 2**32 - 10])
def test_perturbed_codebooks_have_the_bits_of_their_reference(law, relative, base4):
    values = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    seed, coef = torch.tensor([-7]), torch.tensor([oracle.raw_coef(law, -0.3)])
    ours, reference = torch.empty(300, 4), torch.empty(300, 4)
    perturb.launch(values, seed, coef, ours, base4=base4, law=LAWS[law], relative=relative)
    perturb.perturb_codebooks_torch(values, seed, coef, reference, base4=base4, law=LAWS[law], relative=relative)
    assert_same_bits(ours, reference)
    k, c = oracle.raw_at(law, -7, 4 * base4 + torch.arange(1200).view(300, 4)), float(coef)
    factor = (1 + c * k).float().double()
    assert_same_bits(ours, (values.double() * factor if relative else values.double() + c * k).float())


def test_codebooks_larger_than_a_block_of_noise(monkeypatch):
    values, seed, coef = torch.randn(300, 4), torch.tensor([5]), torch.tensor([0.05])
    whole, parts = torch.empty(300, 4), torch.empty(300, 4)
    perturb.perturb_codebooks_torch(values, seed, coef, whole, base4=7, law=LAWS["ih4"], relative=True)
    monkeypatch.setattr(perturb, "BLOCK_QUADS", 64)
    perturb.perturb_codebooks_torch(values, seed, coef, parts, base4=7, law=LAWS["ih4"], relative=True)
    assert_same_bits(parts, whole)


def test_gaussian_noise_of_the_kernel_is_that_of_its_reference():
    """Within the tolerance of test_noise.py: a part of 2e-6 of the largest value."""
    values, seed, coef = torch.ones(70, 4), torch.tensor([3]), torch.tensor([0.5])
    ours, reference = torch.empty(70, 4), torch.empty(70, 4)
    for run, out in ((perturb.launch, ours), (perturb.perturb_codebooks_torch, reference)):
        run(values, seed, coef, out, base4=11, law=LAWS["gaussian"], relative=False)
    assert_close(ours, reference.double(), 1.0, 1e-5)
    assert float(reference.std()) > 0.4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_is_rounded_once_to_the_type_of_the_activations(dtype):
    values, seed, coef = torch.randn(9, 4), torch.tensor([3]), torch.tensor([0.1])
    options = dict(base4=0, law=LAWS["ih4"], relative=True)
    whole = torch.empty(9, 4)
    perturb.perturb_codebooks_torch(values, seed, coef, whole, **options)
    rounded = torch.empty(9, 4, dtype=dtype)
    perturb.perturb_codebooks_torch(values, seed, coef, rounded, **options)
    assert_same_bits(rounded, whole.to(dtype))


def test_scratch_does_not_grow_beyond_a_block():
    assert perturb.scratch_bytes(10) == 10 * perturb.scratch_bytes(1)
    assert perturb.scratch_bytes(10 * noise.BLOCK_QUADS) == perturb.scratch_bytes(noise.BLOCK_QUADS)
