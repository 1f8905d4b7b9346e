"""The training loop behind `qzo train` and `qzo demo`: data and a model in, an output folder out.

    OUT/journal.qzo    the fine-tune itself (journal.py)      OUT/curve.png   the loss over the steps
    OUT/metrics.jsonl  one line a step                        OUT/run.json    settings, results, versions
    OUT/model/         the tuned model in its source's format
"""
import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

from . import data, disk, many_rows
from .head import has_encoder
from .journal import read
from .layers import arena_of, codebooks, layers, train_codebooks_, train_only
from .optim import FLOOR, QZO
from .prefix import FrozenPrefix
from .task import Task

PAPER = dict(learning_rate=1e-7, eps=1e-3, clip=100.0, noise="gaussian", relative=False, floor=0.0, directions=1,
             batch_size=16, decay=1.0)
LEARNING_RATE_PER_DIRECTION = 2e-2     # relative; one pair over a small batch diverges at twice this
BUCKETS = "buckets/1, as on a CUDA device"      # what a journal says of batches padded so (buckets.py)
DECAY = 0.1                            # the learning rate falls linearly to this part of itself


@dataclasses.dataclass
class Settings:
    """What decides a run's result, beside the model and the data. `learning_rate` None: 2e-2 per direction.
    `cuda_graph` decides nothing of it, only how steps are launched; None: as graphs on a CUDA device. `large_rows`
    "auto" becomes "fused" in `fit` unless rounded weights are measured to keep the signal (many_rows.py)."""

    max_steps: int = 200
    batch_size: int = 8
    learning_rate: float | None = None
    eps: float = 1e-2
    clip: float = 5.0
    directions: int = 4
    noise: str = "rademacher"
    relative: bool = True
    sharing: str = "group"
    large_rows: str = "auto"
    sequential: bool = False
    floor: float = FLOOR
    decay: float = DECAY
    seed: int = 0
    train_layers: int | None = None
    max_length: int = 1024
    packing: str = "off"
    train_codebooks: bool = False
    cuda_graph: bool | None = None
    compile: bool = False

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "directions", "max_length"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: an int >= 1 is wanted")
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE_PER_DIRECTION * self.directions
        for name in ("seed", "train_layers"):
            if not _is_int(getattr(self, name)) and (name, self.train_layers) != ("train_layers", None):
                raise ValueError(f"{name}={getattr(self, name)!r}: an int is wanted")
        for name in ("learning_rate", "eps", "clip", "floor", "decay"):
            try:
                setattr(self, name, float(getattr(self, name)))      # YAML reads 1e-2 as a text
            except (TypeError, ValueError):
                raise ValueError(f"{name}={getattr(self, name)!r}: a number is wanted") from None
        for name in ("relative", "sequential", "train_codebooks", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: true or false is wanted")
        if not isinstance(self.cuda_graph, bool | None):
            raise ValueError(f"cuda_graph={self.cuda_graph!r}: true or false is wanted, or null (on a CUDA device)")

    def rate(self, step):
        """Learning rate of a step: linear from learning_rate to decay * learning_rate."""
        return self.learning_rate * (1 - (1 - self.decay) * step / self.max_steps)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


class Interrupted(Exception):
    """Ctrl-C between two steps; `steps` are in the journal."""

    def __init__(self, steps):
        super().__init__(steps)
        self.steps = steps


def choose_layers(model, train_layers, codebooks=False):
    """Restrict training to the top blocks; returns their FrozenPrefix, or None for the whole model. codebooks: train
    those of AQLM layers too."""
    prefix = None if train_layers is None else FrozenPrefix(model, train_layers)
    if prefix is not None and not any(prefix.trains(name) for name in layers(model, trainable=None)):
        raise ValueError(f"the top {train_layers} blocks hold no 4-bit layer: nothing would train")
    train_only(model, prefix.trains if prefix else lambda name: True)
    if codebooks:
        train_codebooks_(model)
    return prefix


def fit(task, settings, out, resume=False, show=None):
    """Train the model of `task` into the folder `out`; returns the number of steps that were already there.

    Writes journal.qzo and metrics.jsonl as it goes. Interrupted on Ctrl-C, FloatingPointError when losses stay NaN,
    JournalError for a journal that exists (without resume) or does not fit.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if settings.batch_size > len(task.examples):
        raise ValueError(f"batch_size={settings.batch_size}, but there are {len(task.examples)} training examples")
    if task.prefix is not None:
        batch = data.collate(task.examples[:2], task.pad_id, task.device)
        task.prefix.check({key: batch[key] for key in ("input_ids", "attention_mask")})
    task.settle()
    if settings.large_rows == "auto":
        settings.large_rows = _settle_large_rows(task, settings, out / "journal.qzo" if resume else None, show)
    optimizer = QZO(task.model, settings.learning_rate, settings.eps, settings.clip, settings.noise, settings.relative,
                    settings.sharing, settings.directions, settings.seed, journal=out / "journal.qzo", resume=resume,
                    floor=settings.floor, recipe=recipe(task, settings), large_rows=settings.large_rows,
                    paired=not settings.sequential, cuda_graph=settings.cuda_graph)
    start = optimizer.param_groups[0]["step"]
    at_once = 1 if settings.sequential else 2 * settings.directions

    def losses(batch):
        return task.compiled_losses(batch, at_once)

    try:
        with (disk.naming(out), _metrics(out / "metrics.jsonl", start) as metrics,
              Progress(settings.max_steps, start, show) as progress):
            for step in range(start, settings.max_steps):
                begun = time.perf_counter()
                indices = task.indices(step, settings.batch_size, settings.seed)
                rate = optimizer.param_groups[0]["lr"] = settings.rate(step)
                loss = optimizer.step(losses, batch=task.batch(indices, at_once))
                line = {"step": step, "loss": loss, "derivative": max(map(abs, optimizer.last.derivatives)), "lr": rate,
                        "skipped": optimizer.last.skipped, "seconds": round(time.perf_counter() - begun, 4)}
                metrics.write(json.dumps(_finite(line)) + "\n")
                metrics.flush()
                progress.step(line)
    except KeyboardInterrupt:
        raise Interrupted(optimizer.param_groups[0]["step"]) from None
    finally:
        optimizer.close()
    return start


def _settle_large_rows(task, settings, journal, show):
    """"auto" or "fused" for a run that asks for "auto"; journal: of a run that goes on, or None."""
    found = read(journal) if journal is not None else None
    recorded = None if found is None else found[0].get("recipe", {}).get("large_rows", "fused")

    def measure():
        batch = task.batch(task.indices(0, settings.batch_size, settings.seed), 2)
        return many_rows.lost(task.model, lambda: task.compiled_losses(batch, 2), settings.eps, settings.noise,
                              settings.relative, settings.sharing, settings.seed)

    value, part = many_rows.settle(task.device, measure, recorded)
    if show is not False and many_rows.said(value, part):
        print(many_rows.said(value, part), file=sys.stderr, flush=True)
    return value


def recipe(task, settings):
    """What a resumed run has to share with the one it continues, beside what the optimizer's header holds."""
    digest = hashlib.sha256(repr(task.examples).encode()).hexdigest()
    kept = ("max_steps", "batch_size", "learning_rate", "decay", "train_layers", "max_length",
            "sequential", "packing")
    bits = {"padding": BUCKETS} if task.bucketed else {}
    bits["large_rows"] = many_rows.NAMES.get(settings.large_rows, settings.large_rows)
    if settings.compile:
        bits["compile"] = True
    return {**{name: getattr(settings, name) for name in kept}, "data": "sha256:" + digest, **bits}


class _metrics:
    """metrics.jsonl, open for the next step: lines at or beyond `start`, and a line cut short, are dropped."""

    def __init__(self, path, start):
        kept = []
        if start and path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < start:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError, TypeError):
                    break
        write_text(path, "".join(line + "\n" for line in kept))
        self.path = path

    def __enter__(self):
        self.file = open(self.path, "a")
        return self.file

    def __exit__(self, *_):
        self.file.close()


