"""large_rows="blas": a bounded chunk of perturbed weights for a library's matmul; asked for, never by default."""
import pytest
import torch

import qzo
from qzo.cli import main as command
from qzo.kernels import dequantize, noise, tiles
from qzo.nn import ops
from tests import oracle
from tests.support.close import assert_same_bits
from tests.support.matmuls import Matmul

pytestmark = pytest.mark.usefixtures("nan_poison")
MATMULS = [Matmul(k=320, n=70, group=64, law="ih4"), Matmul(k=96, n=33, group=32, zeros="uint8"),
           Matmul(k=640, n=40, group=128, zeros="float32", dtype=torch.float32, relative=False),
           Matmul(k=200, n=33, group=0, zeros="float32"), Matmul(k=200, n=33, group=0, zeros="uint8", law="ih4"),
           Matmul(k=256, n=33, group=64, shared=True, law="ih4"), Matmul(k=256, n=33, group=64, law=None),
           Matmul(k=256, n=33, group=64, base4=2**32 - 20), Matmul(k=288, n=16, group=32, dtype=torch.float32),
           Matmul(k=384, n=33, group=128, bits=8, zeros="uint8", law="ih4"), Matmul(k=320, n=33, group=32, bits=8),
           Matmul(k=384, n=33, group=64, bits=2, zeros="uint8"), Matmul(k=160, n=33, group=0, bits=2),
           Matmul(k=384, n=33, group=128, bits=2, zeros="float32", dtype=torch.float32)]


def name_of(matmul):
    sharing = "row" if matmul.shared else "group"
    return f"{matmul.bits}bit-g{matmul.group}-{matmul.zeros}-{matmul.law}-{sharing}-{matmul.base4}"


@pytest.mark.parametrize("matmul", MATMULS, ids=name_of)
@pytest.mark.parametrize("start", [0, 7])
def test_a_chunk_has_the_bits_of_its_twin_and_is_true(matmul, start):
    weight, perturbation = matmul.operands()
    rows = min(24, matmul.n - start)
    ours, reference = (torch.empty(rows, matmul.k, dtype=matmul.dtype) for _ in range(2))
    for e in range(len(perturbation)):
        dequantize.launch(weight, perturbation, ours, e=e, start=start, asm=False)
        dequantize.dequantize_torch(weight, perturbation, reference, e=e, start=start)
        assert_same_bits(ours, reference)
        p = oracle.perturbed(matmul.scales, matmul.raw_noise[e], float(perturbation.coefs[e]), matmul.relative)
        want = oracle.weight(matmul.codes, p, matmul.zero_points, matmul.bits)[start:start + rows]
        size = (oracle.weight(matmul.codes, p, None, matmul.bits).abs()
                + 1.5 * 2**(matmul.bits - 1) * p.abs().T.repeat_interleave(matmul.width, 1))[start:start + rows]
        roundoff = {torch.float16: 2.0**-11, torch.float32: 2.0**-23}[matmul.dtype]
        assert bool(((ours.double() - want).abs() <= 1.1 * roundoff * size + 6e-8).all())


@pytest.mark.parametrize("matmul", MATMULS, ids=name_of)
def test_the_product_by_chunks_is_true(matmul, monkeypatch):
    monkeypatch.setattr(dequantize, "SCRATCH_BYTES", 1)             # chunks of 128 rows, of which the last is ragged
    wide = Matmul(**{**vars_of(matmul), "n": 150, "rows": 5, "bias": True})
    y, want = wide.chunked(), wide.want()
    assert float((y - want).norm() / want.norm()) < {torch.float16: 1e-3, torch.float32: 1e-6}[wide.dtype]


def vars_of(matmul):
    return {name: getattr(matmul, name) for name in matmul.__dataclass_fields__}


def test_a_zero_coefficient_has_the_bits_of_the_plain_forward():
    matmul = Matmul(k=256, n=64, rows=6, coefs=(0.1, 0.0, -0.1))
    plain = Matmul(k=256, n=64, rows=6, law=None, seeds=(0,), coefs=(0.0,))
    plain.__dict__.update(x=matmul.x[6:12], codes=matmul.codes, scales=matmul.scales)
    assert_same_bits(matmul.chunked()[6:12], plain.chunked())


