"""The training loop behind `qzo train` and `qzo demo`: data and a model in, an output folder out.

OUT/journal.qzo    the fine-tune itself (journal.py)      OUT/curve.png   the loss over the steps
OUT/metrics.jsonl  one line a step                        OUT/run.json    settings, results, versions
OUT/model/         the tuned model in its source's format
"""

import collections
import dataclasses
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from ..loss.head import has_encoder
from ..nn.layers import arena_of, codebooks, layers, train_codebooks_, train_only_
from ..nn.tensor_parallel import is_sharded
from ..optim.journal import Journal, read
from ..optim.optimizer import QZO
from ..system import disk
from ..system.ranks import Ranks
from ..system.stopping import Interrupted, status_of
from . import data
from . import large_rows as many_rows
from .auto_rate import measured_rate
from .compiled import Compiled
from .folder import Metrics, finite
from .prefix import FrozenPrefix
from .progress import Progress
from .schedule import planned_steps, schedule
from .settings import RATE, Settings
from .task import Measure, Task
from .validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUCKETS = "buckets/1, as on a CUDA device"  # what a journal says of batches padded so (buckets.py)
Found = TypeVar("Found")


class Trainable(Protocol):
    """What a run asks of its data and model: a Task (task.py) here, one of pictures in diffusion/task.py.

    examples : as many as there are
    bucketed : batches are padded to a few shapes
    """

    model: Any
    device: torch.device
    bucketed: bool

    @property
    def examples(self) -> Sized: ...

    @property
    def classes(self) -> tuple[int, ...] | None:
        """The options of a classification, whose label biases may be fitted; None of anything else."""
        ...

    def check(self) -> None:
        """ValueError for what the model cannot be trained on so, before the run begins."""

    def settle(self) -> object:
        """Decide what is open, on the scales as they are: a resumed run has to decide as the unbroken one did."""

    def fingerprint(self) -> str:
        """A text that differs where the data do, or what is drawn of them."""
        ...

    def indices(self, step: int, batch_size: int, seed: int) -> Any:
        """What the batch of a step is made of."""

    def batch(self, indices: Any, count: int, among: Any = None) -> data.Batch:
        """The batch for `count` evaluations, stacked. among: the whole step's, of which `indices` are a rank's part."""
        ...

    def compiled_losses(self, batch: data.Batch, count: int) -> torch.Tensor:
        """The loss of each of `count` evaluations over a batch, float32 [count]."""
        ...

    def compiled_sums(self, batch: data.Batch, count: int, centred: bool = False) -> torch.Tensor:
        """The same as `loss_sums` has them, float64 [count, S]. centred: of a classification alone."""
        ...

    def evaluate(self, batch_size: int = 32, fitted: bool = False) -> Measure:
        """What the model as it is has of the examples. fitted: of a classification alone."""
        ...

    def notes(self) -> dict[str, Any]:
        """What the metrics of the step just made say beside the loop's own."""
        ...


def choose_layers(model: "PreTrainedModel", train_layers: int | None, codebooks: bool = False) -> FrozenPrefix | None:
    """Restrict training to the top blocks; returns their FrozenPrefix, or None for the whole model. codebooks: train
    those of AQLM layers too."""
    prefix = None if train_layers is None else FrozenPrefix(model, train_layers)
    if prefix is not None and not any(prefix.trains(name) for name in layers(model, trainable=None)):
        raise ValueError(f"the top {train_layers} blocks hold no 4-bit layer: nothing would train")
    train_only_(model, prefix.trains if prefix else lambda name: True)
    if codebooks:
        train_codebooks_(model)
    return prefix


def fit(
    task: Trainable,
    settings: Settings,
    out: str | Path,
    resume: bool = False,
    show: bool | None = None,
    validation: Validation | None = None,
    after: Callable[[int], object] = lambda steps: None,
) -> int:
    """Train the model of `task` into the folder `out`; returns the number of steps that were already there.

    Writes journal.qzo and metrics.jsonl as it goes. show: False for no word of it. validation: measured on the way; a
    run that has run out of its patience ends. after: called when each step is in the journal, with how many are.
    Interrupted on Ctrl-C, SIGTERM or SIGUSR1; FloatingPointError when losses stay NaN; JournalError for a journal that
    exists (without resume) or does not fit.

    Where torch.distributed's default group is initialized, all its ranks call this: each makes its share of the steps
    (settings.parallel) and takes all of them, and the first alone reads and writes in `out`. RanksDiffer, RanksDiverged
    as `QZO` has them.
    """
    out, ranks = Path(out), Ranks()
    show = show if ranks.first else False
    ranks.check_same({"settings": finite(dataclasses.asdict(settings))})
    check_batch_size(settings, len(task.examples))
    task.check()
    task.settle()
    planned, recorded = ranks.from_first(lambda: _began(settings, out / "journal.qzo" if resume else None))
    settings.learning_rate = _as_the_first(task, ranks, lambda: _settled_rate(task, settings, recorded, show))
    settings.large_rows = _as_the_first(task, ranks, lambda: _settled_large_rows(task, settings, recorded, show))
    optimizer = _optimizer(task, settings, out / "journal.qzo", resume, planned)
    start = optimizer.evaluated
    try:
        with (
            disk.naming(out),
            Metrics(out / "metrics.jsonl" if ranks.first else None, start) as metrics,
            Progress(settings.max_steps, start, show) as progress,
        ):
            if validation is not None:
                validation.recall(ranks.from_first(lambda: metrics.lines))
            for line in _steps(task, settings, optimizer, planned, validation):
                metrics.write(line)
                if line["step"] >= start:
                    progress.step(line)
                    after(line["step"] + 1)
            if settings.check_every:
                optimizer.check_ranks()
    except KeyboardInterrupt as stop:
        raise Interrupted(max(start, optimizer.param_groups[0]["step"]), status_of(stop)) from None
    finally:
        optimizer.close()
    return start


