"""Which part of each step is a rank's, and how the losses of all parts become those of the step.

    data         every rank runs all evaluations of the step on its own examples
    directions   every rank runs its own evaluations on all examples
    AxB          both: A parts of the examples times B groups of the evaluations; A * B ranks
    tensor       nothing: every rank runs all evaluations on all examples, with its part of each layer's codes
                 (nn/tensor_parallel.py); their losses are the same, those of the first are taken

Rank r has part r // B of the examples and group r % B of the evaluations. It sends 16 bytes for each of its
evaluations, the sum of its losses and how many they are (and 16 for each option, where label biases are fitted:
loss/label_bias.py); all ranks then hold the losses of the whole step, take the same step by them, and make the noise of
all directions themselves.

Terms (rank): docs/glossary.md.
"""

import re
from collections.abc import Callable

import torch
from torch import nn

from ..loss.sums import means
from ..nn.tensor_parallel import is_sharded
from ..system.ranks import Ranks

TENSOR = "tensor"
PARALLEL = re.compile(rf"data|directions|{TENSOR}|[1-9]\d*x[1-9]\d*")


class Share:
    """The part of a rank in each step of so many `evaluations`.

    parts, groups : into how many the examples and the evaluations are divided; parts * groups ranks
    mine : the slice of the step's evaluations that is this rank's

    ValueError for another `parallel` than those above, for one of other ranks, and for more groups than evaluations.
    """

    def __init__(self, ranks: Ranks, evaluations: int, parallel: str = "data") -> None:
        check_parallel(parallel)
        self.ranks, self.evaluations = ranks, evaluations
        named = {"data": (ranks.count, 1), "directions": (1, ranks.count), TENSOR: (1, 1)}
        self.parts, self.groups = named.get(parallel) or map(int, parallel.split("x"))
        if self.parts * self.groups != ranks.count and parallel != TENSOR:
            raise ValueError(
                f"parallel={parallel!r} is for {self.parts * self.groups} ranks, there are {ranks.count}: start as "
                "many (torchrun --nproc-per-node), or divide the step otherwise"
            )
        if self.groups > evaluations:
            raise ValueError(
                f"parallel={parallel!r}: {self.groups} groups of evaluations, but a step has {evaluations}: "
                "give more directions, or fewer groups"
            )
        self.mine = _slice(evaluations, ranks.rank % self.groups, self.groups)

    def rows(self, count: int) -> slice:
        """Which of the step's `count` examples are this rank's. ValueError where some rank would have none."""
        if count < self.parts:
            raise ValueError(
                f"a batch of {count} examples cannot be divided over {self.parts} ranks: give at least as many "
                "(--batch-size), or divide the evaluations (--parallel directions)"
            )
        return _slice(count, self.ranks.rank // self.groups % self.parts, self.parts)

    def combine(self, losses: torch.Tensor) -> torch.Tensor:
        """The loss of each of the step's evaluations, float64 [E] on the CPU, the same bits on every rank.

        losses: of this rank's evaluations; [e, S], sums (`loss_sums`), or [e], which count alike. They are added in the
        order of the ranks.
        """
        return self.send(losses)()

    def send(self, losses: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to `combine`, and go on: what comes back waits for the other ranks and gives the step's losses."""
        losses, summed = losses.detach().double().cpu(), losses.dim() == 2
        columns = losses if summed else torch.stack([losses, torch.ones_like(losses)], 1)
        padded = columns.new_zeros(-(-self.evaluations // self.groups), columns.shape[1])
        padded[: len(columns)] = columns
        gathered = self.ranks.send(padded)

        def wait() -> torch.Tensor:
            total = columns.new_zeros(self.evaluations, columns.shape[1])
            for rank, of_rank in enumerate(gathered()[: self.parts * self.groups]):
                its = _slice(self.evaluations, rank % self.groups, self.groups)
                total[its] += of_rank[: its.stop - its.start]
            return means(total if summed else total[:, 0] / total[:, 1])

        return wait


def check_parallel(parallel: str) -> None:
    """ValueError for what names no division of a step, or of layers."""
    if not isinstance(parallel, str) or not PARALLEL.fullmatch(parallel):
        raise ValueError(
            f"parallel={parallel!r:.60}: expected data, directions, tensor, or how many parts of the examples times "
            "groups of the evaluations, such as 2x4"
        )


def check_parts(module: nn.Module, parallel: str | None, share: Share) -> None:
    """ValueError where layers are cut in parts and steps are to be divided, or are not and steps are not."""
    cut, count = is_sharded(module), share.ranks.count
    if cut and parallel != TENSOR:
        raise ValueError(
            f"parallel={parallel!r}: the model's layers are cut in parts (qzo.shard_), so that all ranks run every "
            f"example; use parallel={TENSOR!r}, or qzo.unshard_(model) first"
        )
    if parallel == TENSOR and count > 1 and not cut:
        raise ValueError(
            f"parallel={TENSOR!r}: no layer is cut in parts, each of {count} ranks would do the same; call "
            "qzo.shard_(model) first"
        )


def _slice(count: int, number: int, parts: int) -> slice:
    """The part of this number among as many, all of about one size."""
    return slice(number * count // parts, (number + 1) * count // parts)
