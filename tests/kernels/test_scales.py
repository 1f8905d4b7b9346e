"""A tile's scales, in kernels of a few lines (interpreted): read, perturbed, brought to the columns they multiply."""
import pytest
import torch
import triton
import triton.language as tl

from qzo.kernels import noise, scales
from qzo.kernels.constants import Constants
from tests import oracle
from tests.support.close import assert_same_bits

pytestmark = pytest.mark.usefixtures("nan_poison")


@triton.jit
def _perturb_kernel(s_ptr, k_ptr, out_ptr, coef, RELATIVE: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, scales.perturb(tl.load(s_ptr + i), tl.load(k_ptr + i), coef, RELATIVE))


@pytest.mark.parametrize("relative", [True, False])
def test_a_perturbed_scale_is_rounded_after_each_written_operation(relative):
    s = torch.randn(16) * 10.0 ** torch.arange(-8, 8)
    k, out, coef = torch.randint(-510, 511, (16,)).float(), torch.empty(16), oracle.raw_coef("ih4", 0.3)
    _perturb_kernel[(1,)](s, k, out, coef, RELATIVE=relative)
    step = 1 + coef * k.double()
    assert_same_bits(out, (s.double() * step.float().double() if relative else s.double() + coef * k.double()).float())


@triton.jit
def _walk_kernel(scales_ptr, out_ptr, tiles, N, C: tl.constexpr):
    """The four that `load_scales` gives for every tile of output n in turn, and for one beyond the last."""
    n = tl.arange(0, C.BN)
    sp = scales_ptr + 4 * n
    for t in range(tiles + 1):
        found = scales.load_scales(sp, C.PER_TILE)
        for i in tl.static_range(4):
            tl.store(out_ptr + (4 * t + i) * C.BN + n, found[i])
        sp = scales.next_tile(sp, t + 1, tiles, N, C)


@pytest.mark.parametrize(("per_tile", "tiles"), [(1, 7), (2, 5), (4, 3)])
def test_scales_are_read_tile_by_tile(per_tile, tiles):
    """In the arena the four groups of a quad are neighbours, [quads, N, 4]; after the last tile the pointers stay."""
    n, groups = 16, -(-per_tile * tiles // 4) * 4
    stored = torch.arange(groups * n, dtype=torch.float32).view(groups, n)
    quads = stored.view(-1, 4, n).transpose(1, 2).contiguous()
    out = torch.empty(tiles + 1, 4, n)
    _walk_kernel[(1,)](quads, out, tiles, n, C=Constants(BN=n, PER_TILE=per_tile, PERIOD=4 // per_tile))
    for t in range(tiles + 1):
        for i in range(4):
            group = per_tile * min(t, tiles - 1) + i % per_tile
            assert torch.equal(out[t, i], stored[group]), (t, i)


@triton.jit
def _columns_kernel(s_ptr, seed, base4, coef, coef1, out_ptr, out1_ptr, N, C: tl.constexpr):
    """Factor of every product of a tile [BN, BM], of its first dot, and the output that a lane looks after."""
    lane_n = scales.outputs_of_lanes(C)
    tl.store(out1_ptr + tl.arange(0, C.LANES), lane_n)
    s = tl.load(s_ptr + lane_n)
    held = noise.hold_none(C.LANES, C.NOISE)
    held = scales.noise_of_tile(held, 0, seed, base4, N, lane_n, C)
    p = scales.group_factors((s, s, s, s), held, 0, scales.coefs_of_lanes(coef, coef1, C), coef1, C)
    at = tl.arange(0, C.BN)[:, None] * C.BM + tl.arange(0, C.BM)[None, :]
    tl.store(out_ptr + at, scales.columns(p, C.BN, C.BM))


SHAPES = {
    "a lane for each output": Constants(BM=16, BN=32, LANES=32),
    "two lanes": Constants(BM=16, BN=32, LANES=64),
    "folded": Constants(BM=16, BN=128, LANES=128, FOLD=True),
}


@pytest.mark.parametrize("law", [noise.NONE, noise.RADEMACHER, noise.IH4])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_product_gets_the_scale_of_its_output_and_evaluation(shape, pair, law):
    """Whichever thread made it: row n of the accumulator is output n, of a pair even columns are the first's."""
    c = SHAPES[shape]._replace(PAIR=pair, EACH=2 if pair else 1, GROUP=128, LAW=law, NOISE=law)
    n, coefs = c.BN, (0.25, -0.125)
    s, out = torch.rand(n) + 1, torch.empty(n, c.BM)
    lanes = torch.empty(c.LANES, dtype=torch.int32)
    _columns_kernel[(1,)](s, -5, 9, *coefs, out, lanes, n, C=c)
    assert sorted(lanes.tolist()) == sorted(list(range(n)) * (c.LANES // n))
    name = {number: name for name, number in noise.LAWS.items()}[law]
    k = torch.zeros(n) if law == noise.NONE else oracle.raw_at(name, -5, oracle.index(9, 1, n))[0]
    for parity in range(2):
        coef = coefs[parity] if pair else coefs[0]
        want = oracle.perturbed(s, k, coef, True).float()[:, None].expand(n, c.BM // 2)
        assert_same_bits(out[:, parity::2].contiguous(), want.contiguous())
