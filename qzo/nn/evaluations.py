"""Evaluations: which perturbations of the scales one stacked batch runs under."""

import copy
import dataclasses
import functools

import torch

from ..kernels.noise import NONE, check_sharing, kernel_coefs, law_number, signed64
from ..kernels.operands import Perturbation


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluations:
    """E evaluations; row block e of the stacked batch runs under scales perturbed by coefs[e] * z(seeds[e]).

    Parameters
    ----------
    seeds : int64 [E], tensor or list of ints (taken modulo 2^64)
    coefs : float32 [E], tensor or list: signed factor on z, which has unit variance; 0 leaves the scales as they are
    noise : "rademacher", "ih4" or "gaussian" (kernels/noise.py)
    relative : scale * (1 + coef * z) if true, scale + coef * z if false
    sharing : "group", one z per scale, or "row", one z per output row (relative only): y = (x . W^T) * (1 + coef * z),
        with z[n] = noise(law, seed, scale_index[0, n]), that of the row's first scale

    Raises ValueError when seeds and coefs differ in length or are empty, for an unknown law or sharing, for
    sharing="row" with absolute noise, or for a coefficient that is not finite.
    """

    seeds: torch.Tensor
    coefs: torch.Tensor
    noise: str = "rademacher"
    relative: bool = True
    sharing: str = "group"

    def __post_init__(self):
        seeds, coefs = self.seeds, self.coefs
        if not isinstance(seeds, torch.Tensor):
            seeds = torch.tensor([signed64(s) for s in seeds], dtype=torch.int64)
        coefs = torch.as_tensor(coefs, dtype=torch.float32, device=seeds.device)
        if seeds.dim() != 1 or seeds.dtype != torch.int64 or coefs.shape != seeds.shape or len(seeds) == 0:
            raise ValueError(
                f"Evaluations need as many seeds as coefs, at least one: got seeds {seeds.dtype} "
                f"{list(seeds.shape)} and coefs {list(coefs.shape)}"
            )
        check_sharing(self.sharing, self.relative)
        if not bool(torch.isfinite(coefs).all()):
            raise ValueError(f"coefs must be finite, got {coefs.tolist()}")
        law_number(self.noise)
        object.__setattr__(self, "seeds", seeds)
        object.__setattr__(self, "coefs", coefs)

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, some):
        """The evaluations of a slice. What was checked is not checked again: nothing waits for a GPU."""
        part = copy.copy(self)
        for derived in ("pairs", "perturbation", "unperturbed"):
            vars(part).pop(derived, None)
        vars(part).update(seeds=self.seeds[some], coefs=self.coefs[some], kernel_coefs=self.kernel_coefs[some])
        return part

    @property
    def law(self):
        return law_number(self.noise)

    @functools.cached_property
    def kernel_coefs(self):
        """float32 [E] coefficients on the law's raw values, as the kernels take them."""
        return kernel_coefs(self.coefs, self.law)

    @functools.cached_property
    def pairs(self):
        """Whether evaluations 2j and 2j + 1 share a seed for every j: a kernel then reads the codes once for both."""
        return len(self) % 2 == 0 and torch.equal(self.seeds[0::2], self.seeds[1::2])

    def to(self, device):
        """The same evaluations on another device. What is derived from them goes along: nothing waits for a GPU."""
        if self.seeds.device == torch.device(device):
            return self
        moved = copy.copy(self)
        for derived in ("perturbation", "unperturbed"):
            vars(moved).pop(derived, None)
        derived = {"pairs": self.pairs, "kernel_coefs": self.kernel_coefs.to(device)}
        vars(moved).update(seeds=self.seeds.to(device), coefs=self.coefs.to(device), **derived)
        return moved

    @functools.cached_property
    def perturbation(self):
        """What the kernels take of it."""
        return Perturbation(self.seeds, self.kernel_coefs, self.law, self.relative, self.sharing == "row", self.pairs)

    @functools.cached_property
    def unperturbed(self):
        """The same rows that belong together, the scales as they are: for layers that do not train."""
        return Perturbation(self.seeds, self.kernel_coefs, NONE, self.relative, False, self.pairs)
