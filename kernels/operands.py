"""What a matmul is of, beside x: a Weight and a Perturbation. Every kernel takes these two, and so does its reference
implementation in torch."""
import dataclasses
import functools

import torch

from .few_rows import Turned
from .forms import form_of
from .noise import NONE

MOST_PLANS = 64     # of a weight; the oldest goes


def addresses(*tensors):
    """Where each lies in memory: it changes when a tensor is replaced, or given other memory (`tensor.data = ...`)."""
    return [None if t is None else t.data_ptr() for t in tensors]


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One layer's weight W [N, K] as the kernels read it; its tensors stay as they are, or another Weight is made.

    codes : int16 planes [T, N, words] (codes.py, vectors.py), or uint8 rows [N, bytes] for a CPU
    scales : float32 [Q, N, 4], a layer's slice of the arena and so on 16 bytes; scale (g, n) at [g // 4, n, g % 4]; of
        a shard by outputs a view of its part of a layer's
    in_features : K
    group : inputs that share a scale; K: the whole row
    zeros : None (all are the middle code), uint8 [G, N] or float32 [G, N]
    bias : [N] or None
    base4 : number of the first quad of scales in the noise law
    bits : of a code
    table : sixteen floats that 4-bit codes stand for, or None; zeros is None then
    codebooks : [C, 2^bits, 8] that codes choose from, or None; no zeros and no table then, and group is K
    book4 : number of the codebooks' first quad in the noise law where they train, float32 then; else -1
    turned : what few unperturbed rows on a CPU read in place of codes and scales, a few_rows.Turned, or None
    plans : how this weight is multiplied, by what it is multiplied with (ops.py)
    """

    codes: torch.Tensor
    scales: torch.Tensor
    in_features: int
    group: int
    zeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    base4: int = 0
    bits: int = 4
    table: tuple | None = None
    codebooks: torch.Tensor | None = None
    book4: int = -1
    turned: Turned | None = None
    plans: dict = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def out_features(self):
        return self.scales.shape[1]

    @functools.cached_property
    def shards(self):
        """Of how many alike, by outputs, this is one: its scales are a part of those of `next_quad` outputs."""
        quads, outputs, _ = self.scales.shape
        return self.scales.stride(0) // (4 * outputs) if quads > 1 else 1

    @property
    def next_quad(self):
        """Quads from one of an output's to its next, in memory and in the noise law."""
        return self.shards * self.out_features

    @functools.cached_property
    def form(self):
        """What its codes stand for: forms.Integers, Table or Vectors."""
        return form_of(self.bits, self.table, self.codebooks)

    @functools.cached_property
    def in_rows(self):
        """Whether the codes are a CPU's rows."""
        return self.codes.dtype == torch.uint8

    @property
    def groups(self):
        return self.in_features // self.group

    @property
    def zero_type(self):
        """dtype of the zero points, or None."""
        return None if self.zeros is None else self.zeros.dtype

    def with_codebooks(self, codebooks):
        """The same weight with these codebooks, which do not train."""
        return dataclasses.replace(self, codebooks=codebooks, book4=-1, plans={})

    def tensors(self):
        """Name -> tensor of what there is."""
        found = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "bias", "codebooks")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def same(self, other):
        """Whether another Weight says the same of the same memory."""
        return (self.addresses() == other.addresses() and self.table == other.table
                and (self.in_features, self.group, self.base4, self.bits, self.book4)
                == (other.in_features, other.group, other.base4, other.bits, other.book4))

    def addresses(self):
        return addresses(self.codes, self.scales, self.zeros, self.bias, self.codebooks)

    def keep(self, key, plan):
        """Remember a plan; the oldest is dropped from MOST_PLANS on."""
        while len(self.plans) >= MOST_PLANS:
            del self.plans[next(iter(self.plans))]
        self.plans[key] = plan
        return plan


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbation:
    """The evaluations that the E row blocks of x run under: block e with scales perturbed by coefs[e] * k(seeds[e]).

    seeds : int64 [E]
    coefs : float32 [E], on raw noise (noise.kernel_coefs)
    law : a number of noise.LAWS; NONE: the scales as they are, E still tells what rows belong together
    relative : s * (1 + coef * k) if true, s + coef * k if false
    shared : one z per output row, which leaves the sum (relative only)
    pair : seeds[2e] == seeds[2e + 1] for every e, so that one reading of the codes may serve both
    """

    seeds: torch.Tensor
    coefs: torch.Tensor
    law: int
    relative: bool = True
    shared: bool = False
    pair: bool = False

    def __len__(self):
        return self.seeds.numel()

    @functools.cached_property
    def form(self):
        """All of it but the numbers in the tensors: what a plan is made for."""
        return self.seeds.numel(), self.law, self.relative, self.shared, self.pair, self.seeds.device

    @property
    def plain(self):
        """Whether it is one evaluation of the scales as they are."""
        return self.law == NONE and len(self) == 1

    def one(self, e):
        """Evaluation e alone."""
        return dataclasses.replace(self, seeds=self.seeds[e:e + 1], coefs=self.coefs[e:e + 1], pair=False)
