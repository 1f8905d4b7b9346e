"""Batches stacked for several evaluations, and their losses: float32, from the labelled positions only (head.py)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch.nn import functional

from . import own_loss
from .head import Inputs, decoder_inputs, forward, has_encoder, head_input, logits_at, row_count
from .label_bias import centring
from .sums import exact_sums, means

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = TypeVar("Batch")
Same = TypeVar("Same", bound=dict[str, Any])

NOT_INPUTS = {"labels", "label", "option_ids", "option_bias", "options", "seen_until", "sources", "targets", "slots"}
NOT_INPUTS |= {"static", "states", "logits_to_keep", "num_logits_to_keep", "return_dict"}  # the last three: ours to say


class Stacked(dict[str, Any]):
    """A batch that already holds one copy per evaluation along each tensor's first dimension."""


@overload
def pair(batch: Mapping[str, Any], copies: int) -> Stacked: ...
@overload
def pair(batch: Batch, copies: int) -> Batch: ...
def pair(batch: Any, copies: int) -> Any:
    """Stack copies of a batch along the first dimension, so that row block e can run under evaluation e.

    Parameters
    ----------
    batch
        A tensor, or a mapping, list or tuple of them; scalars and other values pass through, as does one row of
        position_ids that serves several; those of several axes [axes, B, T] are stacked along their second.
    copies
        E, one for each evaluation.

    Returns
    -------
    Stacked, torch.Tensor, list or tuple
        Tensors [E * B, ...] of the same dtypes; a mapping becomes a dict that `losses` knows as stacked.

    Raises
    ------
    ValueError
        copies < 1.
    """
    if copies < 1:
        raise ValueError(f"copies={copies}: a batch is stacked at least once")
    if isinstance(batch, torch.Tensor):
        return batch.repeat(copies, *[1] * (batch.dim() - 1)) if batch.dim() else batch
    if isinstance(batch, Mapping):
        stacked = Stacked({key: pair(value, copies) for key, value in batch.items()})
        positions = batch.get("position_ids")
        if isinstance(positions, torch.Tensor):
            several = row_count(batch) > 1 and len(positions) == 1
            if positions.dim() == 3:
                stacked["position_ids"] = positions.repeat(1, copies, 1)
            elif several:
                stacked["position_ids"] = positions
        return stacked
    if isinstance(batch, list | tuple):
        return type(batch)(pair(value, copies) for value in batch)
    return batch


def static_batch(batch: Same, targets: int | None = None) -> Same:
    """The batch with sources, targets and slots in place of its labels, `static` as `losses` has it.

    No shape, and nothing on the host, depends on where labels stand in such a batch, as a CUDA graph wants it. Where
    some masks are all ones and others not, leave a token of padding in each: transformers looks for that on the host.

    Parameters
    ----------
    batch
        A dict with labels int64 [B, T], -100 where there is none; stacked by `pair` or not.
    targets
        How many places N of each row are read, by default as many as the row with the most labels has; give one number
        to all batches of a shape, so that one captured step serves them (`QZO.step(closure, batch=batch)`).

    Returns
    -------
    dict
        Of the type of `batch`: sources, targets and slots int64 [B, N] and static True in place of labels.

    Raises
    ------
    ValueError
        Fewer targets than there are labels in a row, more than there are places; a batch without a label.
    """
    labels = batch["labels"][:, 1:]  # position t predicts token t + 1
    most = int((labels != -100).sum(1).max())
    targets = most if targets is None else targets
    if not most:
        raise ValueError("no position of the batch carries a label: every entry of labels is -100")
    if not most <= targets <= labels.shape[1]:
        raise ValueError(f"targets={targets}: the batch has rows of {most} labels, in {labels.shape[1]} places")
    sources = (labels == -100).to(torch.uint8).argsort(dim=1, stable=True)[:, :targets]
    rest = {key: value for key, value in batch.items() if key != "labels"}
    return type(batch)(
        {
            **rest,
            "sources": sources,
            "targets": labels.gather(1, sources),
            "slots": torch.zeros_like(sources),
            "static": True,
        }
    )


