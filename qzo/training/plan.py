"""What a run will do, told before its first step.

Terms (plan): docs/glossary.md.
"""

import statistics
from typing import TYPE_CHECKING, Any

from ..nn.layers import codebooks, layers
from .loop import trained_count
from .settings import Settings
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(task: Task, settings: Settings, model: "PreTrainedModel") -> dict[str, Any]:
    """What training the model on the task will do, as numbers, for JSON and for `lines`.

    layers, layers_in_all : quantized layers that train, and that there are
    scales, codebook_numbers : numbers that train
    blocks : how many of the top blocks train; None: all
    steps, examples_per_step, directions, evaluations : of the run, of a step; each example is seen by each evaluation
    rows_per_step : rows of tokens of a step, all its evaluations together; some more or fewer where examples have
        several rows; at_once : how many of them go through the model in one forward
    tokens_per_row : {"mean", "longest"} over the data, without padding; of an encoder-decoder model its encoder's
    examples, passes : of the data; how often the steps go through it
    cut : examples that have lost tokens to settings.max_length

    Decides whether options share a prompt and batches are joined, if that is open (Task.settle).
    """
    task.settle()
    rows = [task.rows(example) for example in task.examples]
    lengths = [len(row) for some in rows for row in some]
    count = settings.evaluations
    per_evaluation = round(settings.batch_size * len(lengths) / len(rows))
    return {
        "layers": len(layers(model)),
        "layers_in_all": len(layers(model, trainable=None)),
        "scales": trained_count(model),
        "codebook_numbers": sum(books.numel() for books in codebooks(model).values()),
        "blocks": settings.train_layers,
        "steps": settings.max_steps,
        "examples_per_step": settings.batch_size,
        "directions": settings.directions,
        "evaluations": count,
        "rows_per_step": per_evaluation * count,
        "at_once": per_evaluation * (1 if settings.sequential else count),
        "tokens_per_row": {"mean": round(statistics.fmean(lengths), 1), "longest": max(lengths)},
        "max_length": settings.max_length,
        "examples": len(task.examples),
        "passes": round(settings.max_steps * settings.batch_size / len(task.examples), 2),
        "cut": sum(example.lost > 0 for example in task.examples),
    }


def lines(told: dict[str, Any]) -> list[str]:
    """A plan as lines of text."""
    books = f" and {told['codebook_numbers']:,} numbers of codebooks" if told["codebook_numbers"] else ""
    blocks = {None: "", 1: ", the top block"}.get(told["blocks"], f", the top {told['blocks']} blocks")
    tokens, cut = told["tokens_per_row"], told["cut"]
    lost = f"; cut to {told['max_length']:,} tokens: {cut:,}" if cut else ""
    return [
        f"trains: {told['scales']:,} scales{books} of {told['layers']} of {told['layers_in_all']} layers{blocks}",
        f"data: {told['examples']:,} examples, {tokens['mean']:g} tokens a row, {tokens['longest']:,} the longest"
        f"{lost}",
        f"steps: {told['steps']:,} of {told['examples_per_step']:,} examples under {told['evaluations']} evaluations "
        f"({told['directions']} directions): {told['rows_per_step']:,} rows, {told['at_once']:,} at once; "
        f"{told['passes']:g} passes over the data",
    ]
