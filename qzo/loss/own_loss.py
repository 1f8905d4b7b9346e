"""Before a model is trained: is its loss, as qzo takes it, the model's own?

A few tokens of the first batch go through the model's own forward, with labels, and through `losses`. Where its own
loss is not the cross entropy of its own logits, or a token's logits tell of the tokens behind it, the model is
refused; where the logits that `losses` reads are not its own, those of whole batches are taken from then on (head.py).
"""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from ..system.memory import is_out_of_memory
from .head import Inputs, decoder_inputs, forward, has_encoder, logits_at, take_whole, takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16  # of the first row: what is compared
SAME = 1e-5  # relative, of losses in float32
MOVED = 1e-3  # of the largest logit: by so much none may move when a later token changes
ROUNDINGS = 2  # of 16-bit numbers, by which those of two shapes of a matmul may differ

_SHAPES = "labels are [rows, tokens] for a language model, [rows] for a classifier (one class of each)"
# model -> kinds of labels it was checked with
_seen: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def check(model: "PreTrainedModel", batch: Inputs, copies: int = 1) -> None:
    """Check a model once, with a batch as `losses` takes it, stacked for `copies` evaluations.

    Nothing is checked while a CUDA graph is captured, on the meta device, or where the batch starts behind a frozen
    prefix. ValueError, with both losses, for a model whose own loss is another than the cross entropy of its logits.
    """
    kind = "classes" if "labels" in batch and batch["labels"].dim() == 1 else "tokens"
    if kind in _seen.get(model, ()) or "states" in batch or _cannot_look(model):
        return
    read = getattr(model, "main_input_name", "input_ids")
    if has_encoder(model) and read != "input_ids" and not {read, "encoder_outputs"} & set(batch):
        raise ValueError(
            f"{type(model).__name__} reads {read}, and this batch has {', '.join(batch)}: text alone does not train "
            f"it; give qzo.losses(model, batch) batches with {read} and labels, in Python"
        )
    if "label" in batch:
        count = batch["option_ids"].shape[1] if "option_ids" in batch else batch["options"]
        if not 0 <= int(batch["label"].min()) <= int(batch["label"].max()) < count:
            raise ValueError(f"label {batch['label'].tolist()} is not of {count} options, counted from 0")
    with torch.no_grad():
        done = (_check_classes if kind == "classes" else _check_tokens)(model, batch, copies)
    if done:
        _seen.setdefault(model, set()).add(kind)


