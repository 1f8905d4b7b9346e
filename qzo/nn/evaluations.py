"""Evaluations: which perturbations of the scales one stacked batch runs under.

Terms (evaluation): docs/glossary.md.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch

from ..kernels.noise import NONE, check_sharing, kernel_coefs, law_number, signed64
from ..kernels.operands import Perturbation


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Evaluations:
    """E evaluations; row block e of the stacked batch runs under scales perturbed by coefs[e] * z(seeds[e]).

    Simultaneous perturbation (SPSA) of the quantization scales: arXiv 2505.13430, algorithm 1, which has two
    evaluations to a step, of coefficients +eps and -eps.

    Parameters
    ----------
    seeds
        int64 [E], a tensor, or ints (taken modulo 2^64).
    coefs
        float32 [E], a tensor or numbers: signed factor on z, which has unit variance; 0 leaves the scales as they are.
        They go to the device of the seeds.
    noise
        "rademacher", "ih4" or "gaussian" (kernels/noise.py).
    relative
        scale * (1 + coef * z) if true, scale + coef * z if false.
    sharing
        "group", one z per scale, or "row", one z per output row (relative only): y = (x . W^T) * (1 + coef * z), with
        z[n] = noise(law, seed, scale_index[0, n]), that of the row's first scale.

    Raises
    ------
    ValueError
        Seeds and coefs differ in length or are empty; an unknown law or sharing; sharing="row" with absolute noise; a
        coefficient that is not finite.
    """

    seeds: torch.Tensor
    coefs: torch.Tensor
    noise: str
    relative: bool
    sharing: str

    def __init__(
        self,
        seeds: torch.Tensor | Sequence[int],
        coefs: torch.Tensor | Sequence[float],
        noise: str = "rademacher",
        relative: bool = True,
        sharing: str = "group",
    ) -> None:
        if not isinstance(seeds, torch.Tensor):
            seeds = torch.tensor([signed64(s) for s in seeds], dtype=torch.int64)
        coefs = torch.as_tensor(coefs, dtype=torch.float32, device=seeds.device)
        if seeds.dim() != 1 or seeds.dtype != torch.int64 or coefs.shape != seeds.shape or len(seeds) == 0:
            raise ValueError(
                f"Evaluations need as many seeds as coefs, at least one: got seeds {seeds.dtype} "
                f"{list(seeds.shape)} and coefs {list(coefs.shape)}"
            )
        check_sharing(sharing, relative)
        if not bool(torch.isfinite(coefs).all()):
            raise ValueError(f"coefs must be finite, got {coefs.tolist()}")
        law_number(noise)
        vars(self).update(seeds=seeds, coefs=coefs, noise=noise, relative=relative, sharing=sharing)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, some: slice) -> "Evaluations":
        """The evaluations of a slice. What was checked is not checked again: nothing waits for a GPU."""
        part = copy.copy(self)
        for derived in ("pairs", "perturbation", "unperturbed"):
            vars(part).pop(derived, None)
        vars(part).update(seeds=self.seeds[some], coefs=self.coefs[some], kernel_coefs=self.kernel_coefs[some])
        return part

    @property
    def law(self) -> int:
        """Number of the noise law (kernels/noise.py)."""
        return law_number(self.noise)

    @functools.cached_property
    def kernel_coefs(self) -> torch.Tensor:
        """float32 [E] coefficients on the law's raw values, as the kernels take them."""
        return kernel_coefs(self.coefs, self.law)

    @functools.cached_property
    def pairs(self) -> bool:
        """Whether evaluations 2j and 2j + 1 share a seed for every j: a kernel then reads the codes once for both."""
        return len(self) % 2 == 0 and torch.equal(self.seeds[0::2], self.seeds[1::2])

    def to(self, device: torch.device | str) -> "Evaluations":
        """The same evaluations on another device; what is derived from them goes along, and nothing waits for a GPU.

        Parameters
        ----------
        device
            Where seeds and coefficients are wanted.

        Returns
        -------
        Evaluations
            These, if they are there already.
        """
        if self.seeds.device == torch.device(device):
            return self
        moved = copy.copy(self)
        for derived in ("perturbation", "unperturbed"):
            vars(moved).pop(derived, None)
        vars(moved).update(seeds=self.seeds.to(device), coefs=self.coefs.to(device))
        vars(moved).update(pairs=self.pairs, kernel_coefs=self.kernel_coefs.to(device))
        return moved

    @functools.cached_property
    def perturbation(self) -> Perturbation:
        """What the kernels take of it."""
        return Perturbation(self.seeds, self.kernel_coefs, self.law, self.relative, self.sharing == "row", self.pairs)

    @functools.cached_property
    def unperturbed(self) -> Perturbation:
        """The same rows that belong together, the scales as they are: for layers that do not train."""
        return Perturbation(self.seeds, self.kernel_coefs, NONE, self.relative, False, self.pairs)