def _began(settings: Settings, journal: Path | None) -> tuple[int, dict[str, Any] | None]:
    """(planned steps, the recipe that its journal holds) of a run that goes on; of another its own steps, and None."""
    found = read(journal) if journal is not None and journal.exists() else None
    return planned_steps(settings, journal), None if found is None else found[0].get("recipe", {})


def _as_the_first(task: Trainable, ranks: Ranks, measured: Callable[[], Found]) -> Found:
    """What the first rank measured, alone or, where forwards need the parts of all, with them."""
    if not is_sharded(task.model):
        return ranks.from_first(measured)
    found = measured()
    return ranks.from_first(lambda: found)


def _settled_rate(task: Trainable, settings: Settings, recorded: dict[str, Any] | None, show: bool | None) -> float:
    """The learning rate of a run, which the `recorded` recipe of one that goes on decides where none is given."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    if recorded is not None and recorded.get("learning_rate") is not None:
        return float(recorded["learning_rate"])
    if not (isinstance(task, Task) and fits_biases(task, settings) and settings.relative):
        return RATE * settings.directions
    rate = measured_rate(task, settings)
    if show is not False:
        print(f"learning rate {rate:g}, measured (--learning-rate: another)", file=sys.stderr, flush=True)
    return rate


def line_of(journal: Journal | None, step: int) -> dict[str, Any]:
    """What the journal that a run goes on from knows of a step whose line of metrics a kill came before."""
    assert journal is not None
    losses = [loss for record in journal.steps[step] for loss in (record.loss_plus, record.loss_minus)]
    return {"step": step, "loss": statistics.fmean(losses), "skipped": journal.steps[step][0].skipped}


def check_batch_size(settings: Settings, examples: int) -> None:
    """ValueError for a batch that needs more examples than there are."""
    if settings.batch_size > examples:
        raise ValueError(f"batch_size={settings.batch_size}, but there are {examples} training examples")


def _optimizer(task: Trainable, settings: Settings, journal: Path, resume: bool, planned: int) -> QZO:
    """The QZO of a run, its model where the journal left it."""
    assert settings.learning_rate is not None  # `fit` has filled it in
    return QZO(
        task.model,
        settings.learning_rate,
        settings.eps,
        settings.clip,
        settings.noise,
        settings.relative,
        settings.sharing,
        settings.directions,
        settings.seed,
        journal=journal,
        resume=resume,
        one_sided=bool(settings.one_sided),
        floor=settings.floor,
        recipe=recipe(task, settings, planned),
        large_rows=settings.large_rows,
        paired=not settings.sequential,
        cuda_graph=settings.cuda_graph,
        parallel=settings.parallel,
        check_every=settings.check_every,
        staleness=settings.staleness,
        journal_fsync=settings.journal_fsync,
    )


def _steps(
    task: Trainable, settings: Settings, optimizer: QZO, planned: int, validation: Validation | None
) -> Iterator[dict[str, Any]]:
    """Make the steps that are left, or as many as validation has patience for; yields a line of metrics after each.

    With `staleness` a turn evaluates a step and takes another: those that the journal holds already are taken again,
    without a line, and those that are ahead when the patience ends are never taken.
    """
    share, start = optimizer.share, optimizer.evaluated
    at_once = 1 if settings.sequential else len(range(settings.evaluations)[share.mine])
    centred = fits_biases(task, settings)
    rates, ahead = schedule(optimizer, settings, planned), collections.deque[tuple[Any, dict[str, Any]]]()

    def sums(batch: data.Batch) -> torch.Tensor:  # one object for all steps: a captured step is found by it
        return task.compiled_sums(batch, at_once, centred)

    def evaluate(step: int) -> float:
        """The step's rate and notes go to `ahead`; returns the loss of the step that is taken."""
        indices = task.indices(step, settings.batch_size, settings.seed)
        part = (indices, at_once) if share.parts == 1 else (indices[share.rows(len(indices))], at_once, indices)
        [rate], loss = rates.get_last_lr(), optimizer.step(sums, batch=task.batch(*part))
        rates.step()
        ahead.append((rate, task.notes()))
        return loss

    yield from _caught_up(optimizer, settings, validation, start)
    for turn in range(start, settings.max_steps + settings.staleness):
        if validation is not None and validation.exhausted:
            break
        begun = time.perf_counter()
        loss = evaluate(turn) if turn < settings.max_steps else optimizer.take()
        step = optimizer.param_groups[0]["step"] - 1
        if step < start:
            yield from _caught_up(optimizer, settings, validation, start)
            continue
        assert optimizer.last is not None
        rate, notes = ahead.popleft()
        line: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "derivative": max(map(abs, optimizer.last.derivatives)),
            "lr": rate,
            "skipped": optimizer.last.skipped,
            "seconds": round(time.perf_counter() - begun, 4),
            **notes,
        }
        found = None if validation is None else validation.after(step + 1, last=step + 1 == settings.max_steps)
        yield line if found is None else {**line, "valid": found}
    if optimizer.evaluated == start:
        optimizer.drain()


