"""The QZO optimizer: evaluations, losses by a closure, the step's arithmetic (step.py), the journal."""

import collections
import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.noise import check_sharing, law_number, step_seed
from ..loss.sums import fits
from ..nn import ops
from ..nn.arena import ScaleArena
from ..nn.evaluations import Evaluations
from ..nn.layers import arena_of, check_sharing_of, evaluating, layers
from ..nn.streaming.offload import together
from ..system.ranks import Ranks
from .advice import against_alike, against_nan, against_shape, warn_if_rounded_away
from .defaults import CLIP, EPS, FLOOR, SYNC_SECONDS
from .graph import Batch, Closure, Graphs, Result, graphs_of
from .journal import Journal, Record
from .ranges import check
from .replay import Held, journal_header, on_all
from .shares import TENSOR, Share, check_parts
from .step import LARGEST, StepResult, apply_steps, evaluation_count, perturbations, project, sides

ALIKE = 50  # first steps without a difference, after which the objective is taken to ignore the perturbation


class QZO(torch.optim.Optimizer):
    """Zeroth-order optimizer of a module's quantization scales; forward passes only, no state but the scales.

    Two-point SPSA with directional derivative clipping (DDC): arXiv 2505.13430, algorithm 1 and equation 5. With J
    directions z_j, d_j = (L(s + eps z_j) - L(s - eps z_j)) / (2 eps), clipped to [-C, C]; s moves by -(lr / J) d_j z_j
    (step.py has the arithmetic, kernels/update.py the rounding).

    Parameters
    ----------
    module
        Holds QZOLinear layers; those that train share its ScaleArena, float32.
    lr
        Learning rate; relative to the scales if `relative`.
    eps
        Perturbation, in units of a scale if `relative` (default 1e-2), else absolute.
    clip
        Bound C on the directional derivative (DDC), in units of the loss over those of eps; math.inf turns it off.
    noise
        As in `Evaluations`.
    relative
        As in `Evaluations`.
    sharing
        As in `Evaluations`.
    directions
        J, directions per step; a step makes E = 2 J evaluations, one-sided J.
    seed
        Of the run, 64 bits; the seed of direction j at step t is Philox of (seed, t, j).
    journal
        Path of the journal to write, or None.
    resume
        Continue an existing journal: its steps are replayed onto the module, which must be the untouched base.
    one_sided
        Evaluate +eps of each direction alone, and compare its loss with the mean of the others' (step.py): more is
        learned from as many evaluations. At least 2 directions.
    paired
        Whether closures return all losses at once; `step` can override it.
    floor
        Smallest magnitude of a scale; a scale keeps its sign, a zero stays zero.
    max_skipped
        Consecutive steps with a NaN or infinite loss before `step` gives up.
    recipe
        JSON-able dict for the journal's header: what else a resumed run has to agree on.
    large_rows
        What `qzo.backend` describes, during the steps: "fused", "folded", "blas" or "auto".
    cuda_graph
        Run whole steps, update included, as CUDA graphs (graph.py): the same bits, without the cost of launching
        kernels one by one. None (the default): steps that are given their batch, where the scales are on a CUDA device.
        True: also those of a closure that comes again, which has to find each batch in the same tensors, and a warning
        where there is no such device. False: never. What cannot be captured runs without, after one warning that says
        why. Steps of several ranks run without.
    parallel
        What is divided among the ranks of torch.distributed's default group, if there is one: "data", the examples;
        "directions", the evaluations; "AxB", A parts of the examples times B groups of the evaluations; "tensor", the
        layers (`qzo.shard_`). All take the same steps; the first writes the journal. None: this process is alone.
    check_every
        Steps after which ranks compare a digest of their scales; 0: never.
    journal_fsync
        Seconds of a run that a power failure may cost: a step is synced to the disk when so much time has passed since
        the last sync (0: each step, math.inf: the last one). A killed process costs nothing whatever this is.
    staleness
        S: a step's evaluations are made on the scales as they were S steps before, while the losses of the S steps in
        between are on their way, so that a rank may fall S steps behind before the others wait for it. `step` then
        takes the step that was evaluated S calls ago, the first S calls none; `drain` takes those that are left. The
        same bits on any number of ranks; 0 (the default): none. Such steps run without CUDA graphs.

    Raises
    ------
    ValueError
        A value out of range; a module in which nothing trains, or codebooks train under noise shared by rows; ranks
        that were started otherwise, or are not as many as `parallel` says.
    JournalError
        A ValueError: the journal exists and is not resumed, is damaged, is written by another process, or belongs to
        another model or recipe.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        eps: float = EPS,
        clip: float = CLIP,
        noise: str = "rademacher",
        relative: bool = True,
        sharing: str = "group",
        directions: int = 1,
        seed: int = 0,
        journal: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        one_sided: bool = False,
        paired: bool = True,
        floor: float = FLOOR,
        max_skipped: int = 10,
        recipe: dict[str, Any] | None = None,
        large_rows: str = "fused",
        cuda_graph: bool | None = None,
        parallel: str | None = "data",
        check_every: int = 100,
        journal_fsync: float = SYNC_SECONDS,
        staleness: int = 0,
    ) -> None:
        check(lr=lr, eps=eps, clip=clip, directions=directions, seed=seed, floor=floor, cuda_graph=cuda_graph)
        check(**{"one_sided_directions": directions} if one_sided else {})
        check(check_every=check_every, journal_fsync=journal_fsync, staleness=staleness)
        law_number(noise)
        check_sharing(sharing, relative)
        check_sharing_of(module, sharing)
        ops.check_large_rows(large_rows)
        self.module, self.large_rows = module, large_rows
        self.arena: ScaleArena = arena_of(module, exact=True)
        self.paired, self.max_skipped, self.cuda_graph, self.staleness = paired, max_skipped, cuda_graph, staleness
        self.graphs: Graphs | None = None
        self.last: StepResult | None = None
        self._skipped_in_a_row, self._told = 0, False
        self._alike: int | None = 0  # steps without a difference so far; None once there was one
        self._ahead: collections.deque[Callable[[], float]] = collections.deque()  # take the steps after this one
        law = dict(noise=noise, relative=relative, sharing=sharing, floor=floor, one_sided=one_sided)
        numbers = dict(lr=lr, eps=eps, clip=clip, directions=directions, seed=seed, step=0)
        super().__init__([self.arena.data], {**numbers, **law})
        warn_if_rounded_away(module, self.arena, eps, relative)
        self.ranks = Ranks(alone=parallel is None)
        self.parallel = parallel or "data"
        self.check_every, self._checked = check_every, 0
        self.journal: Journal | None = None
        check_parts(module, parallel, self.share)
        if journal is not None or self.ranks.count > 1:
            self._begin(journal, resume, recipe or {}, journal_fsync)

    def _begin(
        self, journal: str | os.PathLike[str] | None, resume: bool, recipe: dict[str, Any], fsync: float
    ) -> None:
        """See that all ranks are alike, open the journal on the first, and apply the steps it holds on all."""
        group = self.param_groups[0]
        own = {"staleness": self.staleness, "one_sided": group["one_sided"]}
        if self.ranks.count > 1 and self.parallel != TENSOR:  # any number of ranks, and one, go on with that journal
            own |= {"ranks": self.ranks.count, "shares": self.parallel}
        recipe = {**recipe, **{name: value for name, value in own.items() if value}}
        header = journal_header(self.module, group, recipe)
        self.ranks.check_same({**header, "lr": group["lr"], "journal": journal is not None})
        if journal is None:
            return

        def opened() -> Held:
            self.journal = (Journal.resume if resume else Journal.create)(journal, header, fsync)
            return header, self.journal.steps

        _, held = on_all(self.ranks, opened)
        taken = max(0, len(held) - self.staleness)
        self._apply(held[:taken])
        for records in held:
            self._count(records)
        group["step"] = self._checked = taken
        self._ahead.extend(functools.partial(self._again, records) for records in held[taken:])

    @property
    def share(self) -> Share:
        """Which part of the coming step is this rank's."""
        return Share(self.ranks, evaluation_count(self.param_groups[0]), self.parallel)

    @property
    def evaluated(self) -> int:
        """Steps that are evaluated: those that were taken, and those ahead of them (`staleness`)."""
        return self.param_groups[0]["step"] + len(self._ahead)

    def evaluations(self) -> Evaluations:
        """The Evaluations that the coming call of `step` makes: +eps and -eps of each direction in turn.

        Returns
        -------
        Evaluations
            E of them, or those of this rank, on the device of the scales; those of a direction share a seed.

        Raises
        ------
        RuntimeError
            The layers have moved to another arena, where this optimizer would not reach them.
        """
        if any(layer.arena is not self.arena for layer in layers(self.module).values()):
            raise RuntimeError(
                "the layers have left this optimizer's arena (train_only_, or a QZO of another module "
                "that shares them): make a new QZO"
            )
        group = self.param_groups[0]
        seeds, coefs = perturbations(group, self.evaluated)
        law, mine = (group["noise"], group["relative"], group["sharing"]), self.share.mine
        return Evaluations(seeds[mine], coefs[mine], *law).to(self.arena.data.device)

    @torch.no_grad()
    def step(  # type: ignore[override]  # there is no step without a closure, and it may return a tensor
        self, closure: Closure, paired: bool | None = None, *, batch: Batch | None = None
    ) -> float:
        """One step. A NaN or infinite loss skips it, which the journal records.

        On a CUDA device a step that is given its batch is captured when (closure, names, shapes, dtypes, values) come
        for the second time and replayed from then on, with the batch copied into the tensors of the capture: so the
        closure is the same object in each step and finds all that changes in the batch, and a run has few shapes
        (`qzo.optim.graph.LIMIT` graphs are held).

        Parameters
        ----------
        closure
            closure(), or closure(batch), runs forward only. Paired it is called once and returns the loss of each
            evaluation, a tensor [E] of any float dtype, of a batch stacked E times (`qzo.pair`, `qzo.losses`); else
            it is called E times, each under one evaluation, and returns a scalar. On one of several ranks it returns
            those of `evaluations()` over its own examples, which count alike on all, or what `qzo.loss_sums` gives.
        paired
            None: what the optimizer was made with (True unless said otherwise).
        batch
            A mapping of tensors and plain values, or None: the closure knows its own.

        Returns
        -------
        float
            The mean loss over the evaluations of the step that was taken, NaN if none was (`staleness`); `last` has
            each of them.

        Raises
        ------
        FloatingPointError
            `max_skipped` steps in a row had a NaN or infinite loss; lr times a derivative leaves float32.
        ValueError
            The losses have another shape; those of +eps and -eps have not differed once in the first 50 steps.
        TypeError
            The batch is no mapping.
        OSError
            The journal cannot be written.
        RanksDiverged
            A RuntimeError: the ranks' scales are no longer the same.
        """
        if batch is not None and not isinstance(batch, Mapping):
            raise TypeError(
                f"batch={type(batch).__name__}: expected a mapping of tensors, or none and a closure that knows its own"
            )
        paired = self.paired if paired is None else paired
        graphs = self.ranks.count == 1 and not self.staleness
        if graphs and (self.cuda_graph or (self.cuda_graph is None and batch is not None)):
            result = self._as_graph(closure, batch, paired)
            if result is not None:
                return self._finish(*result, updated=True)
        call = closure if batch is None else functools.partial(closure, batch)
        sent = self.share.send(self.losses(call, self.evaluations(), paired))
        self._ahead.append(functools.partial(self._take, sent, self.rates()))
        return self.take() if len(self._ahead) > self.staleness else math.nan

    @torch.no_grad()
    def take(self) -> float:
        """Take the first step evaluated and not yet taken (`staleness`), as `step`; its mean loss. IndexError: none."""
        return self._ahead.popleft()()

    def drain(self) -> None:
        """Take all such steps, those evaluated and not yet taken: ends a run with `staleness`. Raises as `step`."""
        while self._ahead:
            self.take()

    def _take(self, sent: Callable[[], torch.Tensor], rates: tuple[float, float, float]) -> float:
        """Take a step whose losses were sent, at the rates of its evaluation; returns the mean loss."""
        losses = sent()
        group = self.param_groups[0]
        derivatives, applied = project(losses, rates, law_number(group["noise"]), group["one_sided"])
        return self._finish(losses.tolist(), derivatives.tolist(), applied.tolist())

    def _again(self, records: Sequence[Record]) -> float:
        """Take a step that the journal holds already; returns the mean loss."""
        self._apply([records])
        self.param_groups[0]["step"] += 1
        return sum(r.loss_plus + r.loss_minus for r in records) / (2 * len(records))

    def _as_graph(self, closure: Closure, batch: Batch | None, paired: bool) -> Result | None:
        self.graphs = graphs_of(self)
        return None if self.graphs is None else self.graphs.step(closure, batch, paired)

    def rates(self) -> tuple[float, float, float]:
        """(lr / J, 2 eps or one-sided eps, clip) of the coming step, what `project` takes."""
        group = self.param_groups[0]
        return group["lr"] / group["directions"], group["eps"] * (1 if group["one_sided"] else 2), group["clip"]

    def _finish(
        self, losses: list[float], derivatives: list[float], applied: list[float], updated: bool = False
    ) -> float:
        """Journal, update (unless a graph has done it) and count one step; returns the mean loss."""
        group = self.param_groups[0]
        count = group["directions"]
        skipped = not all(abs(x) <= LARGEST for x in losses)
        if skipped:
            losses = [x if abs(x) <= LARGEST else math.inf * x for x in losses]  # the journal holds float32
            applied = [0.0] * count
        elif not all(map(math.isfinite, applied)):
            raise FloatingPointError(
                f"lr={group['lr']:g} times the derivatives {derivatives} leaves float32; lower lr or clip"
            )
        seeds = [step_seed(group["seed"], group["step"], j) for j in range(count)]
        loss, other = (side.tolist() for side in sides(torch.tensor(losses, dtype=torch.float64), group["one_sided"]))
        records = [Record(group["step"], j, seeds[j], applied[j], loss[j], other[j], skipped) for j in range(count)]
        if self.journal is not None:
            self.journal.append(records)
        if not updated:
            self._apply([records])
        group["step"] += 1
        if self.check_every and group["step"] % self.check_every == 0:
            self.check_ranks()
        self.last = StepResult(losses, derivatives, applied, skipped)
        self._count(records)
        if self._skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row had a NaN or infinite loss (last: {losses}); "
                f"{against_nan(self.module, group)}"
            )
        if self._alike is not None and self._alike >= ALIKE:
            raise ValueError(against_alike(self._alike, group))
        if skipped and not self._told:
            self._told = True
            warnings.warn(
                f"step {group['step'] - 1} had a NaN or infinite loss and changes nothing; if that goes on: "
                f"{against_nan(self.module, group)}",
                stacklevel=3,
            )
        return sum(losses) / len(losses)

    def check_ranks(self) -> None:
        """RanksDiverged unless all ranks hold the same scales; all have to ask."""
        step = self.param_groups[0]["step"]
        self.ranks.check_alike(self.arena.data, step, self._checked)
        self._checked = step

    @contextlib.contextmanager
    def perturbed(self, evaluations: Evaluations) -> Iterator[None]:
        """What a closure runs in."""
        with ops.backend(large_rows=self.large_rows), evaluating(self.module, evaluations):
            yield

    def losses(self, closure: Closure, evaluations: Evaluations, paired: bool) -> torch.Tensor:
        """[e] or [e, S] of the evaluations, where the closure left them; what `step` raises for another shape."""
        if paired:
            with self.perturbed(evaluations):
                losses = closure()
            if not isinstance(losses, torch.Tensor) or not fits(losses, len(evaluations)):
                raise ValueError(against_shape(losses, len(evaluations)))
            return losses

        def single(e: int) -> torch.Tensor:
            with self.perturbed(evaluations[e : e + 1]):
                loss = torch.as_tensor(closure(), dtype=torch.float64)
            if loss.numel() != 1 and not fits(loss, 1):
                raise ValueError(against_shape(loss))
            return loss.view(1) if loss.numel() == 1 else loss

        return torch.cat(together(self.module, [functools.partial(single, e) for e in range(len(evaluations))]))

    def _apply(self, steps: Sequence[Sequence[Record]]) -> None:
        """The update of each step from its records: what a replay does, too."""
        self.param_groups[0]["params"] = [self.arena.data]  # the arena may have moved to another device
        apply_steps(self.arena, steps, self.param_groups[0])

    def _count(self, records: Sequence[Record]) -> None:
        """Steps that changed nothing: skipped, or without a difference between their losses."""
        skipped = records[0].skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped and self._alike is not None:
            alike = all(r.loss_plus == r.loss_minus and not r.applied for r in records)
            self._alike = self._alike + 1 if alike else None

    def close(self) -> None:
        """Flush and close the journal."""
        if self.journal is not None:
            self.journal.close()
