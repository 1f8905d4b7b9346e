"""The matmul in torch: the CPU backend against the oracle, and the promises about its bits."""
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from qzo.kernels import qmm_torch
from qzo.kernels.codes import pack_planes, pack_rows
from tests.support.close import assert_same_bits
from tests.support.matmuls import (
    Matmul,
    assert_derivative,
    assert_zero_block_is_plain,
    explore,
    matmuls,
    plain_of_block,
)

pytestmark = pytest.mark.usefixtures("nan_poison")


@explore(60)
@hypothesis.given(matmuls(largest_k=640, rows=st.sampled_from([1, 2, 5, 17])),
                  st.sampled_from([pack_rows, pack_planes]))
def test_cpu_backend_is_true(matmul, form):
    matmul.assert_true(matmul.reference(form))


def test_no_rows():
    assert Matmul(rows=0, bias=True).reference().shape == (0, 33)


def test_cpu_backend_over_several_chunks_and_noise_blocks():
    matmul = Matmul(k=640, n=700, rows=2, group=32, law="ih4", zeros="uint8", bias=True)
    assert qmm_torch.chunk_rows(matmul.n, matmul.k) < matmul.n / 1.5
    matmul.assert_true(matmul.reference())


def test_cpu_noise_made_in_small_blocks_is_the_same(monkeypatch):
    matmul = Matmul(k=640, n=70, rows=2, group=32)
    whole = matmul.reference()
    monkeypatch.setattr(qmm_torch, "BLOCK_QUADS", 64)
    assert_same_bits(matmul.reference(), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relative", [True, False])
def test_sixteen_bit_input_and_output_on_the_cpu(dtype, relative):
    """Input is exact in float32; the output is rounded once, by at most half a unit of its own last place."""
    matmul = Matmul(dtype=dtype, relative=relative, bias=True)
    exact = matmul.reference()
    matmul.assert_true(exact)
    assert_same_bits(matmul.reference(out_dtype=dtype), exact.to(dtype))


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("zeros", [None, "uint8"])
@pytest.mark.parametrize(("eps", "allowed"), [(1e-1, 1e-5), (1e-2, 1e-4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_derivative_on_the_cpu(eps, allowed, law, zeros, dtype):
    assert_derivative(True, eps, Matmul.reference, allowed, law=law, zeros=zeros, dtype=dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 33, 64])
@pytest.mark.parametrize(("k", "n"), [(128, 33), (576, 192), (640, 600)])
def test_zero_coefficient_is_the_plain_forward_on_the_cpu(threads, rows, k, n):
    matmul = Matmul(k=k, n=n, rows=rows, group=64, coefs=(0.1, 0.0, -0.1), dtype=torch.float32)
    torch.set_num_threads(threads)
    try:
        assert_zero_block_is_plain(matmul, 1, Matmul.reference)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("law", ["rademacher", "ih4", "gaussian"])
@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("rows", [2, 5])
def test_zero_coefficient_on_unaligned_rows(relative, law, offset, rows):
    """The batch is a view that starts `offset` floats into a buffer, the plain rows are not: without a copy
    MKL gives up to three such rows other bits."""
    matmul = Matmul(k=192, n=40, rows=rows, coefs=(0.1, -0.1, 0.0), law=law, relative=relative,
                    dtype=torch.float32)
    plain = plain_of_block(matmul, 2).reference()
    buffer = torch.zeros(matmul.x.numel() + offset)
    view = buffer[offset:].view(matmul.x.shape)
    view.copy_(matmul.x)
    matmul.__dict__["x"] = view
    assert view.data_ptr() % 64
    assert_same_bits(matmul.reference()[2 * rows:], plain)


# ------------------------------------------------------------------------------------------- chunks and threads

@pytest.mark.parametrize("k", [64, 1024, 4096, 14336])
@pytest.mark.parametrize("n", [1, 33, 600, 4096, 11008])
def test_chunks_are_bounded_even_and_of_an_even_number(n, k):
    """Two threads have the same to do."""
    rows = qmm_torch.chunk_rows(n, k)
    assert 1 <= rows <= max(qmm_torch.CHUNK_ROWS, qmm_torch.CHUNK_BYTES // (4 * k))
    count = -(-n // rows)
    assert n == 1 or count % 2 == 0
    assert n - (count - 1) * rows > rows - count                # the last one lacks less than a row for each chunk


@pytest.mark.parametrize("inference", [False, True])
def test_threads_change_no_bit_and_are_left_as_they_were(inference):
    matmul = Matmul(k=640, n=700, rows=8, group=32, law="ih4", bias=True)
    assert len(matmul.x) * matmul.n * matmul.k > qmm_torch.THREADED_FROM
    want = matmul.reference()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            found = matmul.reference()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert_same_bits(found.clone(), want)


@pytest.mark.parametrize("relative", [True, False])
def test_a_perturbed_scale_is_rounded_after_each_written_operation(relative):
    s, k, coef = torch.tensor([0.1, -3e-5, 7.0]), torch.tensor([255.0, -510.0, 1.0]), 0.003
    c = float(torch.tensor(coef))
    found = qmm_torch.perturb_torch(s, k, torch.tensor(coef), relative)
    step = (k.double() * c).float()
    want = ((step.double() + 1).float().double() * s.double()) if relative else step.double() + s.double()
    assert_same_bits(found, want.float())
    assert k.tolist() == [255.0, -510.0, 1.0]                   # the noise serves the next evaluation too