@pytest.mark.parametrize(("k", "dtype"), [(4096, torch.float16), (14336, torch.bfloat16), (11008, torch.float32)])
def test_scratch_is_bounded(k, dtype):
    rows = dequantize.chunk_rows(k, dtype)
    assert rows % 128 == 0
    assert 16 << 20 < rows * k * dtype.itemsize <= 32 << 20
    assert dequantize.scratch_bytes(1 << 20, k, dtype) <= dequantize.SCRATCH_BYTES == 32 << 20
    assert dequantize.scratch_bytes(64, k, dtype) == 64 * k * dtype.itemsize


def layer_and_rows(rows):
    model = qzo.quantize_(torch.nn.Sequential(torch.nn.Linear(128, 32)), group_size=64)
    return model, torch.randn(2 * rows, 128), qzo.Evaluations([3, 3], [0.1, -0.1])


@pytest.mark.parametrize(("rows", "asked", "expected"), [
    (tiles.BLAS_FROM, "blas", True), (tiles.BLAS_FROM - 1, "blas", False), (tiles.BLAS_FROM, None, False),
    (tiles.BLAS_FROM, "fused", False)])
def test_it_runs_where_it_is_asked_for_and_rows_are_many(rows, asked, expected, monkeypatch):
    ran = []
    real = dequantize.matmul
    monkeypatch.setattr(dequantize, "matmul", lambda *a, **k: (ran.append(1), real(*a, **k)))
    monkeypatch.setattr(ops._Fused, "__call__", lambda *a: a[-1].zero_())     # the fused kernel is slow interpreted
    model, x, evaluations = layer_and_rows(rows)
    with qzo.backend("triton", large_rows=asked), qzo.evaluating(model, evaluations):
        y = model(x)
    assert bool(ran) == expected
    if expected:
        with qzo.backend("torch"), qzo.evaluating(model, evaluations):
            assert float((model(x) - y).norm() / y.norm()) < 1e-6


def test_an_optimizers_steps_ask_for_it_and_nothing_else_does(monkeypatch):
    seen = []
    real = ops._multiply
    monkeypatch.setattr(ops, "_multiply", lambda *a: (seen.append(a[-1].large_rows == "blas"), real(*a))[1])
    model, x, _ = layer_and_rows(4)
    optimizer = qzo.QZO(model, lr=0.1, large_rows="blas")
    optimizer.step(lambda: model(x).square().mean(1).view(2, -1).mean(1))
    model(x)
    with qzo.backend(large_rows="blas"), qzo.backend("torch"):
        model(x)
    assert seen == [True, False, True]


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="large_rows='cublas': 'fused', 'folded', 'blas' or 'auto' is wanted"), \
            qzo.backend("auto", large_rows="cublas"):
        pass
    with pytest.raises(ValueError, match="large_rows=1"):
        qzo.QZO(layer_and_rows(1)[0], lr=0.1, large_rows=1)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stop:
        command.main(["train", "--large-rows", "cublas"])
    assert stop.value.code == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("zeros", [None, "uint8", "float32"])
def test_compiled_chunks_have_the_twins_bits(dtype, law, zeros):
    for group in (32, 64, 128, 0):
        matmul = Matmul(k=640, n=200, rows=2, group=group, law=law, zeros=zeros, dtype=dtype)
        weight, perturbation = matmul.operands("cuda")
        ours, reference = (torch.empty(150, 640, dtype=dtype, device="cuda") for _ in range(2))
        dequantize.launch(weight, perturbation, ours, e=1, start=50, asm=True)
        dequantize.dequantize_torch(weight, perturbation, reference, e=1, start=50)
        assert_same_bits(ours.cpu(), reference.cpu())
        y, want = matmul.chunked("cuda", asm=True), matmul.want()
        assert float((y - want).norm() / want.norm()) < {2: 1e-2, 4: 1e-3}[dtype.itemsize]
    assert noise.LAWS[law]
