"""What only a GPU can show: compiled kernels, their inline PTX and tiles, against the same oracle."""
import pytest
import torch

from qzo.kernels import noise, perturb, tiles, update
from qzo.kernels.table import NF4
from tests import oracle
from tests.kernels.test_update import rows_run, run_steps, scales_of
from tests.support.close import assert_same_bits
from tests.support.matmuls import Matmul, changed
from tests.support.tensor_core import truncations

pytestmark = pytest.mark.gpu


def picked(matmul):
    """The tile that the package would run, and whether it unpacks with inline PTX."""
    arch = tiles.architecture(torch.device("cuda"))
    tile = tiles.pick(tiles.Problem.of(matmul.rows, matmul.operands()[0], matmul.dtype, arch, matmul.exact))
    return dict(tile=tile, device="cuda", asm=arch.startswith("sm_"))


def compiled(matmul):
    """y of the tile that the package would run, held against the oracle with what a tensor core cuts off."""
    how = picked(matmul)
    y = matmul.kernel(**how)
    matmul.assert_true(y, truncations=truncations(matmul, how["tile"], tiles.architecture(torch.device("cuda"))))
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("rows", [1, 24, 60, 100, 150])
@pytest.mark.parametrize("zeros", [None, "uint8", "float32"])
def test_compiled_matmul_is_true(dtype, group, rows, zeros):
    matmul = Matmul(k=640, n=192, rows=rows, group=group, zeros=zeros, dtype=dtype, bias=True, law="ih4")
    compiled(matmul)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("rows", [1, 60, 150])
@pytest.mark.parametrize("zeros", [None, "uint8", "float32"])
def test_compiled_matmul_of_other_bits_is_true(bits, dtype, group, rows, zeros):
    matmul = Matmul(k=640, n=192, rows=rows, group=group, zeros=zeros, dtype=dtype, bias=True, law="ih4", bits=bits)
    compiled(matmul)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("rows", [1, 24, 60, 150])
def test_compiled_lookup_is_true(dtype, group, rows):
    matmul = Matmul(k=640, n=192, rows=rows, group=group, dtype=dtype, bias=True, law="ih4", table=NF4)
    compiled(matmul)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 0])
@pytest.mark.parametrize("rows", [1, 24, 150])
def test_compiled_exact_lookup_is_true(dtype, group, rows):
    matmul = Matmul(k=640, n=192, rows=rows, group=group, dtype=dtype, bias=True, law="ih4", table=NF4, exact=True)
    compiled(matmul)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("books", "bits"), [(1, 16), (1, 12), (2, 8), (5, 8), (3, 12)])
@pytest.mark.parametrize(("k", "rows"), [(640, 1), (640, 24), (640, 150), (200, 60)])
def test_compiled_vectors_are_true(dtype, books, bits, k, rows):
    matmul = Matmul(k=k, n=192, rows=rows, group=0, dtype=dtype, bias=True, law="ih4", books=books, bits=bits)
    compiled(matmul)


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
def test_compiled_codebooks_have_the_oracles_bits(law):
    values, base4 = torch.randn(300, 4, generator=torch.Generator().manual_seed(1)), 2**32 - 10
    seeds, coefs = torch.tensor([-7]), torch.tensor([oracle.raw_coef(law, -0.3)])
    ours, reference = torch.empty(300, 4, device="cuda"), torch.empty(300, 4)
    perturb.launch(values.cuda(), seeds.cuda(), coefs.cuda(), ours, base4=base4, law=noise.LAWS[law], relative=True)
    perturb.perturb_codebooks_torch(values, seeds, coefs, reference, base4=base4, law=noise.LAWS[law], relative=True)
    assert_same_bits(ours.cpu(), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("rows", [1, 8, 16, 24, 32])
@pytest.mark.parametrize("shared", [False, True])
def test_a_pair_has_the_bits_of_single_evaluations(dtype, group, rows, shared):
    matmul = Matmul(k=640, n=192, rows=rows, group=group, dtype=dtype, law="ih4", shared=shared, pair=True,
                    seeds=(5, 5, 9, 9), coefs=(0.1, -0.1, 0.05, 0.0))
    together = compiled(matmul)
    assert_same_bits(together, changed(matmul, pair=False).kernel(**picked(matmul)))


@pytest.mark.parametrize("rows", [1, 24, 60, 100, 150])
def test_zero_coefficient_is_the_plain_forward(rows):
    matmul = Matmul(k=640, n=192, rows=rows, coefs=(0.1, 0.0, -0.1))
    plain = Matmul(k=640, n=192, rows=rows, coefs=(0.1, 0.0, -0.1), law=None)
    for name in ("x", "codes", "scales"):
        plain.__dict__[name] = getattr(matmul, name)
    middle = slice(rows, 2 * rows)
    assert_same_bits(matmul.kernel(**picked(matmul))[middle], plain.kernel(**picked(plain))[middle])


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("base4", [0, 2**32 - 10])
def test_compiled_update_has_the_oracles_bits(law, relative, base4):
    scales = scales_of(300)
    seeds, coefs = (3, -1, 2**63 - 1), [oracle.raw_coef(law, c) for c in (0.05, -0.3, 1e-4)]
    at = 4 * base4 + torch.arange(len(scales))
    want = oracle.update(scales, [oracle.raw_at(law, seed, at) for seed in seeds], coefs, relative, 2.0**-24)
    got = scales.cuda()
    update.launch(got, torch.tensor(seeds).cuda(), torch.tensor(coefs).cuda(), base4=base4,
                  law=noise.LAWS[law], relative=relative, floor=2.0**-24)
    assert_same_bits(got.cpu(), want)


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
def test_compiled_update_of_rows_has_the_oracles_bits(law):
    assert_same_bits(*rows_run("kernel", law, device="cuda"))
    assert_same_bits(*rows_run("kernel", law, device="cuda", steps=3))


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("relative", [True, False])
def test_compiled_update_of_several_steps_has_the_oracles_bits(law, relative):
    assert_same_bits(*run_steps("kernel", scales_of(300), law, relative, device="cuda"))
