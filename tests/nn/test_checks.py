"""What a matmul refuses, each fault by its own message: shapes, dtypes and devices, before anything is computed."""

import dataclasses

import pytest
import torch

from qzo.kernels.noise import RADEMACHER
from qzo.kernels.operands import Perturbation
from qzo.kernels.table import NF4
from qzo.nn.checks import check_matmul, check_rows
from tests.support.aqlm_checkpoints import a_layer
from tests.support.small_layers import asymmetric

K, N = 128, 6


def perturbation(count=2, coefs=None, **options):
    return Perturbation(
        torch.arange(count), torch.full((count if coefs is None else coefs,), 0.1), RADEMACHER, **options
    )


@pytest.fixture(scope="module")
def weight():
    """4-bit codes of [6, 128] in groups of 32 with zero points and a bias."""
    return asymmetric(K, N).kernel_weight()


@pytest.fixture(scope="module")
def vectors():
    """Two codebooks of 256 vectors for [24, 128]."""
    return a_layer().kernel_weight()


@pytest.mark.parametrize("shape", [(K,), (4, K), (2, 3, K), (0, K)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_fits_passes(weight, vectors, shape, dtype):
    x, some = torch.zeros(shape, dtype=dtype), perturbation(2 if shape[0] % 2 == 0 and len(shape) > 1 else 1)
    check_matmul(x, weight, some)
    check_matmul(x, vectors, some)
    symmetric = dataclasses.replace(weight, zeros=None, bias=None)
    check_matmul(x, symmetric, some)
    check_matmul(x, dataclasses.replace(symmetric, table=NF4), some)
    check_matmul(x, dataclasses.replace(vectors, book4=6), some)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, K, dtype=torch.float64), r"got torch.float64 \[2, 128\]"),
        (
            torch.zeros(2, K, dtype=torch.int64),
            r"x must be float16, bfloat16 or float32 \[.., in_features\], got torch.int",
        ),
        (torch.tensor(1.0), r"got torch.float32 \[\]"),
    ],
)
def test_inputs_of_another_type(weight, x, message):
    with pytest.raises(TypeError, match=message):
        check_matmul(x, weight, perturbation())


def test_inputs_of_another_width(weight):
    with pytest.raises(
        ValueError, match=r"x has 96 columns, which does not fit 4-bit codes torch.uint8 \[6, 68\]: in_f"
    ):
        check_matmul(torch.zeros(2, 96), weight, perturbation())
    with pytest.raises(ValueError, match="x has 127 columns"):  # the codes would hold so many, the layer has one more
        check_matmul(torch.zeros(2, 127), weight, perturbation())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(codes=torch.zeros(1, N, 32, dtype=torch.int32)), "does not fit 4-bit codes torch.int32"),
        (dict(codes=torch.zeros(N, 60, dtype=torch.uint8)), r"does not fit 4-bit codes torch.uint8 \[6, 60\]"),
        (dict(bits=8), r"does not fit 8-bit codes torch.uint8 \[6, 68\]"),
        (dict(group=48), r"group_size 48 does not divide in_features 128; use one that does, or -1 \(whole row\)"),
        (dict(scales=torch.ones(1, 5, 4)), r"scales must be float32 \[1, 6, 4\], got torch.float32 \[1, 5, 4\]"),
        (dict(scales=torch.ones(1, N, 4).half()), r"scales must be float32 \[1, 6, 4\], got torch.float16"),
        (dict(group=16), r"scales must be float32 \[2, 6, 4\], got torch.float32 \[1, 6, 4\]"),
        (
            dict(zeros=torch.zeros(2, N, dtype=torch.uint8)),
            r"zeros must be uint8 or float32 \[4, 6\], got torch.uint8 \[2",
        ),
        (dict(zeros=torch.zeros(4, N).half()), r"zeros must be uint8 or float32 \[4, 6\], got torch.float16"),
        (dict(table=NF4), "a table of 16 entries goes with 4-bit codes and no zeros, got 16 entries, 4 bits and zeros"),
        (dict(table=NF4[:8], zeros=None), "got 8 entries, 4 bits$"),
        (dict(bias=torch.zeros(5)), r"bias must have shape \[6\], got \[5\]"),
    ],
)
def test_weights_that_do_not_fit(weight, change, message):
    with pytest.raises(ValueError, match=message):
        check_matmul(torch.zeros(2, K), dataclasses.replace(weight, **change), perturbation())


def test_seeds_and_coefficients_are_pairs(weight):
    for seeds, coefs in ((2, 1), (1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{seeds} seeds and {coefs} coefficients: one of each per evaluation"):
            check_matmul(torch.zeros(2, K), weight, perturbation(seeds, coefs))


@pytest.mark.parametrize("name", ["codes", "scales", "zeros", "bias", "seeds", "coefs"])
def test_a_tensor_that_was_left_on_another_device_is_named(weight, name):
    some = perturbation()
    owner = some if name in ("seeds", "coefs") else weight
    moved = dataclasses.replace(owner, **{name: getattr(owner, name).to("meta")})
    given = (weight, moved) if owner is some else (moved, some)
    with pytest.raises(ValueError, match=rf"x is on cpu but the layer's {name} on meta: .* with model.to\(device\)"):
        check_matmul(torch.zeros(2, K), *given)


@pytest.mark.parametrize(
    ("shape", "count", "rows"), [((3, K), 2, 3), ((5, 2, K), 2, 5), ((K,), 2, 1), ((2, 4, K), 4, 2)]
)
def test_rows_that_the_evaluations_do_not_divide(weight, shape, count, rows):
    """The first dimension counts, whatever the others would allow."""
    told = (
        rf"{rows} rows do not divide into {count} evaluations: stack the batch {count} times along its first .*qzo.pair"
    )
    with pytest.raises(ValueError, match=told):
        check_rows(torch.zeros(shape), perturbation(count))
    with pytest.raises(ValueError, match=told):
        check_matmul(torch.zeros(shape), weight, perturbation(count))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(codebooks=torch.zeros(2, 200, 8)),
            r"codebooks must be \[C, 256, 8\] for codes of 8 bits.* got \[2, 200, 8\]",
        ),
        (dict(codebooks=torch.zeros(1, 2, 256, 8)), r"for codes of 8 bits, got \[1, 2, 256, 8\]"),
        (dict(codebooks=torch.zeros(4, 256, 8)), "does not fit 8-bit codes torch.int16"),
        (dict(group=64), r"x has 128 columns, .* no zeros and no table; got a group_size of 64: in_features"),
        (dict(zeros=torch.zeros(1, 24)), "got a group_size of 128, zeros: in_features"),
        (dict(table=NF4), "got a group_size of 128, a table: in_features"),
        (dict(book4=6, codebooks=torch.zeros(2, 256, 8).half()), "codebooks that train are .*, got torch.float16$"),
        (dict(book4=6, codebooks=torch.zeros(2, 8, 256).mT), "codebooks that train are contiguous float32 with noise"),
    ],
)
def test_codebooks_that_do_not_fit(vectors, change, message):
    with pytest.raises(ValueError, match=message):
        check_matmul(torch.zeros(2, K), dataclasses.replace(vectors, **change), perturbation())


def test_codebooks_that_train_have_noise_of_their_own(vectors):
    shared = perturbation(shared=True)
    check_matmul(torch.zeros(2, K), vectors, shared)
    with pytest.raises(ValueError, match=r"got torch.float32 and noise shared by rows$"):
        check_matmul(torch.zeros(2, K), dataclasses.replace(vectors, book4=6), shared)