def _cannot_look(model: nn.Module) -> bool:
    device = next(model.parameters()).device.type
    return (
        device == "meta"
        or torch.compiler.is_compiling()
        or (device == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _check_classes(model: "PreTrainedModel", batch: Inputs, copies: int) -> bool:
    """One row of each evaluation, against `losses` of a classifier: cross entropy over its logits."""
    rows = len(batch["labels"])
    first = torch.arange(0, rows, rows // copies)
    some = {
        key: value[first.to(value.device)] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
        for key, value in batch.items()
    }
    labels = some.pop("labels")
    logits = getattr(forward(model, some), "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ValueError(f"{type(model).__name__} is no classifier, whose output has logits [rows, classes]: {_SHAPES}")
    _in_range(model, batch["labels"], logits, "classes")
    output = forward(model, {**some, "labels": labels})
    own = functional.cross_entropy(output.logits.float(), labels)
    _compare(model, output.get("loss"), own, "the cross entropy of its class logits", output.logits.dtype)
    return bool(own.isfinite())


def _check_tokens(model: "PreTrainedModel", batch: Inputs, copies: int) -> bool:
    found = _few_tokens(model, batch, copies)
    if found is None:
        return False
    inputs, labels, shift = found
    fed = (
        inputs
        if shift or "decoder_input_ids" in inputs
        else {**inputs, "decoder_input_ids": decoder_inputs(model, labels)}
    )
    again = getattr(forward(model, fed), "logits", None)
    if not isinstance(again, torch.Tensor):
        raise ValueError(
            f"{type(model).__name__} has no language-model head (its output has no logits): labels "
            "[rows, tokens] and options need one"
        )
    if again.dim() != 3:
        raise ValueError(
            f"{type(model).__name__} gives a text logits of one row, {list(again.shape[1:])}, not one of "
            f"each token: {_SHAPES}"
        )
    row, column = torch.nonzero(labels[:, shift:] != -100, as_tuple=True)
    target = labels[:, shift:][row, column]
    if int(target.max()) >= again.shape[-1]:
        raise ValueError(
            f"{type(model).__name__} has no language-model head: its logits are of {again.shape[-1]} "
            f"classes, and a token is number {int(target.max())}"
        )
    for key in {"labels", "targets", "option_ids"} & batch.keys():
        _in_range(model, batch[key], again, "tokens")
    output = forward(model, {**inputs, "labels": labels} if takes(model, "labels") else fed)
    own = functional.cross_entropy(output.logits[row, column].float(), target, reduction="none")
    if not own.isfinite().all():  # nothing to compare: the step says so
        return False
    wanted = f"the {'next-token ' * shift}cross entropy of its own logits"
    _compare(model, getattr(output, "loss", None), own.mean(), wanted, output.logits.dtype)
    if shift:
        _check_order(model, inputs, output.logits)
    try:
        half = (len(target) // copies + 1) // 2
        read = torch.cat([*logits_at(model, fed, row, column, copies, most=half)], 1).flatten(0, 1)
    except (RuntimeError, IndexError) as error:  # it did not with all positions
        if is_out_of_memory(error):
            raise
        take_whole(model, f"its forward fails where its head reads single positions ({error})")
        return True
    rounding = _rounding(output.logits)
    if _differ(read, own, target, rounding):
        if _differ(again[row, column].float(), own, target, rounding):
            raise ValueError(
                f"{type(model).__name__}: its logits are others "
                f"{'when it runs again' if shift else 'with decoder_input_ids made of the labels'}: it "
                "cannot be trained by comparing two losses; give QZO.step a closure of its own loss"
            )
        take_whole(model, "read at single positions they are others")
    return True


def _in_range(model: nn.Module, target: torch.Tensor, logits: torch.Tensor, what: str) -> None:
    """ValueError for labels that no logit stands for: a GPU would end the process."""
    real = target[target != -100]
    if len(real) and not 0 <= int(real.min()) <= int(real.max()) < logits.shape[-1]:
        raise ValueError(
            f"the labels are {int(real.min())} to {int(real.max())}, and {type(model).__name__} has "
            f"logits for {logits.shape[-1]} {what}; -100 stands where there is no label"
        )


def _few_tokens(
    model: "PreTrainedModel", batch: Inputs, copies: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, int] | None:
    """(inputs, labels, by how many places labels are read earlier) of a short row, once for each evaluation, or None.

    The row is the first's first TOKENS tokens. What else a batch has (images, types of tokens) is left out.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2:
        return None
    mask = batch.get("attention_mask")
    row = ids[0] if mask is None or mask.dim() != 2 else ids[0][mask[0] != 0]
    row = row[:TOKENS].repeat(copies, 1)
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    if has_encoder(model):
        labels = batch.get("labels")
        fed = batch.get("decoder_input_ids")
        if fed is not None and labels is not None:
            inputs["decoder_input_ids"] = fed[:1, :TOKENS].repeat(copies, 1)
            labels = labels[0, :TOKENS].repeat(copies, 1)
            return (inputs, labels, 0) if (labels != -100).any() else None
        labels = row if labels is None else labels[0][labels[0] != -100][:TOKENS].repeat(copies, 1)
        return (inputs, labels, 0) if labels.shape[1] else None
    labels = row.clone()
    labels[:, : row.shape[1] // 3] = -100
    return (inputs, labels, 1) if row.shape[1] > 1 else None


def _check_order(model: "PreTrainedModel", inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    """ValueError where the last token is seen from those before it: a loss of tokens that are read has no meaning."""
    ids = inputs["input_ids"]
    others = (ids[0] != ids[0, -1]).nonzero()
    if not len(others):
        return
    changed = ids.clone()
    changed[:, -1] = ids[0, others[0]]
    now = forward(model, {**inputs, "input_ids": changed}).logits
    apart = float((now[:, :-1].float() - logits[:, :-1].float()).abs().nan_to_num(0).max())  # both may be -inf
    if apart > MOVED * _largest(logits) + _rounding(logits):
        raise ValueError(
            f"{type(model).__name__} reads text in both directions: its logits at a token change with the "
            "tokens behind it, so a next-token loss would see its answers; load it as a decoder "
            "(is_decoder in its config), or give QZO.step a closure of its own loss"
        )


def _differ(logits: torch.Tensor, wanted: torch.Tensor, target: torch.Tensor, rounding: float) -> bool:
    got = functional.cross_entropy(logits, target, reduction="none")
    return not torch.allclose(got, wanted, rtol=SAME, atol=SAME + rounding)


def _compare(model: nn.Module, loss: torch.Tensor | None, wanted: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """ValueError where a model's own loss is another than the cross entropy wanted."""
    if loss is None:
        return
    own, cross_entropy = float(loss), float(wanted)
    relative = SAME if dtype == torch.float32 else ROUNDINGS * torch.finfo(dtype).eps
    if abs(own - cross_entropy) > relative * abs(own) + SAME:
        raise ValueError(
            f"{type(model).__name__}: its own loss of a batch is {own:.4g}, {name} {cross_entropy:.4g}: "
            "it has another objective than qzo minimizes; give QZO.step a closure of its own loss"
        )


def _rounding(logits: torch.Tensor) -> float:
    """By how much logits of 16 bits may differ between two shapes of the same matmul; 0 in float32."""
    if logits.dtype == torch.float32:
        return 0.0
    return ROUNDINGS * torch.finfo(logits.dtype).eps * _largest(logits)


def _largest(logits: torch.Tensor) -> float:
    """The largest of the logits, in absolute value, but for those of tokens that the model rules out."""
    size = logits.float().abs()
    return float(size[size < torch.finfo(logits.dtype).max / 2].max())
