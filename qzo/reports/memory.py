"""`qzo memory`: what a fine-tune holds in memory, predicted from the config alone and measured on a run.

Codes, scales, zero points and dense parameters are what a model holds between steps; activations, logits and workspace
are what a step adds at its highest moment, so that the parts add up to the total. GB is 1e9 bytes.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.load import from_pretrained
from ..checkpoints.source import open_checkpoint
from ..kernels.noise import step_seed
from ..kernels.tiles import architecture
from ..kernels.update import scratch_bytes
from ..nn.choice import choose, group_for
from ..nn.evaluations import Evaluations
from ..nn.experts import split_experts_
from ..nn.layers import arena_of, evaluating, layers, train_codebooks_, train_only_
from ..nn.ops import backend
from ..nn.streaming.offload import offload_of
from ..nn.streaming.stores import FileStore
from ..optim.optimizer import QZO
from ..system.memory import free_bytes
from . import models
from .codes import CODES
from .footprint import (
    DeviceMeter,
    Ledger,
    ResidentMeter,
    Span,
    Spans,
    check_chip,
    library_bytes,
    map_large_blocks,
    parts_of,
    weights_bytes,
)
from .rivals import CARDS as CARDS
from .rivals import fits, rivals
from .streamed import streamed_bytes

Load = Callable[[], Any]  # -> a model, on the device that is measured
PARTS = ("codes", "scales", "zeros", "dense", "activations", "logits", "workspace")
MOST_ROWS = 1 << 16  # in all directions; the loss of a step is predicted chunk by chunk


@dataclasses.dataclass(frozen=True)
class Run:
    """The step that is predicted or measured: `rows` rows of `tokens` tokens, `labels` of them labelled, under
    2 * directions evaluations at once, or one after another if `sequential`. large_rows: as in QZO."""

    rows: int = 1
    tokens: int = 64
    labels: int = 1
    directions: int = 1
    sequential: bool = False
    large_rows: str = "fused"

    @property
    def evaluations(self) -> int:
        """How many run at once."""
        return 1 if self.sequential else 2 * self.directions


# ---------------------------------------------------------------------------------------------- predicted


def predict(model: Any, run: Run, device: str, chip: str, offload: str | None = None) -> dict[str, Any]:
    """{part: bytes, "total", "phases"} of a model on the meta device, without a weight.

    offload: "cpu" or "disk", where blocks stream from; there are "host" and "disk" then, bytes beside the total.
    """
    model.to("meta")
    labelled = run.rows * run.labels * run.evaluations
    ledger = Ledger(device, chip, labelled, padded=run.rows > 1, threads=torch.get_num_threads())
    weights = weights_bytes(model, device)
    beside: dict[str, int] = {}
    if offload is not None:
        weights, beside = streamed_bytes(model, weights, device, offload)
    ledger.know(t for layer in layers(model, None).values() for t in (layer.codes, layer.zeros) if t is not None)
    ledger.know((*model.parameters(), *model.buffers(), *(layer.arena.data for layer in layers(model, None).values())))
    ledger.hold(sum(weights.values()) + library_bytes(device, chip))
    spans = Spans(model, models.body_of(model), ledger)
    with torch.no_grad(), backend(large_rows=run.large_rows), ledger:
        batch = models.example_batch(model, run.rows, run.tokens, run.labels, "meta")
        resident = ledger.current()
        with spans.watching():
            for evaluations in _evaluations(run):
                with evaluating(model, evaluations.to("meta")):
                    models.batch_losses(model, batch, len(evaluations))
            spans.enter("update")
            if device == "cpu":
                ledger.brush(scratch_bytes(arena_of(model).data.numel() // 4))
    return _composed(weights, resident, spans) | beside


def predict_loaded(model: Any, run: Run, trust_remote_code: bool = False, latent: int | None = None) -> dict[str, Any]:
    """What `predict` gives of a model that is loaded, on its device, with the layers that train there. latent: edge of
    a diffusion transformer's latents; None: its config's.

    ValueError or RuntimeError for one whose forward cannot run without values.
    """
    device = next(model.parameters()).device.type
    found = layers(model, trainable=None)
    empty = models.empty_like(model, trust_remote_code, latent)
    split_experts_(empty)
    forms = {name: models.form_of(layer) for name, layer in found.items()}
    models.quantize_empty(empty, forms, cpu=device == "cpu")
    train_only_(empty, lambda name: found[name].trainable)
    offloaded = offload_of(model)
    to = None if offloaded is None else "disk" if isinstance(offloaded.store, FileStore) else "cpu"
    return predict(empty, run, device, this_chip(), to)


def _evaluations(run: Run) -> list[Evaluations]:
    seeds = [step_seed(0, 0, j) for j in range(run.directions) for _ in range(2)]
    stacked = Evaluations(seeds, [1e-2, -1e-2] * run.directions)
    return [stacked[e : e + 1] for e in range(len(stacked))] if run.sequential else [stacked]


def _composed(weights: Mapping[str, int], resident: int, spans: Spans) -> dict[str, Any]:
    """The report's numbers: what a step's highest moment consists of."""
    top = max(spans.found, key=lambda span: span.peak)
    most = top.peak
    if (
        top.phase == "loss"
    ):  # its peaks are alike: which is the very highest is noise of a few pages, where it begins not
        alike = (span for span in spans.found if span.phase == "loss" and span.peak > 0.99 * most)
        top = max(alike, key=lambda span: span.before)
    parts = {**weights, **parts_of(top, resident)}
    parts["workspace"] += resident - sum(weights.values()) + most - top.peak  # libraries' own, and the batch
    highest: dict[str, Span] = {}
    for span in spans.found:
        if span.phase not in highest or span.peak > highest[span.phase].peak:
            highest[span.phase] = span
    phases = {phase: {"total": span.peak, "layer": span.layer} for phase, span in highest.items()}
    return {**parts, "total": most, "phases": phases}


# ---------------------------------------------------------------------------------------------- measured


def measure(load: Load, run: Run, device: str, snapshot: str | None = None) -> dict[str, Any]:
    """The same numbers read off a device in the second step of a run. load() -> model on `device`.

    On a GPU from torch's allocator. On a CPU from the resident set, less what is resident before `load` in a process
    that has run such a step once: what the libraries then keep for themselves does not grow with the model.
    Also "slack", which no tensor uses: on a GPU what the allocator keeps beyond the peak, on a CPU the libraries' own.
    snapshot: file for the CUDA allocator's history, written also where memory does not suffice.
    """
    meter: ResidentMeter | DeviceMeter
    if device == "cpu":
        meter = ResidentMeter()
        _step(load, run, device, meter)
        libraries, meter = meter.settled(), ResidentMeter()
        return {**_composed(*_step(load, run, device, meter)), "slack": libraries}
    meter = DeviceMeter(device)
    if snapshot:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        measured = _composed(*_step(load, run, device, meter))
    finally:
        if snapshot:
            torch.cuda.memory._dump_snapshot(snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
    return {**measured, "slack": torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)}


def _step(load: Load, run: Run, device: str, meter: ResidentMeter | DeviceMeter) -> tuple[dict[str, int], int, Spans]:
    """Two steps, the second cut in spans: (what the weights held, resident before the step, spans)."""
    model = load()
    batch = models.example_batch(model, run.rows, run.tokens, run.labels, device)
    optimizer = QZO(model, lr=1e-6, directions=run.directions, paired=not run.sequential, large_rows=run.large_rows)
    spans = Spans(model, models.body_of(model), meter)

    def closure() -> torch.Tensor:
        losses = models.batch_losses(model, batch, run.evaluations)
        return losses[0] if run.sequential else losses

    def watched() -> torch.Tensor:
        losses = closure()
        spans.enter("update")
        return losses

    optimizer.step(closure)
    resident = meter.settled()
    with spans.watching():
        optimizer.step(watched)
    return _released(model, meter), resident, spans


def _released(model: Any, meter: ResidentMeter | DeviceMeter) -> dict[str, int]:
    """{"codes", ...}: what each leaves free when it is let go. The model is of no use afterwards."""
    found = list(layers(model, trainable=None).values())
    freed, before = {}, meter.settled()

    def done(part: str) -> None:
        nonlocal before
        now = meter.settled()
        freed[part], before = before - now, now

    for layer in found:
        layer.codes = None  # type: ignore[assignment]  # the layer is of no use afterwards
    done("codes")
    for layer in found:
        layer.zeros = None
    done("zeros")
    for layer in found:
        layer.arena.data.untyped_storage().resize_(0)
    done("scales")
    for module in model.modules():
        module._parameters.clear()
        module._buffers.clear()
    done("dense")
    return {part: freed[part] for part in ("codes", "scales", "zeros", "dense")}


# ---------------------------------------------------------------------------------------------- the report


def make_report(options: argparse.Namespace) -> dict[str, Any]:
    """The dict that --json prints."""
    if bool(options.config) == bool(options.model):
        raise ValueError("give either --config (nothing is loaded) or --model (a checkpoint, loaded and measured)")
    measuring = (options.measure or bool(options.model)) and not options.offload
    if options.measure and options.offload:
        raise ValueError("--measure with --offload: offloaded, a step is only predicted; leave one out")
    device = options.device or ("cuda" if torch.cuda.is_available() or not measuring else "cpu")
    if measuring and device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here to measure on; use --device cpu")
    if options.snapshot and not (measuring and device == "cuda"):
        raise ValueError("--snapshot needs a run that is measured on a CUDA device")
    if measuring and device == "cpu":
        map_large_blocks()
    chip = check_chip(options.chip or this_chip())
    dtype = getattr(torch, options.dtype or ("float16" if device == "cuda" else "float32"))
    _check_step(options)
    codes = _codes(options)
    if options.model:
        if options.resolution is not None:
            raise ValueError(f"--resolution {options.resolution} is of a --config of an image model")
        load, model = _checkpoint(options, codes, device, dtype)
    else:
        config = models.sized(models.read_config(options.config), options.resolution)
        load, model = random_model(config, options.group_size, options.zeros, device, dtype, codes)
    if options.train_codebooks:
        train_codebooks_(model)
        load = _training_codebooks(load)
    run = Run(
        options.batch_size,
        options.seq_len or models.usual_tokens(model),
        options.labels,
        options.directions,
        options.sequential,
        options.large_rows,
    )
    predicted, free = predict(model, run, device, chip, options.offload), free_bytes(device)
    if measuring:
        _check_room(options.config or options.model, predicted["total"], device, free)
    measured = measure(load, run, device, snapshot=options.snapshot) if measuring else None
    subject = (
        f"{options.config or options.model}: {run.rows} x {run.tokens} tokens{_pixels(options)}, "
        f"{2 * run.directions} evaluations "
        f"{'one after another' if run.sequential else 'at once'}, {device}, {str(dtype).removeprefix('torch.')}"
        + (f", {codes} codes" if options.config and codes != "int4" else "")
        + (", random weights" if measuring and options.config else "")
        + (f", offloaded to {options.offload}" if options.offload else "")
    )
    return {
        "predicted": predicted,
        "measured": measured,
        "rivals": rivals(model, run.rows, run.tokens, run.evaluations, predicted),
        "fits": fits(max(predicted["total"], measured["total"] if measured else 0)),
        "free": free,
        "subject": subject,
    }


def _pixels(options: argparse.Namespace) -> str:
    return f" and {options.resolution} x {options.resolution} pixels" if options.resolution else ""


def _check_step(options: argparse.Namespace) -> None:
    """ValueError for a step that none can be, or that would be predicted for hours."""
    for name, least in {"batch_size": 1, "labels": 1, "directions": 1, "seq_len": 2}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if options.batch_size * options.directions > MOST_ROWS:
        raise ValueError(
            f"--batch-size {options.batch_size} in --directions {options.directions}: up to {MOST_ROWS:,} rows of a "
            "step are predicted, give fewer"
        )


def _check_room(name: str, total: int, device: str, free: int | None) -> None:
    """ValueError where a run of `total` bytes would not end. free: bytes, None if that is not known."""
    if free is not None and total > free:
        raise ValueError(
            f"{name}: a step is predicted to take {total / 1e9:.2f} GB, and {device} has {free / 1e9:.2f} GB free, so "
            "nothing was loaded; measure it where there is more, or predict it only: qzo memory --config CONFIG, "
            "without --measure"
        )


def _training_codebooks(load: Load) -> Load:
    def loaded() -> Any:
        model = load()
        train_codebooks_(model)
        return model

    return loaded


def _codes(options: argparse.Namespace) -> str:
    """The name in CODES that --bits or --codes means. ValueError for both, and for zero points beside a table."""
    if options.bits and options.codes:
        raise ValueError(f"--bits {options.bits} and --codes {options.codes}: give one of the two")
    codes = options.codes or f"int{options.bits or 4}"
    if CODES[codes].lookup and options.zeros != "none":
        raise ValueError(
            f"--zeros {options.zeros}: {codes} codes stand for entries of a table or codebooks and have "
            "no zero points; leave --zeros out"
        )
    if CODES[codes].books and (options.model or options.group_size):
        raise ValueError(
            f"--codes {codes}: random weights of a --config can be such, one scale to a row (no "
            "--group-size); nothing quantizes a --model to vectors, and an AQLM one needs no --codes"
        )
    return codes


def this_chip() -> str:
    """Of this machine's GPU; sm_90 where there is none."""
    if torch.cuda.is_available():
        return architecture("cuda")
    return "sm_90"