def losses(model: "PreTrainedModel", batch: Inputs, copies: int) -> torch.Tensor:
    """Loss of each evaluation: the mean over the evaluation's rows, from logits at labelled positions only (head.py).

    A batch is a mapping of model inputs [B, T] (stacked here unless `pair` has done it) and one of

    - labels [B, T]: next-token cross entropy where labels are not -100, as in transformers; for an encoder-decoder
      model those of the decoder, its inputs made of them if not given
    - labels [B]: class labels of a model that returns logits [B, classes]
    - option_ids [B, O], label [B] and perhaps option_bias float32 [B, O]: cross entropy over O next tokens after each
      row's last attended position, biases added to their scores
    - labels [B*O, T], options O, label [B]: cross entropy over O options of several tokens each, one row an option,
      scored by their mean log-likelihood

    or, in place of `labels` [rows, tokens], rows in which options share a prompt or examples stand behind one
    another (packing.py): input_ids, position_ids, seen_until [R, T], R a divisor of B, with

    - sources, targets, slots [R, N]: the cross entropies of targets that are not -100, read at sources; with options
      and label, slots are the options of the row that they belong to
    - sources [R, B/R], option_ids, label: options of one token, read at sources

    `static`: True beside sources, targets, slots, of plain rows too: no shape and nothing on the host depends on what
    the tensors hold, as a CUDA graph wants it; targets that are -100 are read and count as nothing.

    The model's first batch is checked (own_loss.py): its loss has to be the model's own. Dropout is off in any mode.

    Parameters
    ----------
    model
        A model of transformers, under `evaluating` or not.
    batch
        As above; numbers of tokens, classes and options are int64.
    copies
        E, how many evaluations its rows are stacked for, or will be.

    Returns
    -------
    torch.Tensor
        float32 [E], in nats, on the model's device; no gradient.

    Raises
    ------
    ValueError
        A batch without labels; labels of another shape or dtype than these; rows that E does not divide; a model
        without a config, or whose own loss is another than the cross entropy above.
    """
    return means(loss_sums(model, batch, copies)).float()


def loss_sums(model: "PreTrainedModel", batch: Inputs, copies: int, centred: bool = False) -> torch.Tensor:
    """What the means of `losses`, whose arguments and errors these are, are made of: sums of losses and their numbers.

    Those of parts of a batch, on several ranks or one after another, add up to those of the whole, bit for bit
    (sums.py). centred: of a batch with options also the sums by which a loss leaves out what biases do (label_bias.py).

    Returns
    -------
    torch.Tensor
        float64 [E, 2], centred [E, 2 + 2 O]: nats, and how many labels they are of (examples, where they have options);
        on the model's device, no gradient.
    """
    batch = _stacked(model, batch, copies)
    with torch.no_grad():
        own_loss.check(model, batch, copies)
        if "option_ids" in batch or "options" in batch:
            scores = option_scores(model, batch, copies)
            each = functional.cross_entropy(scores, batch["label"], reduction="none")[:, None]
            columns = [each, torch.ones_like(each), *([centring(scores, batch["label"])] if centred else [])]
            return exact_sums(torch.cat(columns, 1).unflatten(0, (copies, -1)))
        if "labels" not in batch and "targets" not in batch:
            raise ValueError(
                f"the batch has no labels (its keys: {', '.join(batch)}); give labels [rows, tokens] with "
                "-100 where there is none, or option_ids and label"
            )
        return _label_sums(model, batch, copies)


def _stacked(model: "PreTrainedModel", batch: Inputs, copies: int) -> Stacked:
    """The batch, stacked if it is not yet; ValueError where it, or the model, is none that `losses` takes."""
    if not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} has no config: losses are those of transformers models; of a wrapper "
            "such as DataParallel, give the module inside"
        )
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a mapping of tensors, got {type(batch).__name__}")
    stacked = batch if isinstance(batch, Stacked) else pair(dict(batch), copies)
    _check_shapes(model, stacked)
    rows = row_count(stacked)
    if rows % copies or not rows:
        raise ValueError(f"the stacked batch has {rows} rows, which {copies} evaluations do not divide; use qzo.pair")
    return stacked


def _check_shapes(model: "PreTrainedModel", batch: Inputs) -> None:
    """ValueError for labels that do not fit the batch, where torch would cut or broadcast them, or name neither."""
    for key in ("labels", "label", "option_ids"):
        if getattr(batch.get(key), "dtype", None if key in batch else torch.int64) != torch.int64:
            got = str(getattr(batch[key], "dtype", type(batch[key]).__name__)).removeprefix("torch.")
            raise ValueError(f"{key} are {got}: expected an int64 tensor of token, class or option indices")
    tokens = batch.get("input_ids")
    if tokens is None and batch.get("inputs_embeds") is not None:
        tokens = batch["inputs_embeds"][..., 0]
    if tokens is not None and tokens.dim() < 2:
        raise ValueError(f"input_ids are {list(tokens.shape)}: expected [rows, tokens]")
    if tokens is not None and "labels" in batch:
        labels, wanted = batch["labels"].shape, tokens.shape
        if len(labels) == 1 or has_encoder(model):  # of a row, or of the decoder's tokens
            wanted = wanted[:1]
        if labels[: len(wanted)] != wanted:
            raise ValueError(
                f"labels {list(labels)} do not fit {list(tokens.shape)} tokens: expected as many, -100 "
                "where there is none"
            )
    if "option_ids" in batch or "options" in batch:
        _check_options(batch, tokens)