def _caught_up(
    optimizer: QZO, settings: Settings, validation: Validation | None, start: int
) -> Iterator[dict[str, Any]]:
    """The line of the last step that the journal held when the run went on, if a kill came before its validation."""
    if validation is None or optimizer.param_groups[0]["step"] != start:
        return
    found = validation.catch_up(start, last=start == settings.max_steps)
    if found is not None and optimizer.journal is not None:  # that of the first rank
        yield {**line_of(optimizer.journal, start - 1), "valid": found}


def _settled_large_rows(task: Trainable, settings: Settings, recorded: dict[str, Any] | None, show: bool | None) -> str:
    """What a run asks for, of "auto" that or "fused". recorded: the recipe of a run that goes on, or None."""
    if settings.large_rows != "auto":
        return settings.large_rows

    def measure() -> float:
        batch = task.batch(task.indices(0, settings.batch_size, settings.seed), 2)
        return many_rows.lost(
            task.model,
            lambda: task.compiled_losses(batch, 2),
            settings.eps,
            settings.noise,
            settings.relative,
            settings.sharing,
            settings.seed,
        )

    before = None if recorded is None else recorded.get("large_rows", "fused")
    value, part = many_rows.settle(task.device, measure, before)
    if show is not False and many_rows.said(value, part):
        print(many_rows.said(value, part), file=sys.stderr, flush=True)
    return value


def fits_biases(task: Trainable, settings: Settings) -> bool:
    """Whether label biases are fitted when the run has ended, and its steps learn the rest (label_bias.py)."""
    return settings.label_bias == "fit" and task.classes is not None


def recipe(task: Trainable, settings: Settings, planned: int) -> dict[str, Any]:
    """What a resumed run has to share with the one it continues, beside what the optimizer's header holds."""
    digest = hashlib.sha256(task.fingerprint().encode()).hexdigest()
    kept = ("batch_size", "learning_rate", "decay", "train_layers", "max_length", "sequential", "packing")
    bits: dict[str, Any] = {"padding": BUCKETS} if task.bucketed else {}
    bits["large_rows"] = many_rows.NAMES.get(settings.large_rows, settings.large_rows)
    if settings.compile:
        bits["compile"] = True
    if fits_biases(task, settings):
        bits["label_bias"] = settings.label_bias
    return {
        "max_steps": planned,
        **{name: getattr(settings, name) for name in kept},
        "data": "sha256:" + digest,
        **bits,
    }


def build_task(
    model: "PreTrainedModel",
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    settings: Settings,
    prefix: FrozenPrefix | None,
) -> Task:
    """Records -> Task on the model. ValueError as data.tokenize and Task have it."""
    compiled = None
    if settings.compile:
        compiled = Compiled(model)
    examples = data.tokenize(
        records,
        tokenizer,
        settings.max_length,
        encoder=has_encoder(model),
        text_eos=settings.text_eos,
        max_cut=settings.max_cut,
        chat_loss=settings.chat_loss,
    )
    return Task(model, examples, pad_id(tokenizer), prefix, settings.packing, compiled=compiled)


def pad_id(tokenizer: Any) -> int:
    """A token for padding; padded positions are masked, so any will do where the tokenizer names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def trained_count(model: "PreTrainedModel") -> int:
    """How many scales train."""
    slots = arena_of(model).slots
    return sum(slots[name].groups * slots[name].outputs for name in layers(model))


def trained_text(model: "PreTrainedModel") -> str:
    """ "1,234 scales", or "1,234 scales and 5,678 numbers of codebooks"."""
    entries = sum(books.numel() for books in codebooks(model).values())
    return f"{trained_count(model):,} scales" + (f" and {entries:,} numbers of codebooks" if entries else "")
