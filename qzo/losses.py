"""Batches stacked for several evaluations, and their losses: float32, from the labelled positions only.

The logits of a whole batch over the whole vocabulary never exist: the model's body gives hidden states, the output
head runs on the rows that carry a label, a bounded number at a time.
"""
from collections.abc import Mapping

import torch
from torch.nn import functional

from .linear import layers

LOGIT_BYTES = 64 << 20       # float32 logits held at once
NOT_INPUTS = ("labels", "label", "option_ids", "options")


class Stacked(dict):
    """A batch that already holds one copy per evaluation along each tensor's first dimension."""


def pair(batch, E):
    """Stack a batch E times along the first dimension, so that row block e can run under evaluation e.

    batch: a tensor, or a mapping, list or tuple of them; scalars and other values pass through. ValueError for E < 1.
    """
    if E < 1:
        raise ValueError(f"E={E}: a batch is stacked at least once")
    if isinstance(batch, torch.Tensor):
        return batch.repeat(E, *[1] * (batch.dim() - 1)) if batch.dim() else batch
    if isinstance(batch, Mapping):
        return Stacked({key: pair(value, E) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        return type(batch)(pair(value, E) for value in batch)
    return batch


def losses(model, batch, E):
    """Loss of each evaluation, float32 [E]: the mean over the evaluation's rows.

    batch is a mapping of model inputs [B, T] (stacked here unless `pair` has done it) and one of

    labels [B, T]                  next-token cross entropy where labels are not -100, as in transformers
    labels [B]                     class labels of a model that returns logits [B, classes]
    option_ids [B, O], label [B]   cross entropy over O next tokens after each row's last attended position
    labels [B*O, T], options O, label [B]   cross entropy over O options of several tokens each, one row an option,
                                   scored by their mean log-likelihood

    Raises ValueError for a batch without labels and for rows that E does not divide.
    """
    if not isinstance(batch, Stacked):
        batch = pair(dict(batch), E)
    rows = next(v for v in batch.values() if isinstance(v, torch.Tensor)).shape[0]
    if rows % E:
        raise ValueError(f"the stacked batch has {rows} rows, which {E} evaluations do not divide; use qzo.pair")
    with torch.no_grad():
        if "option_ids" in batch or "options" in batch:
            scores = option_scores(model, batch)
            each = functional.cross_entropy(scores, batch["label"], reduction="none")
            return each.view(E, -1).mean(1)
        if "labels" not in batch:
            raise ValueError(f"the batch has no labels (its keys: {', '.join(batch)}); give labels [rows, tokens] with "
                             "-100 where there is none, or option_ids and label")
        return _label_losses(model, batch, E)


def rounding_losses(model, batch, rounded):
    """{"loss_before", "loss_after"}: the loss of a batch as the model is, and with its layers rounded.

    rounded: (layer's name, scales float32 [G, N], zeros float32 [G, N] or None where they stay) of each layer. The
    scales are put into the arena for one forward; afterwards the model is as before, bit for bit.
    """
    before = float(losses(model, batch, 1))
    found = layers(model, trainable=None)
    arenas = {id(layer.arena): (layer.arena, layer.arena.data.clone()) for layer in found.values()}
    zeros = {name: layer.zeros for name, layer in found.items()}
    try:
        for name, scales, zero in rounded:
            layer = found[name]
            layer.arena.write(layer.arena_name, scales)
            if zero is not None:
                layer.zeros = zero.contiguous().to(layer.zeros.device)
        after = float(losses(model, batch, 1))
    finally:
        for arena, data in arenas.values():
            arena.data.copy_(data)
        for name, layer in found.items():
            layer.zeros = zeros[name]
    return {"loss_before": before, "loss_after": after}


def option_scores(model, batch):
    """Scores of the options, float32 [B, O]; their softmax is the model's choice."""
    if "option_ids" in batch:
        hidden = _hidden(model, batch)
        attended = batch.get("attention_mask")
        attended = torch.ones_like(hidden[..., 0], dtype=torch.int64) if attended is None else attended
        last = attended.shape[1] - 1 - attended.flip(1).argmax(1)
        picked = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return _logits(model, picked).gather(1, batch["option_ids"])
    row, negative = _token_losses(model, batch)
    count = batch["label"].shape[0] * batch["options"]
    total = torch.zeros(count, device=negative.device).index_add_(0, row, negative)
    tokens = torch.zeros(count, device=negative.device).index_add_(0, row, torch.ones_like(negative))
    return -(total / tokens).view(-1, batch["options"])


def _label_losses(model, batch, count):
    if batch["labels"].dim() == 1:
        logits = model(**_inputs(batch)).logits.float()
        return functional.cross_entropy(logits, batch["labels"], reduction="none").view(count, -1).mean(1)
    row, each = _token_losses(model, batch)
    if not len(each):
        raise ValueError("no position of the batch carries a label: every entry of labels is -100")
    per_evaluation = batch["labels"].shape[0] // count
    evaluation = row // per_evaluation
    total = torch.zeros(count, device=each.device).index_add_(0, evaluation, each)
    return total / (len(each) // count)          # every evaluation holds the same labels


def _token_losses(model, batch):
    """-> (row of each labelled position, its cross entropy in float32), rows in order."""
    labels = batch["labels"][:, 1:]
    row, column = torch.nonzero(labels != -100, as_tuple=True)
    hidden = _hidden(model, batch)[row, column]          # position t predicts token t + 1
    target = labels[row, column]
    step = max(1, LOGIT_BYTES // (4 * _vocabulary(model)))
    each = [functional.cross_entropy(_logits(model, hidden[at:at + step]), target[at:at + step], reduction="none")
            for at in range(0, len(target), step)]
    return row, torch.cat(each) if each else hidden.new_zeros(0, dtype=torch.float32)


def _inputs(batch):
    return {key: value for key, value in batch.items() if key not in NOT_INPUTS}


def _hidden(model, batch):
    """Hidden states [rows, T, H] that the output head would see."""
    return model.base_model(**_inputs(batch), use_cache=False).last_hidden_state


def _vocabulary(model):
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no language-model head: labels [rows, tokens] and options need "
                         "one; labels [rows] fit a classifier")
    return getattr(head, "out_features", None) or head.weight.shape[0]


def _logits(model, hidden):
    """float32 logits of hidden rows, with what the model family does to them after its head."""
    _vocabulary(model)
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config.get_text_config()
    if getattr(config, "logits_scaling", None):                       # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):                          # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):              # Gemma 2 and 3
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits
