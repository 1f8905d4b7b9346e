"""The QZO optimizer: evaluations, losses by a closure, the step's arithmetic (step.py), the journal."""

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.noise import check_sharing, law_number, step_seed
from ..nn import ops
from ..nn.arena import ScaleArena
from ..nn.evaluations import Evaluations
from ..nn.layers import arena_of, check_sharing_of, evaluating, layers
from ..nn.streaming.offload import together
from .defaults import CLIP, EPS, FLOOR
from .graph import Batch, Closure, Graphs, Result, graphs_of
from .journal import Journal, Record
from .replay import journal_header
from .step import LARGEST, apply_records, project

ALIKE = 50  # first steps without a difference, after which the objective is taken to ignore the perturbation
ROUNDOFF = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24}


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step saw and did: losses [E] in the order +, - of each direction, derivatives before clipping and
    coefficients applied to the raw noise, one per direction, and whether the step was skipped."""

    losses: list[float]
    derivatives: list[float]
    applied: list[float]
    skipped: bool


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
        J, directions per step; a step makes 2 J evaluations.
    seed
        Of the run, 64 bits; the seed of direction j at step t is Philox of (seed, t, j).
    journal
        Path of the journal to write, or None.
    resume
        Continue an existing journal: its steps are replayed onto the module, which must be the untouched base.
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
        why.

    Raises
    ------
    ValueError
        A value out of range; a module in which nothing trains, or codebooks train under noise shared by rows.
    JournalError
        A ValueError: the journal exists and is not resumed, is damaged, or belongs to another model or recipe.
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
        paired: bool = True,
        floor: float = FLOOR,
        max_skipped: int = 10,
        recipe: dict[str, Any] | None = None,
        large_rows: str = "fused",
        cuda_graph: bool | None = None,
    ) -> None:
        _check(lr >= 0 and math.isfinite(lr), "lr", lr, "a finite number >= 0")
        _check(eps > 0 and math.isfinite(eps), "eps", eps, "a finite number > 0")
        _check(clip > 0, "clip", clip, "a number > 0 (math.inf: no clipping)")
        _check(isinstance(directions, int) and 1 <= directions < 1 << 16, "directions", directions, "an int >= 1")
        _check(isinstance(seed, int) and -(1 << 63) <= seed < 1 << 64, "seed", seed, "a 64-bit int")
        _check(floor >= 0, "floor", floor, "a number >= 0")
        _check(
            cuda_graph is None or isinstance(cuda_graph, bool),
            "cuda_graph",
            cuda_graph,
            "None (where there is a CUDA device), True or False",
        )
        law_number(noise)
        check_sharing(sharing, relative)
        check_sharing_of(module, sharing)
        ops.check_large_rows(large_rows)
        self.module, self.large_rows = module, large_rows
        self.arena: ScaleArena = arena_of(module, exact=True)
        self.paired, self.max_skipped = paired, max_skipped
        self.cuda_graph = cuda_graph
        self.graphs: Graphs | None = None
        self.last: StepResult | None = None
        self._skipped_in_a_row, self._told = 0, False
        self._alike: int | None = 0  # steps without a difference so far; None once there was one
        super().__init__(
            [self.arena.data],
            dict(
                lr=lr,
                eps=eps,
                clip=clip,
                noise=noise,
                relative=relative,
                sharing=sharing,
                directions=directions,
                seed=seed,
                floor=floor,
                step=0,
            ),
        )
        _warn_if_rounded_away(module, self.arena, eps, relative)
        self.journal: Journal | None = None
        if journal is not None:
            header = journal_header(module, self.param_groups[0], recipe)
            self.journal = Journal.resume(journal, header) if resume else Journal.create(journal, header)
            for records in self.journal.steps:
                self._apply(records)
                self._count(records)
            self.param_groups[0]["step"] = len(self.journal.steps)

    def evaluations(self) -> Evaluations:
        """The Evaluations of the coming step: +eps and -eps of each direction in turn.

        Returns
        -------
        Evaluations
            2 J of them, on the device of the scales; those of a direction share a seed.

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
        seeds = [step_seed(group["seed"], group["step"], j) for j in range(group["directions"]) for _ in range(2)]
        coefs = [sign * group["eps"] for _ in range(group["directions"]) for sign in (1, -1)]
        return Evaluations(seeds, coefs, group["noise"], group["relative"], group["sharing"]).to(self.arena.data.device)

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
            evaluation, a tensor [2 J] of any float dtype, of a batch stacked 2 J times (`qzo.pair`, `qzo.losses`); else
            it is called 2 J times, each under one evaluation, and returns a scalar.
        paired
            None: what the optimizer was made with (True unless said otherwise).
        batch
            A mapping of tensors and plain values, or None: the closure knows its own.

        Returns
        -------
        float
            The mean loss over the evaluations; `last` has each of them.

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
        """
        if batch is not None and not isinstance(batch, Mapping):
            raise TypeError(
                f"batch={type(batch).__name__}: expected a mapping of tensors, or none and a closure that knows its own"
            )
        paired = self.paired if paired is None else paired
        if self.cuda_graph or (self.cuda_graph is None and batch is not None):
            result = self._as_graph(closure, batch, paired)
            if result is not None:
                return self._finish(*result, updated=True)
        call = closure if batch is None else functools.partial(closure, batch)
        losses = self.losses(call, self.evaluations(), paired).double().cpu()
        derivatives, applied = project(losses, self.rates(), law_number(self.param_groups[0]["noise"]))
        return self._finish(losses.tolist(), derivatives.tolist(), applied.tolist())

    def _as_graph(self, closure: Closure, batch: Batch | None, paired: bool) -> Result | None:
        self.graphs = graphs_of(self)
        return None if self.graphs is None else self.graphs.step(closure, batch, paired)

    def rates(self) -> tuple[float, float, float]:
        """(lr / J, 2 eps, clip) of the coming step, what `project` takes."""
        group = self.param_groups[0]
        return group["lr"] / group["directions"], 2 * group["eps"], group["clip"]

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
        records = [
            Record(group["step"], j, seeds[j], applied[j], losses[2 * j], losses[2 * j + 1], skipped)
            for j in range(count)
        ]
        if self.journal is not None:
            self.journal.append(records)
        if not updated:
            self._apply(records)
        group["step"] += 1
        self.last = StepResult(losses, derivatives, applied, skipped)
        self._count(records)
        if self._skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row had a NaN or infinite loss (last: {losses}); {self._advice()}"
            )
        if self._alike is not None and self._alike >= ALIKE:
            raise ValueError(
                f"the losses of +eps and -eps had the same bits in all of the first {self._alike} steps: the objective "
                "does not see the perturbation. Compute it inside the closure, with the module that this optimizer was "
                "made for, from nothing kept between calls; a metric that ties (accuracy or a reward over few rows) "
                f"needs more rows or directions, a larger eps ({group['eps']:g}), or finer values"
            )
        if skipped and not self._told:
            self._told = True
            warnings.warn(
                f"step {group['step'] - 1} had a NaN or infinite loss and changes nothing; if that goes on: "
                f"{self._advice()}",
                stacklevel=3,
            )
        return sum(losses) / len(losses)

    def _advice(self) -> str:
        """What to do about losses that are not finite; many models of bfloat16 leave float16's range."""
        group, first = self.param_groups[0], ""
        if any(p.dtype == torch.float16 for p in self.module.parameters()):
            first = (
                f"float16 activations end at {torch.finfo(torch.float16).max:g}: load the model in bfloat16 or "
                "float32 (--dtype bfloat16 or float32); else "
            )
        rates = f"lower lr ({group['lr']:g}) or eps ({group['eps']:g})"
        return f"{first}{rates}, or check the data and what the closure computes"

    @contextlib.contextmanager
    def perturbed(self, evaluations: Evaluations) -> Iterator[None]:
        """What a closure runs in."""
        with ops.backend(large_rows=self.large_rows), evaluating(self.module, evaluations):
            yield

    def losses(self, closure: Closure, evaluations: Evaluations, paired: bool) -> torch.Tensor:
        """[2 J] of the evaluations, where the closure left them; what `step` raises for another shape."""
        if paired:
            with self.perturbed(evaluations):
                losses = closure()
            if not isinstance(losses, torch.Tensor) or losses.shape != (len(evaluations),):
                got = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
                raise ValueError(
                    f"the closure must return a tensor [{len(evaluations)}], the loss of each evaluation; got {got}. "
                    "Stack the batch with qzo.pair and use qzo.losses, or step(closure, paired=False)"
                )
            return losses

        def single(e: int) -> torch.Tensor:
            with self.perturbed(evaluations[e : e + 1]):
                loss = torch.as_tensor(closure(), dtype=torch.float64)
            if loss.numel() != 1:
                raise ValueError(
                    f"with paired=False the closure must return one number, the loss of the evaluation it "
                    f"runs under; got {list(loss.shape)}"
                )
            return loss.view(())

        return torch.stack(together(self.module, [functools.partial(single, e) for e in range(len(evaluations))]))

    def _apply(self, records: Sequence[Record]) -> None:
        """The update of one step from its records: what a replay does, too."""
        self.param_groups[0]["params"] = [self.arena.data]  # the arena may have moved to another device
        if not records[0].skipped:
            apply_records(self.arena, records, self.param_groups[0])

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


def _check(good: bool, name: str, got: object, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}={got!r}: expected {wanted}")


def _warn_if_rounded_away(module: nn.Module, arena: ScaleArena, eps: float, relative: bool) -> None:
    """Warn when the activations' rounding drowns L+ - L-.

    The rms error of L+ - L- over its rms size was measured near 1.25 * u / eps_relative, u the roundoff of the
    activations (4-layer network, eps 1e-3 and 1e-2, float16 and bfloat16).
    """
    dtypes = {p.dtype for p in module.parameters() if p.dtype in ROUNDOFF}
    if not dtypes or arena.data.is_meta:
        return
    dtype = max(dtypes, key=ROUNDOFF.__getitem__)
    size = 1.0
    if not relative:
        read = [layer.read_scales() for layer in layers(module).values()]
        size = sum(float(s.abs().sum()) for s in read) / sum(s.numel() for s in read)
    wanted = 5 * ROUNDOFF[dtype] * size
    if eps < wanted / 2:
        warnings.warn(
            f"eps={eps:g} is too small for {str(dtype).removeprefix('torch.')} activations: their rounding "
            f"is larger than the signal; use eps >= {wanted:.1g}, or float32/float16 activations",
            stacklevel=3,
        )
