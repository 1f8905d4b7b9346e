"""A few unperturbed rows on a CPU, straight from packed codes: what a model multiplies while it writes, token by token.

qmm_torch.py makes a chunk of W in float before it multiplies; for one row that costs more than the product. torch's
embedding bags (FBGEMM) sum rows of 2-, 4- or 8-bit codes times float32 weights without unpacking them to memory. So the
codes are held once more, turned: row k holds code[:, k] of every output, packed as codes.pack_rows does, and the inputs
of a group are a bag, their values the weights of its sum. In float32:

    y[n] = sum_g s[g, n] (sum_{k in g} x[k] (code[n, k] - middle) - (zero[g, n] - middle) sum_{k in g} x[k])

the order of operations of the kernels on a GPU: a group's scale meets its sum. Integer codes only: entries of a table
or a codebook cannot be had from a code by a product. Sums are added in another order than qmm_torch.py adds them, so
this runs only where it is asked for (qzo.generating), never in a step.

Terms (codes, rows, turned): docs/glossary.md.
"""
import functools

import torch

from .codes import middle, pack_rows, unpack_rows
from .forms import Integers

MOST_ROWS = 8       # from about sixteen on, chunks of W in float are as fast
LONGEST_BAG = 128   # a longer sum in one register would lose digits; bags are also what threads share
_BAGS = {2: "embedding_bag_2bit_rowwise_offsets", 4: "embedding_bag_4bit_rowwise_offsets",
         8: "embedding_bag_byte_rowwise_offsets"}


@functools.cache
def _bag(bits):
    """torch's sums of rows of codes, or None where this build lacks them or they fail any byte."""
    every = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([(every >> bits * j) & (1 << bits) - 1 for j in range(8 // bits)], 1).view(16, -1)
    x = torch.arange(1.0, 17.0)
    try:
        op = getattr(torch.ops.quantized, _BAGS[bits])
        sums = _sums(op, pack_rows(codes, bits), x, *_bags(1, 16, 8))
    except (AttributeError, RuntimeError):
        return None
    wanted = (x[:, None] * (codes.float() - middle(bits))).view(2, 8, -1).sum(1)       # small integers: exact
    return op if torch.equal(sums, wanted) else None


@functools.lru_cache(maxsize=64)
def _bags(m, k, length):
    """int32 numbers of the turned rows that m rows of x multiply, and where each bag of up to `length` begins."""
    starts = torch.arange(m, dtype=torch.int32)[:, None] * k + torch.arange(0, k, length, dtype=torch.int32)
    return torch.arange(k, dtype=torch.int32).repeat(m), starts.flatten()


def _sums(op, codes, x, indices, offsets):
    """float32 [bags, outputs], outputs padded to whole bytes; x: float32, as many as indices."""
    return op(codes, indices, offsets, False, 0, False, x, None, False)


def supports(weight):
    """Whether a Weight's codes are a CPU's rows of integers that torch can sum."""
    return (isinstance(weight.form, Integers) and weight.in_rows and weight.codes.device.type == "cpu"
            and _bag(weight.bits) is not None)


class Turned:
    """What few rows read of a Weight that `supports` it: codes turned, and scales by group and output.

    codes : uint8 [K, ceil(N * bits / 8) + bytes of scale and bias]
    scales : float32 [G, N]; shifts : what a group's inputs add for each, scales times (zero - middle), or None;
        both are made again when the weight's scales have changed
    """

    def __init__(self, weight):
        codes = unpack_rows(weight.codes, weight.in_features, weight.bits)
        self.codes = pack_rows(codes.T.contiguous(), weight.bits)
        self.version = self.scales = self.shifts = None
        self._follow(weight)

    @property
    def nbytes(self):
        return self.codes.nbytes + self.scales.nbytes + (0 if self.shifts is None else self.shifts.nbytes)

    def _follow(self, weight):
        """The scales as they are now."""
        version = None if weight.scales.is_inference() else weight.scales._version
        if version is not None and version == self.version:
            return
        self.version = version
        self.scales = weight.scales.transpose(1, 2).reshape(-1, weight.out_features)[:weight.groups].contiguous()
        if weight.zeros is not None:
            self.shifts = self.scales * (weight.zeros.to(torch.float32) - middle(weight.bits))

    def multiply(self, x, weight, y):
        """Fill y [M, N] with x [M, K] . W^T + bias; sums in float32."""
        (m, k), n = x.shape, weight.out_features
        self._follow(weight)
        x = x.to(torch.float32)
        sums = _sums(_bag(weight.bits), self.codes, x.view(-1), *_bags(m, k, min(weight.group, LONGEST_BAG)))
        sums = sums.view(m, -1, sums.shape[1])
        if sums.shape[2] != n:                                          # outputs that fill up a byte
            sums = sums[:, :, :n]
        if sums.shape[1] != weight.groups:                              # a whole row is the only group so long
            sums = sums.sum(1, keepdim=True)
        out = y if y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
        torch.sum(sums.mul_(self.scales), 1, out=out)
        if self.shifts is not None:
            out.addmm_(x.view(m, weight.groups, -1).sum(2), self.shifts, alpha=-1)
        if weight.bias is not None:
            out += weight.bias
        if out is not y:
            y.copy_(out)


def multiplies(m, weight, perturbation):
    """Whether m rows are multiplied by a weight's Turned: it has one, there is one evaluation and no noise."""
    return weight.turned is not None and m <= MOST_ROWS and perturbation.plain