def random_model(
    config: str | Path | dict[str, Any],
    group_size: int | None,
    zeros: str,
    device: str,
    dtype: torch.dtype,
    codes: str = "int4",
) -> tuple[Load, Any]:
    """(load() -> the config's model with random weights on `device`, the same on the meta device). config: as
    models.read_config takes and gives it."""
    read, kind = config if isinstance(config, dict) else models.read_config(config), CODES[codes]

    def empty() -> Any:
        model = models.empty_model(read, dtype)
        wanted = {
            name: models.Form(layer.group_size, models.ZEROS[zeros], kind.bits, kind.table, books=kind.books)
            for name, layer in choose(model, group_for(model, group_size or kind.group), table=kind.table).items()
        }
        return models.quantize_empty(model, wanted, cpu=device == "cpu")

    return lambda: models.fill_random(empty(), device), empty()


def _checkpoint(options: argparse.Namespace, codes: str, device: str, dtype: torch.dtype) -> tuple[Load, Any]:
    """(load() -> the checkpoint's model, a float one quantized as the options say; the same on the meta device, for
    which a tensor at a time is read, or none)."""
    kind, trusted = CODES[codes], {"trust_remote_code": bool(options.trust_remote_code)}
    group = options.group_size or kind.group
    given: dict[str, Any] = {
        "bits": kind.bits,
        "table": kind.table,
        **({"group_size": group} if group else {}),
        **trusted,
    }
    checkpoint = open_checkpoint(options.model, trusted["trust_remote_code"])
    empty = models.build_empty(checkpoint.config, dtype, **trusted).eval()
    if checkpoint.quantized:
        wanted = models.stored_forms(empty, checkpoint.read(None), options.model)
    else:
        split_experts_(empty)
        chosen = choose(empty, group or 128, table=kind.table, quiet=True)  # the load tells what does not fit
        wanted = {name: models.Form(layer.group_size, None, kind.bits, kind.table) for name, layer in chosen.items()}
    models.quantize_empty(empty, wanted, cpu=device == "cpu")
    return lambda: from_pretrained(options.model, device=device, dtype=dtype, **given), empty