class Progress:
    """A tqdm bar on a terminal, else a plain line every few seconds; both on standard error.

    show: None (on), False (nothing).
    """

    EVERY_SECONDS = 10.0

    def __init__(self, total, start, show=None):
        self.total, self.shown, self.bar = total, show is not False, None
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
        self.last = time.monotonic()
        self.mean = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def step(self, line):
        """Show a finished step; the loss shown is a running mean."""
        if not line["skipped"]:
            self.mean = line["loss"] if self.mean is None else 0.9 * self.mean + 0.1 * line["loss"]
        text = f"loss {self.mean:.3f}, |d| {line['derivative']:.2f}" if self.mean is not None else "no finite loss yet"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.shown and (time.monotonic() - self.last > self.EVERY_SECONDS or line["step"] + 1 == self.total):
            self.last = time.monotonic()
            print(f"step {line['step'] + 1}/{self.total}: {text}", file=sys.stderr, flush=True)


def build_task(model, records, tokenizer, settings, prefix):
    """Records -> Task on the model."""
    compiled = None
    if settings.compile:
        from .compiled import Compiled  # it imports the compiler
        compiled = Compiled(model)
    examples = data.tokenize(records, tokenizer, settings.max_length, encoder=has_encoder(model))
    return Task(model, examples, pad_id(tokenizer), prefix, settings.packing, compiled=compiled)


def pad_id(tokenizer):
    """A token for padding; padded positions are masked, so any will do where the tokenizer names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def write_results(out, settings, results):
    """run.json and curve.png of a finished run."""
    out = Path(out)
    record = _finite({"settings": dataclasses.asdict(settings), **results})
    write_text(out / "run.json", json.dumps(record, indent=1) + "\n")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    draw_curve(out / "curve.png", lines, results)


def draw_curve(path, lines, results):
    """The loss of each step, its running mean, and the evaluations before and after."""
    from matplotlib.figure import Figure  # imported here: no other command needs it

    steps = [line["step"] for line in lines if line["loss"] is not None]
    values = [line["loss"] for line in lines if line["loss"] is not None]
    window = max(1, len(values) // 20)
    means = [statistics.fmean(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="0.8", linewidth=0.8, label="batch")
    axes.plot(steps, means, color="C0", label=f"mean of {window} steps")
    for name, style in (("zero_shot", ":"), ("control", "--"), ("before", ":"), ("tuned", "-")):
        if results.get(name):
            axes.axhline(results[name]["loss"], color="C1", linestyle=style, linewidth=1,
                         label=f"held out, {name.replace('_', '-')}")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    with disk.naming(path):
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)


def write_text(path, text):
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _finite(value):
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def trained_count(model):
    """How many scales train."""
    slots = arena_of(model).slots
    return sum(slots[name].groups * slots[name].outputs for name in layers(model))


def trained_text(model):
    """"1,234 scales", or "1,234 scales and 5,678 numbers of codebooks"."""
    entries = sum(books.numel() for books in codebooks(model).values())
    return f"{trained_count(model):,} scales" + (f" and {entries:,} numbers of codebooks" if entries else "")
