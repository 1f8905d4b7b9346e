"""The noise law: one definition, the same bits from the torch reference, both kernels and the CPU backend."""
import numpy as np
import pytest
import torch

from qzo import noise
from qzo.kernels import noise as laws
from qzo.kernels import plan, qmm_torch, update
from qzo.kernels.codes import pack_planes, pack_rows
from qzo.kernels.operands import Perturbation, Weight
from tests import oracle
from tests.support.close import assert_close, assert_same_bits
from tests.support.matmuls import TILE

pytestmark = pytest.mark.usefixtures("nan_poison")

# Random123's kat_vectors: counter, key, rounds, result
ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN = [((0,) * 4, (0, 0), 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
         ((ONES,) * 4, (ONES,) * 2, 7, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
         (*PI, 7, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
         ((0,) * 4, (0, 0), 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
         ((ONES,) * 4, (ONES,) * 2, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
         (*PI, 10, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))]

INDICES = (0, 2**31, 2**32 - 1, 2**32 + 3, 2**34 - 2, 2**34 + 5)    # the last two need a second counter word
SEEDS = (0, 1, -1, 2**63 - 1, 2**63, 2**63 + 12345, -2**63, 7 * 2**32, 7, 0x123456789ABCDEF0)
# against float64: the sine's series is cut at angle^9 / 9! <= 3.1e-7, times a radius <= 5.9, plus rounding
GAUSSIAN_TOLERANCE = 3e-6
GAUSSIAN_BETWEEN_DEVICES = 1e-6     # the same series; logarithm and square root differ by an ULP
OUTPUTS = 3


@pytest.mark.parametrize(("counter", "key", "rounds", "want"), KNOWN)
def test_philox_known_answers(counter, key, rounds, want):
    words = laws.philox4x32([torch.tensor([c]) for c in counter], key, rounds)
    assert tuple(int(w) for w in words) == want
    assert tuple(oracle.philox(counter, key, rounds)) == want


# ------------------------------------------------------------------------------- five roads to the same noise

def quad_indices(index):
    """Global indices [4, OUTPUTS] of a layer of 4 groups whose first quad holds `index`."""
    return oracle.index(index // 4, 4, OUTPUTS)


def from_twin(law, seed, at):
    number = laws.LAWS[law]
    raw = laws.raw_noise(number, torch.tensor(laws.signed64(seed)), at // 4)
    return raw.gather(-1, (at % 4).unsqueeze(-1)).squeeze(-1)


def matmul_operands(law, seed, base4, relative, form):
    """x, weight, perturbation and y of a layer of 4 groups of 32 whose weights are all 1 * p: one-hot rows of x read
    p[g, n] out of it."""
    x = torch.eye(4).repeat_interleave(32, 1) * (torch.arange(128) % 32 == 5)
    codes = torch.full((OUTPUTS, 128), 9, dtype=torch.uint8)
    scales = torch.full((1, OUTPUTS, 4), 1.0 if relative else 0.0)
    coef = 2.0**-10 if relative else 1.0                     # 1 + k * 2^-10 is exact for every |k| <= 510
    return (x.half(), Weight(form(codes), scales, 128, 32, base4=base4),
            Perturbation(signed(seed), torch.tensor([coef]), laws.LAWS[law], relative), torch.empty(4, OUTPUTS))


def signed(seed):
    return torch.tensor([int.from_bytes((seed % 2**64).to_bytes(8, "little"), "little", signed=True)])


def recovered(y, relative):
    return (y - 1) * 1024 if relative else y


def from_matmul_kernel(law, seed, at, relative=True):
    operands = matmul_operands(law, seed, int(at[0, 0]) // 4, relative, pack_planes)
    plan.launch(*operands, tile=TILE, asm=False)
    return recovered(operands[-1], relative)


def from_cpu_backend(law, seed, at, relative=True):
    operands = matmul_operands(law, seed, int(at[0, 0]) // 4, relative, pack_rows)
    qmm_torch.qmm_torch(*operands)
    return recovered(operands[-1], relative)


def from_update(run):
    def read(law, seed, at):
        scales = torch.full((OUTPUTS, 4), 1024.0)            # 1024 + k is exact
        run(scales, signed(seed), torch.ones(1), base4=int(at[0, 0]) // 4, law=laws.LAWS[law], relative=False,
            floor=0.0)
        return (scales - 1024).T
    return read


ROADS = {"reference": from_twin, "matmul kernel": from_matmul_kernel, "cpu backend": from_cpu_backend,
         "update kernel": from_update(update.launch), "update reference": from_update(update.update_torch)}


@pytest.mark.parametrize("law", ["rademacher", "ih4"])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("index", INDICES)
def test_integer_laws_have_the_same_bits_on_every_road(law, road, index):
    at = quad_indices(index)
    seed = SEEDS[INDICES.index(index)]
    assert index in range(int(at.min()), int(at.max()) + 1)
    assert torch.equal(ROADS[road](law, seed, at).double(), oracle.raw_at(law, seed, at))


@pytest.mark.parametrize("road", ["reference", "matmul kernel", "update kernel"])
@pytest.mark.parametrize("seed", SEEDS)
def test_all_64_bits_of_the_seed_count(road, seed):
    at = quad_indices(40)
    assert torch.equal(ROADS[road]("ih4", seed, at).double(), oracle.raw_at("ih4", seed, at))


@pytest.mark.parametrize("road", [from_matmul_kernel, from_cpu_backend])
def test_noise_reaches_a_zero_scale_only_when_absolute(road):
    at = quad_indices(400)
    assert torch.equal(road("ih4", 5, at, relative=False).double(), oracle.raw_at("ih4", 5, at))


@pytest.mark.parametrize("index", INDICES)
def test_gaussian_within_tolerance(index):
    at = quad_indices(index)
    want = oracle.raw_at("gaussian", 3, at)
    reference = from_twin("gaussian", 3, at)
    assert_close(reference, want, 1.0, GAUSSIAN_TOLERANCE)
    assert_close(from_matmul_kernel("gaussian", 3, at, relative=False), reference, 1.0, GAUSSIAN_BETWEEN_DEVICES)


def test_gaussian_tails_and_every_quarter_turn():
    at = torch.arange(4096)
    want = oracle.raw_at("gaussian", 77, at)
    assert_close(noise("gaussian", 77, at), want, 1.0, GAUSSIAN_TOLERANCE)
    assert want.abs().max() > 3
    assert (want < -1).any()


# -------------------------------------------------------------------------------------------- the public reference

@pytest.mark.parametrize("law", laws.VERSIONS)
def test_noise_has_the_unit_of_the_law_and_the_shape_of_the_index(law):
    at = torch.tensor([[0, 5], [2**34 + 5, 2**32 - 1]])
    want = oracle.raw_at(law, -9, at) * oracle.UNIT[law]
    z = noise(law, -9, at)
    assert (z.shape, z.dtype) == (at.shape, torch.float32)
    assert_close(z, want, 1.0, GAUSSIAN_TOLERANCE)


def test_noise_does_not_depend_on_what_it_is_asked_with():
    """More indices than one block, in any order, or one alone."""
    at = torch.arange(3 * laws.BLOCK_QUADS).flip(0)
    assert_same_bits(noise("ih4", 4, at).flip(0), noise("ih4", 4, at.flip(0)))
    assert_same_bits(noise("ih4", 4, at[-100:-99]), noise("ih4", 4, at)[-100:-99])
    assert noise("ih4", 4, at[:0]).shape == (0,)


SAMPLES = 1 << 19


@pytest.mark.parametrize(("law", "kurtosis"), [("rademacher", 1.0), ("ih4", 3 - 0.3 * 65537 / 65535),
                                               ("gaussian", 3.0)])
def test_moments(law, kurtosis):
    """Within five standard deviations of the estimates; z, z^2, z^4 have at most 1, sqrt(2), sqrt(96)."""
    z = noise(law, 2024, torch.arange(SAMPLES)).double()
    width = 5 / SAMPLES**0.5
    assert abs(z.mean()) < width
    assert abs((z**2).mean() - 1) < width * 2**0.5 + 1e-6
    assert abs((z**4).mean() - kurtosis) < width * 96**0.5


@pytest.mark.parametrize("law", laws.VERSIONS)
def test_seeds_words_and_neighbours_are_independent(law):
    at = torch.arange(SAMPLES)
    z = noise(law, 5, at)
    others = [noise(law, seed, at) for seed in (6, 4, 5 + 2**32, 5 - 2**63)]
    others += [z.roll(shift) for shift in (1, 2, 3, 4)]
    for other in others:
        assert abs((z * other).double().mean()) < 5 / SAMPLES**0.5
        assert abs(((z**2 - 1) * (other**2 - 1)).double().mean()) < 5 * 2 / SAMPLES**0.5


# ---------------------------------------------------------------------------------------- coefficients, seeds

@pytest.mark.parametrize(("law", "largest"), [("rademacher", 1), ("ih4", 510)])
def test_kernel_coefs_times_any_noise_value_is_exact(law, largest):
    random = torch.Generator().manual_seed(1)
    coefs = torch.randn(400, generator=random) * 10.0 ** torch.randint(-9, 3, (400,), generator=random)
    c = laws.kernel_coefs(coefs, laws.LAWS[law])
    k = torch.arange(-largest, largest + 1, dtype=torch.float32)
    assert torch.equal((c[:, None] * k).double(), c.double()[:, None] * k.double())
    change = (c.double() / (coefs.double() * oracle.UNIT[law]) - 1).abs().max()
    assert change <= 2.0**-15
    assert_same_bits(c, torch.tensor([oracle.raw_coef(law, v) for v in coefs.tolist()]))


def test_kernel_coefs_keep_signs_zeros_and_shapes():
    c = laws.kernel_coefs([[0.0, 1e-2], [-1e-2, 0.0]], laws.IH4)
    assert c.shape == (2, 2)
    assert c[0, 1] == -c[1, 0] > 0
    assert c[0, 0] == c[1, 1] == 0


def test_kernel_coefs_leave_the_other_laws_alone():
    coefs = torch.tensor([0.1, -1e-7, 3.0])
    for law in (laws.RADEMACHER, laws.GAUSSIAN):
        assert_same_bits(laws.kernel_coefs(coefs, law), coefs)


@pytest.mark.parametrize("run_seed", [0, 1, -1, 2**63, 2**64 - 1, 5 * 2**32])
def test_step_seed(run_seed):
    seen = {(step, direction): laws.step_seed(run_seed, step, direction)
            for step in (0, 1, 2**32 - 1, 2**32, 2**40 + 1) for direction in (0, 1, 255)}
    assert seen == {at: oracle.step_seed(run_seed, *at) for at in seen}
    assert len(set(seen.values())) == len(seen)
    assert all(np.iinfo(np.int64).min <= seed <= np.iinfo(np.int64).max for seed in seen.values())
    assert min(seen.values()) < 0 < max(seen.values())


# ---------------------------------------------------------------------------------------------- bad arguments

def test_unknown_law_names_the_laws():
    with pytest.raises(ValueError, match=r"'uniform'.*'rademacher', 'ih4', 'gaussian'"):
        noise("uniform", 0, torch.arange(4))
    with pytest.raises(ValueError, match="'none'"):
        noise("none", 0, torch.arange(4))


@pytest.mark.parametrize("index", [[0, 1], 3, torch.arange(4.0), torch.zeros(2, dtype=torch.complex64)])
def test_index_has_to_be_an_integer_tensor(index):
    with pytest.raises(TypeError, match="integer tensor"):
        noise("ih4", 0, index)


def test_negative_index():
    with pytest.raises(ValueError, match=r"-3.*start at 0"):
        noise("ih4", 0, torch.tensor([4, -3]))
