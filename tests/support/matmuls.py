"""One perturbed matmul as a record: its random data, what runs it and the oracle's answer."""

import dataclasses
import functools
import zlib

import hypothesis
import torch
from hypothesis import strategies as st

from qzo.kernels import dequantize, noise, plan, qmm_torch, tiles
from qzo.kernels.codes import pack_planes, pack_rows
from qzo.kernels.operands import Perturbation, Weight
from qzo.kernels.vectors import pack_vectors
from tests import oracle
from tests.support.close import ULP, assert_close, assert_same_bits

TILE = tiles.Tile(rows=16, outputs=32, warps=4, stages=1)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """x [E*rows, k] by W [n, k]; coefs are factors on z; law None: no noise; group 0: the whole row."""

    k: int = 256
    n: int = 33
    rows: int = 3
    group: int = 64
    seeds: tuple = (11, 11, 2**63 - 5)
    coefs: tuple = (0.1, -0.1, 0.03)
    law: str | None = "rademacher"
    relative: bool = True
    zeros: str | None = None  # None, "uint8" or "float32"
    bias: bool = False
    dtype: torch.dtype = torch.float16
    base4: int = 1000
    shared: bool = False
    pair: bool = False  # let the kernel read the codes once for two evaluations
    bits: int = 4
    table: tuple | None = None  # what 4-bit codes stand for
    exact: bool = False  # the table unrounded
    books: int = 0  # codebooks, whose entries codes of `bits` choose; group is 0 then

    @property
    def width(self):
        return self.group or self.k

    @property
    def groups(self):
        return self.k // self.width

    @functools.cached_property
    def _random(self):
        return torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

    @functools.cached_property
    def x(self):
        return torch.randn(len(self.seeds) * self.rows, self.k, generator=self._random).to(self.dtype)

    @functools.cached_property
    def codes(self):
        if self.books:
            return torch.randint(0, 1 << self.bits, (self.n, self.k // 8, self.books), generator=self._random)
        return torch.randint(0, 1 << self.bits, (self.n, self.k), generator=self._random).to(torch.uint8)

    @functools.cached_property
    def scales(self):
        """[G, N], every one different, both signs, over a factor of 8."""
        size = 0.005 * 8 ** torch.rand(self.groups, self.n, generator=self._random)
        return torch.where(torch.rand(self.groups, self.n, generator=self._random) < 0.5, -size, size)

    @functools.cached_property
    def codebooks(self):
        """[C, 2^bits, 8]."""
        if not self.books:
            return None
        return torch.randn(self.books, 1 << self.bits, 8, generator=self._random).to(self.dtype)

    @functools.cached_property
    def zero_points(self):
        if self.zeros == "uint8":
            return torch.randint(0, 1 << self.bits, (self.groups, self.n), generator=self._random).to(torch.uint8)
        if self.zeros == "float32":
            return 1.25 * 2**self.bits * torch.rand(self.groups, self.n, generator=self._random) - 2
        return None

    @functools.cached_property
    def bias_values(self):
        return torch.randn(self.n, generator=self._random).to(self.dtype) if self.bias else None

    @functools.cached_property
    def raw_coefs(self):
        if self.law is None:
            return torch.zeros(len(self.seeds))
        return torch.tensor([oracle.raw_coef(self.law, c) for c in self.coefs])

    @property
    def quads(self):
        """The scales as the arena holds them, [ceil(G/4), N, 4], the last quads filled with zeros."""
        padded = torch.zeros(-(-self.groups // 4) * 4, self.n)
        padded[: self.groups] = self.scales
        return torch.stack([padded[i::4] for i in range(4)], 2).contiguous()

    # -------------------------------------------------------------------------------- the two implementations

    def packed(self, form=pack_planes):
        """The codes as a kernel reads them; form: of those that are no vectors."""
        return pack_vectors(self.codes, self.bits) if self.books else form(self.codes, self.bits)

    def operands(self, device="cpu", form=pack_planes):
        """(Weight, Perturbation): what plan.launch and qmm_torch take beside x and y."""
        tensors = [
            None if t is None else t.to(device)
            for t in (self.packed(form), self.quads, self.zero_points, self.bias_values, self.codebooks)
        ]
        codes, scales, zeros, bias, codebooks = tensors
        law = noise.NONE if self.law is None else noise.LAWS[self.law]
        return (
            Weight(codes, scales, self.k, self.width, zeros, bias, self.base4, self.bits, self.table, codebooks),
            Perturbation(
                torch.tensor(self.seeds, device=device),
                self.raw_coefs.to(device),
                law,
                self.relative,
                self.shared,
                self.pair,
            ),
        )

    def kernel(self, tile=TILE, out_dtype=torch.float32, device="cpu", asm=False):
        """plan.launch: in the interpreter, or on a GPU."""
        y = torch.empty(len(self.x), self.n, dtype=out_dtype, device=device)
        plan.launch(self.x.to(device), *self.operands(device), y, tile=tile, asm=asm, exact=self.exact)
        return y.cpu()

    def reference(self, form=pack_rows, out_dtype=torch.float32):
        """qmm_torch, on CPU rows or on planes."""
        y = torch.empty(len(self.x), self.n, dtype=out_dtype)
        qmm_torch.qmm_torch(self.x, *self.operands(form=form), y, exact=self.exact)
        return y

    def chunked(self, device="cpu", asm=False):
        """dequantize.matmul: what large_rows="blas" runs; y has x's type."""
        y = torch.empty(len(self.x), self.n, dtype=self.dtype, device=device)
        dequantize.matmul(self.x.to(device), *self.operands(device), y, asm=asm, exact=self.exact)
        return y.cpu()

    # ---------------------------------------------------------------------------------------------- the truth

    @property
    def parts(self):
        """The table in the type of x, and, exact, what rounding it left in that type: one float64 [16] for a pass."""
        table = torch.tensor(self.table, dtype=torch.float64)
        rounded = table.to(self.dtype).double()
        return [rounded, (table - rounded).to(self.dtype).double()] if self.exact else [rounded]

    @property
    def entries(self):
        """The table, rounded to the type of x, or to the sum of two numbers of that type."""
        return None if self.table is None else sum(self.parts)

    def weight(self, p, zeros=None):
        """float64 [N, K] with scales p."""
        if self.books:
            return oracle.vector_weight(self.codes, p, self.codebooks, self.bits)
        return oracle.weight(self.codes, p, zeros, self.bits, self.entries)

    @functools.cached_property
    def raw_noise(self):
        """float64 [G, N] for each evaluation."""
        at = oracle.index(self.base4, self.groups, self.n)
        if self.law is None:
            return [torch.zeros(self.groups, self.n, dtype=torch.float64) for _ in self.seeds]
        if self.shared:  # the noise of a row's first scale is that of all
            return [oracle.raw_at(self.law, seed, at[:1]).expand(self.groups, -1) for seed in self.seeds]
        return [oracle.raw_at(self.law, seed, at) for seed in self.seeds]

    def _each(self, function):
        """function(rows of x in float64, raw noise, coefficient) of every evaluation, stacked."""
        blocks = self.x.double().split(self.rows) if self.rows else [self.x.double()] * len(self.seeds)
        return torch.cat(
            [function(x, k, c) for x, k, c in zip(blocks, self.raw_noise, self.raw_coefs.tolist(), strict=True)]
        )

    def want(self):
        """y in float64."""
        bias = 0.0 if self.bias_values is None else self.bias_values.double()

        def y(x, k, c):
            return x @ self.weight(oracle.perturbed(self.scales, k, c, self.relative), self.zero_points).T + bias

        return self._each(y)

    def passes(self, p):
        """float64 [N, K] with scales p for each pass of the kernel over a tile, zero points in the middle: what it adds
        to its accumulator in turn, and only together the weight."""
        if self.books:
            each = 2 if self.bits <= 8 else 1
            return [
                oracle.vector_weight(self.codes[:, :, i : i + each], p, self.codebooks[i : i + each], self.bits)
                for i in range(0, self.books, each)
            ]
        tables = [None] if self.table is None else self.parts
        return [oracle.weight(self.codes, p, None, self.bits, table) for table in tables]

    def _added(self, k, c):
        """The absolute values of `passes`, the zero points' with the first, for raw noise k and coefficient c."""
        s = oracle.perturbed(self.scales.abs(), k.abs(), abs(c), self.relative)
        sizes = [w.abs() for w in self.passes(s)]
        if self.zero_points is not None:
            off = (self.zero_points.double() - 2 ** (self.bits - 1)).abs()
            sizes[0] += (s * off).T.repeat_interleave(self.width, 1)
        return sizes

    def magnitude(self):
        """Sum of the absolute values that an output adds up: its rounding errors are proportional to it."""
        bias = 0.0 if self.bias_values is None else self.bias_values.double().abs()
        return self._each(lambda x, k, c: x.abs() @ sum(self._added(k, c)).T + bias)

    def spread(self):
        """Root of the sum of the squares of what an output adds up: the size of a sum of terms of random sign."""
        return self._each(lambda x, k, c: (x.square() @ sum(w.square() for w in self._added(k, c)).T).sqrt())

    def assert_true(self, y, largest=6, rms=1.0, truncations=0):
        """In ULP of the magnitude M, or of sqrt(M^2 + T^2 S^2 / 3) with T truncations of a tensor core's accumulator.

        Rounded to nearest, an addition errs by at most ULP of the sum so far, by 0.42 of it RMS. N terms of random
        sign, S the root of the sum of their squares, give sums so far whose squares add up to N S^2 / 2: the errors, of
        random sign too, make 0.3 sqrt(N) S, which for normal x and weights is 0.5 M whatever N is. N counts the terms
        of every pass, and so does M: the words of a vector may cancel in its weight, but meet in the accumulator.

        A tensor core (tensor_core.py says how it adds, and who found out) cuts the sum of a block and the accumulator
        off toward zero: by half a unit in the last place in the mean, at most ULP of the sum so far, and always to one
        side. T sums so far that grow by independent steps add up to T S / sqrt(3) RMS; T: tensor_core.truncations.
        """
        unit = torch.hypot(self.magnitude(), truncations / 3**0.5 * self.spread()) if truncations else self.magnitude()
        assert_close(y, self.want(), unit * ULP, largest, rms)


# ---- any matmul

EVALUATIONS = [
    ((5,), (0.1,)),
    ((5, 5), (0.1, -0.1)),
    ((-1, 2**63 - 1, -1), (0.1, 0.0, -0.1)),
    ((5, 5, 2**63 - 1, 2**63 - 1), (0.1, -0.1, 0.0, 0.05)),
    ((1, 2, 3, 4, 5), (0.1, -0.2, 0.3, 0.0, 1e-3)),
]


def explore(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@st.composite
def matmuls(draw, largest_k, rows):
    """Every kind of matmul; K is a multiple of the group and often not of 128."""
    group = draw(st.sampled_from([32, 64, 128, 0]))
    width = group or draw(st.sampled_from([32, 64, 96, 100, 128, 200, 576]))
    k = width if group == 0 else width * draw(st.integers(1, largest_k // width))
    seeds, coefs = draw(st.sampled_from(EVALUATIONS))
    relative = draw(st.booleans())
    pair = len(seeds) % 2 == 0 and seeds[0::2] == seeds[1::2] and draw(st.booleans())
    return Matmul(
        k=k,
        n=draw(st.sampled_from([1, 16, 33, 48])),
        rows=draw(rows),
        group=group,
        seeds=seeds,
        coefs=coefs if relative else tuple(c / 10 for c in coefs),
        law=draw(st.sampled_from([None, "rademacher", "ih4", "gaussian"])),
        relative=relative,
        zeros=draw(st.sampled_from([None, "uint8", "float32"])),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float16, torch.float32])),
        base4=draw(st.sampled_from([0, 1000, 2**32 - 20, 2**33 + 1])),
        pair=pair,
        shared=relative and draw(st.booleans()),
        bits=draw(st.sampled_from([2, 4, 4, 8])),
    )


# ---- what kernel and reference promise alike


def changed(matmul, **fields):
    """The same matmul, random values included, with other fields."""
    other = dataclasses.replace(matmul, **fields)
    for name in ("codes", "scales", "zero_points", "bias_values", "x"):
        other.__dict__[name] = getattr(matmul, name)
    return other


def assert_derivative(relative, eps, run, allowed, **more):
    """RMS error of (y+ - y-) / 2 eps in units of the derivative's RMS, and no entry four times as wrong."""
    matmul = Matmul(k=640, n=24, rows=8, group=128, seeds=(7, 7), coefs=(eps, -eps), relative=relative, **more)
    half = matmul.rows
    matmul.__dict__["x"] = matmul.x[:half].repeat(2, 1)
    plus, minus = run(matmul).double().split(half)
    k = matmul.raw_noise[0]
    slope = matmul.scales.double() * k if relative else k
    want = matmul.x[:half].double() @ oracle.weight(matmul.codes, slope, matmul.zero_points).T
    got = (plus - minus) / (2 * matmul.raw_coefs[0].item())
    assert_close(got, want, want.square().mean().sqrt(), 4 * allowed, allowed)


def plain_of_block(matmul, e):
    """The same layer and rows of evaluation e alone, without noise."""
    alone = dataclasses.replace(matmul, seeds=matmul.seeds[e : e + 1], coefs=(0.0,), law=None)
    for name in ("codes", "scales", "zero_points", "bias_values"):
        alone.__dict__[name] = getattr(matmul, name)
    alone.__dict__["x"] = matmul.x[e * matmul.rows : (e + 1) * matmul.rows]
    return alone


def assert_zero_block_is_plain(matmul, e, run):
    y = run(matmul)
    blocks = y.split(matmul.rows)
    assert_same_bits(blocks[e], run(plain_of_block(matmul, e)))
    perturbed = y.abs().median() * 1e-3
    assert all((other - blocks[e]).abs().max() > perturbed for other in blocks[:e] + blocks[e + 1 :])