def _check_options(batch: Inputs, tokens: torch.Tensor | None) -> None:
    if "label" not in batch:
        raise ValueError("options are given without label [B], the number of the right one")
    count = len(batch["label"])
    if "option_ids" in batch:
        options, rows = list(batch["option_ids"].shape), count if tokens is None or "sources" in batch else len(tokens)
        if len(options) != 2 or not options[0] == rows == count:
            raise ValueError(
                f"option_ids {options} and label [{count}] do not fit {rows} rows: [rows, options] and "
                "[rows] are wanted"
            )
    elif "labels" in batch and len(batch["labels"]) != count * batch["options"]:
        raise ValueError(
            f"labels of {len(batch['labels'])} rows are not those of label [{count}] times "
            f"{batch['options']} options, one row an option"
        )


def option_scores(model: "PreTrainedModel", batch: Inputs, copies: int = 1) -> torch.Tensor:
    """Scores of the options, float32 [B, O]; their softmax is the model's choice. copies: evaluations in the batch."""
    if has_encoder(model):
        raise ValueError(
            f"{type(model).__name__} has an encoder: options are scored by decoder-only models; give "
            "labels [rows, tokens] of the decoder"
        )
    if "option_ids" in batch:
        row, column = read_places(batch)
        ids = batch["option_ids"].view(copies, -1, batch["option_ids"].shape[1])
        parts, start = [], 0
        for logits in logits_at(model, model_inputs(model, batch, copies), row, column, copies):
            parts.append(logits.gather(2, ids[:, start : start + logits.shape[1]]))
            start += logits.shape[1]
        scores = torch.cat(parts, 1).flatten(0, 1)
        return scores + batch["option_bias"] if "option_bias" in batch else scores
    count = batch["label"].shape[0] * batch["options"]
    if "static" in batch:
        negative, targets = _target_losses(model, batch, copies), batch["targets"]
        slots = torch.arange(count // _rows(batch), device=negative.device)
        own = (batch["slots"][:, None] == slots[:, None]) & (targets != -100)[:, None]  # [R, slots, N]
        scores = torch.where(own, -negative[:, None], 0).sum(-1) / own.sum(-1)
        return scores.view(-1, batch["options"])
    row, slot, negative = _token_losses(model, batch, copies)
    slot = row * (count // _rows(batch)) + slot
    total = torch.zeros(count, device=negative.device).index_add_(0, slot, negative)
    tokens = torch.zeros(count, device=negative.device).index_add_(0, slot, torch.ones_like(negative))
    if not tokens.is_meta and not tokens.all():
        raise ValueError("an option has no token: every label of its row is -100")
    return -(total / tokens).view(-1, batch["options"])


def read_states(model: "PreTrainedModel", batch: Inputs, copies: int = 1) -> torch.Tensor:
    """Hidden states that the output head reads for this batch, [positions, H], in the order of the rows."""
    row, column = read_places(batch) if "option_ids" in batch else label_places(model, batch)[:2]
    return head_input(model, model_inputs(model, batch, copies))[row, column]


def read_places(batch: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of the position that each example's options of one token are read at."""
    if "sources" in batch:
        rows = torch.arange(len(batch["sources"]), device=batch["sources"].device)
        return rows.repeat_interleave(batch["sources"].shape[1]), batch["sources"].flatten()
    attended = batch.get("attention_mask")
    if attended is None:
        tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
        attended = torch.ones_like(tokens, dtype=torch.int64)
    if attended.dim() != 2:
        raise ValueError(
            f"attention_mask {list(attended.shape)} does not say where a row ends: options of one token "
            "want one of [rows, tokens]"
        )
    attended = (attended != 0).to(torch.int64)
    return torch.arange(len(attended), device=attended.device), attended.shape[1] - 1 - attended.flip(1).argmax(1)


def model_inputs(model: "PreTrainedModel", batch: Inputs, copies: int = 1) -> dict[str, Any]:
    """What the model takes of a batch; seen_until becomes an additive mask [rows, 1, T, T].

    Where each of the E evaluations has one row, its mask [1, 1, T, T] serves them all.
    """
    inputs = {key: value for key, value in batch.items() if key not in NOT_INPUTS}
    if "seen_until" in batch:
        until = batch["seen_until"]
        until = until[: until.shape[0] // copies]  # the evaluations' rows are alike
        place = torch.arange(until.shape[1], device=until.device)
        query, key = place[:, None], place
        seen = (key <= query) & (query < until[:, None]) | (key == query)  # padding sees itself: no row of NaN
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=until.device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask[:, None] if len(mask) == 1 else mask[:, None].repeat(copies, 1, 1, 1)
    return inputs


def _label_sums(model: "PreTrainedModel", batch: Inputs, copies: int) -> torch.Tensor:
    if "labels" in batch and batch["labels"].dim() == 1:
        logits, labels = forward(model, model_inputs(model, batch)).logits.float(), batch["labels"]
        each = functional.cross_entropy(logits, labels, reduction="none").view(copies, -1)
        return exact_sums(torch.stack([each, (labels != -100).view_as(each).to(each)], 2))
    if "static" in batch:
        each, labelled = _target_losses(model, batch, copies), batch["targets"] != -100
        return exact_sums(torch.stack([each, labelled.to(each)], 2).view(copies, -1, 2))
    _, _, each = _token_losses(model, batch, copies)
    if not len(each):
        raise ValueError("no position of the batch carries a label: every entry of labels is -100")
    each = each.view(copies, -1)  # every evaluation holds the same labels
    return exact_sums(torch.stack([each, torch.ones_like(each)], 2))


def _rows(batch: Inputs) -> int:
    return batch["targets" if "targets" in batch else "labels"].shape[0]


def label_places(
    model: "PreTrainedModel", batch: Inputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (row, place read, token to predict there, option of the row) of each labelled position, row by row."""
    if "targets" in batch:
        if has_encoder(model):
            raise ValueError("packed rows are for decoder-only models; give labels [rows, tokens] of the decoder")
        row, at = torch.nonzero(batch["targets"] != -100, as_tuple=True)
        return row, batch["sources"][row, at], batch["targets"][row, at], batch["slots"][row, at]
    # a decoder behind an encoder has its inputs shifted; else position t predicts token t + 1
    labels = batch["labels"] if has_encoder(model) else batch["labels"][:, 1:]
    row, column = torch.nonzero(labels != -100, as_tuple=True)
    return row, column, labels[row, column], torch.zeros_like(row)


def _token_losses(
    model: "PreTrainedModel", batch: Inputs, copies: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (row of each labelled position, its option, its cross entropy in float32), rows in order."""
    row, column, target, slot = label_places(model, batch)
    counts = [] if row.is_meta else torch.bincount(row // (_rows(batch) // copies), minlength=copies).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"the evaluations' rows hold {counts} labels: each takes the same examples; use qzo.pair")
    inputs = model_inputs(model, batch, copies)
    if has_encoder(model) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    return row, slot, _cross_entropies(model, inputs, row, column, target, copies)


def _target_losses(model: "PreTrainedModel", batch: Inputs, copies: int) -> torch.Tensor:
    """-> the cross entropy of each target of a batch that is static, float32 [R, N], 0 where there is none."""
    sources, targets = batch["sources"], batch["targets"]
    row = torch.arange(len(sources), device=sources.device).repeat_interleave(sources.shape[1])
    inputs = model_inputs(model, batch, copies)
    return _cross_entropies(model, inputs, row, sources.flatten(), targets.flatten(), copies).view_as(targets)


def _cross_entropies(
    model: "PreTrainedModel",
    inputs: Inputs,
    row: torch.Tensor,
    column: torch.Tensor,
    target: torch.Tensor,
    copies: int,
) -> torch.Tensor:
    """float32 [N] of what is to be predicted at (row, column) [N], in the order of the evaluations; 0 for -100."""
    parts, start = [], 0
    if not len(target):
        return torch.zeros(0, device=target.device)
    target = target.view(copies, -1)
    for logits in logits_at(model, inputs, row, column, copies):
        here = target[:, start : start + logits.shape[1]]
        parts.append(functional.cross_entropy(logits.flatten(0, 1), here.flatten(), reduction="none").view_as(here))
        start += logits.shape[1]
    return torch.cat(parts, 1).flatten()
