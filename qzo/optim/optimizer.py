"""The QZO optimizer: evaluations, losses by a closure, the step's arithmetic (step.py), the journal."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping

import torch

from ..kernels.noise import check_sharing, law_number, step_seed
from ..nn import ops
from ..nn.evaluations import Evaluations
from ..nn.layers import arena_of, check_sharing_of, evaluating, layers
from .defaults import CLIP, EPS, FLOOR
from .graph import graphs_of
from .journal import Journal, Record
from .replay import journal_header
from .step import LARGEST, apply_records, project

ROUNDOFF = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24}


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step saw and did: losses [E] in the order +, - of each direction, derivatives before clipping and
    coefficients applied to the raw noise, one per direction, and whether the step was skipped."""

    losses: list
    derivatives: list
    applied: list
    skipped: bool


class QZO(torch.optim.Optimizer):
    """Zeroth-order optimizer of a module's quantization scales; forward passes only, no state but the scales.

    Parameters
    ----------
    module : nn.Module with QZOLinear layers; those that train share its ScaleArena
    lr : learning rate; relative to the scales if `relative`
    eps : perturbation, in units of a scale if `relative` (default 1e-2), else absolute
    clip : bound C on the directional derivative (DDC); math.inf turns it off
    noise, relative, sharing : as in `Evaluations`
    directions : J, directions per step; a step makes 2 J evaluations
    seed : of the run; the seed of direction j at step t is Philox of (seed, t, j)
    journal : path of the journal to write, or None
    resume : continue an existing journal: its steps are replayed onto the module, which must be the untouched base
    paired : whether closures return all losses at once; `step` can override it
    floor : smallest magnitude of a scale; a scale keeps its sign, a zero stays zero
    recipe : JSON-able dict for the journal's header: what else a resumed run has to agree on
    max_skipped : consecutive steps with a NaN or infinite loss before `step` gives up
    large_rows : "fused", or "blas" for what `qzo.backend` describes, during the steps
    cuda_graph : run whole steps, update included, as CUDA graphs (graph.py): the same bits, without the cost of
        launching kernels one by one. None (the default): steps that are given their batch, where the scales are on a
        CUDA device. True: also those of a closure that comes again, which has to find each batch in the same tensors,
        and a warning where there is no such device. False: never. What cannot be captured runs without, after one
        warning that says why.

    Raises ValueError for values out of range, JournalError (a ValueError) for a journal that exists or does not fit.
    """

    def __init__(
        self,
        module,
        lr,
        eps=EPS,
        clip=CLIP,
        noise="rademacher",
        relative=True,
        sharing="group",
        directions=1,
        seed=0,
        journal=None,
        *,
        resume=False,
        paired=True,
        floor=FLOOR,
        max_skipped=10,
        recipe=None,
        large_rows="fused",
        cuda_graph=None,
    ):
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
        self.arena = arena_of(module, exact=True)
        self.paired, self.max_skipped = paired, max_skipped
        self.cuda_graph, self.graphs = cuda_graph, None
        self.last = None
        self._skipped_in_a_row, self._told = 0, False
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
        self.journal = None
        if journal is not None:
            header = journal_header(module, self.param_groups[0], recipe)
            self.journal = Journal.resume(journal, header) if resume else Journal.create(journal, header)
            for records in self.journal.steps:
                self._apply(records)
                self._count_skipped(records[0].skipped)
            self.param_groups[0]["step"] = len(self.journal.steps)

    def evaluations(self):
        """The Evaluations of the coming step: +eps and -eps of each direction in turn.

        RuntimeError when the layers have moved to another arena, where this optimizer would not reach them.
        """
        if any(layer.arena is not self.arena for layer in layers(self.module).values()):
            raise RuntimeError(
                "the layers have left this optimizer's arena (train_only, or a QZO of another module "
                "that shares them): make a new QZO"
            )
        group = self.param_groups[0]
        seeds = [step_seed(group["seed"], group["step"], j) for j in range(group["directions"]) for _ in range(2)]
        coefs = [sign * group["eps"] for _ in range(group["directions"]) for sign in (1, -1)]
        return Evaluations(seeds, coefs, group["noise"], group["relative"], group["sharing"]).to(self.arena.data.device)

    @torch.no_grad()
    def step(self, closure, paired=None, *, batch=None):
        """One step. closure(), or closure(batch), runs forward only.

        paired (the default): called once, returns the loss of each evaluation, [2 J], of a batch stacked 2 J times.
        paired=False: called 2 J times, each under one evaluation, returns a scalar.
        batch: a mapping of tensors and plain values. On a CUDA device a step is captured when (closure, names, shapes,
        dtypes, values) come for the second time and replayed from then on, with the batch copied into the tensors of
        the capture: so the closure is the same object in each step and finds all that changes in the batch, and a run
        has few shapes (`qzo.optim.graph.LIMIT` graphs are held).

        Returns the mean loss, a float. A NaN or infinite loss skips the step, which the journal records;
        FloatingPointError after `max_skipped` of them in a row. ValueError when the losses have another shape,
        TypeError when the batch is no mapping.
        """
        if batch is not None and not isinstance(batch, Mapping):
            raise TypeError(
                f"batch={type(batch).__name__}: a mapping of tensors is wanted, or none and a closure that "
                "knows its own"
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

    def _as_graph(self, closure, batch, paired):
        self.graphs = graphs_of(self)
        return None if self.graphs is None else self.graphs.step(closure, batch, paired)

    def rates(self):
        """(lr / J, 2 eps, clip) of the coming step, what `project` takes."""
        group = self.param_groups[0]
        return group["lr"] / group["directions"], 2 * group["eps"], group["clip"]

    def _finish(self, losses, derivatives, applied, updated=False):
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
        self._count_skipped(skipped)
        if self._skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row had a NaN or infinite loss (last: {losses}); {self._advice()}"
            )
        if skipped and not self._told:
            self._told = True
            warnings.warn(
                f"step {group['step'] - 1} had a NaN or infinite loss and changes nothing; if that goes on: "
                f"{self._advice()}",
                stacklevel=3,
            )
        return sum(losses) / len(losses)

    def _advice(self):
        """What to do about losses that are not finite; many models of bfloat16 leave float16's range."""
        group, first = self.param_groups[0], ""
        if any(p.dtype == torch.float16 for p in self.module.parameters()):
            first = (
                f"float16 activations end at {torch.finfo(torch.float16).max:g}: load the model in bfloat16 or "
                "float32 (--dtype bfloat16 or float32); else "
            )
        return f"{first}lower lr ({group['lr']:g}) or eps ({group['eps']:g}), or check the data"

    @contextlib.contextmanager
    def perturbed(self, evaluations):
        """What a closure runs in."""
        with ops.backend(large_rows=self.large_rows), evaluating(self.module, evaluations):
            yield

    def losses(self, closure, evaluations, paired):
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
        losses = []
        for e in range(len(evaluations)):
            with self.perturbed(evaluations[e : e + 1]):
                losses.append(torch.as_tensor(closure(), dtype=torch.float64))
            if losses[-1].numel() != 1:
                raise ValueError(
                    f"with paired=False the closure must return one number, the loss of the evaluation it "
                    f"runs under; got {list(losses[-1].shape)}"
                )
        return torch.stack([loss.view(()) for loss in losses])

    def _apply(self, records):
        """The update of one step from its records: what a replay does, too."""
        self.param_groups[0]["params"] = [self.arena.data]  # the arena may have moved to another device
        if not records[0].skipped:
            apply_records(self.arena, records, self.param_groups[0])

    def _count_skipped(self, skipped):
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0

    def close(self):
        """Flush and close the journal."""
        if self.journal is not None:
            self.journal.close()


def _check(good, name, got, wanted):
    if not good:
        raise ValueError(f"{name}={got!r}: {wanted} is wanted")


def _warn_if_rounded_away(module, arena, eps, relative):
    """Warn when the activations' rounding drowns L+ - L-.

    The rms error of L+ - L- over its rms size was measured near 1.25 * u / eps_relative, u the roundoff of the
    activations (4-layer network, eps 1e-3 and 1e-2, float16 and bfloat16).
    """
    dtypes = {p.dtype for p in module.parameters() if p.dtype in ROUNDOFF}
    if not dtypes or arena.data.is_meta:
        return
    dtype = max(dtypes, key=ROUNDOFF.get)
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
