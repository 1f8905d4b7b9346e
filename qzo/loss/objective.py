"""Objectives without a gradient: text generated under each evaluation, and any measure of outputs as the loss."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .head import has_encoder, without_dropout
from .losses import pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_texts(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], copies: int, **options: Any
) -> list[str]:
    """What a model replies to each prompt under each evaluation, all in one call of its `generate`.

    Prompts are padded on the left (an encoder's on the right) and stacked, so that rows stay with their evaluation in
    every pass, the keys and values of earlier tokens too. A reply is what `generate` gives under that evaluation alone.

    Parameters
    ----------
    model
        A model of transformers with `generate`, under `evaluating` or not.
    tokenizer
        Its tokenizer.
    prompts
        B texts; a chat's as its template renders it with a generation prompt.
    copies
        E, one for each evaluation.
    **options
        Of `generate`, such as max_new_tokens=16. Without do_sample the likeliest token is taken. With it every row
        draws by itself, which adds noise to the differences that the method lives on.

    Returns
    -------
    list[str]
        The E * B replies (times num_return_sequences) without special tokens, those of the first evaluation first.

    Raises
    ------
    ValueError
        No prompts, or one without tokens; E < 1.
    """
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    end, encoder = tokenizer.eos_token_id, has_encoder(model)
    if not encoder:  # what a tokenizer puts behind a text would end the reply before it begins
        ids = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in ids]
    if not ids or not all(ids):
        raise ValueError(f"prompt {ids.index([])} has no tokens" if ids else "there is no prompt")
    width = max(map(len, ids))
    filler = next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        rest = [[value] * (width - len(row)) for row in rows]
        both = zip(rows, rest, strict=True) if encoder else zip(rest, rows, strict=True)
        return torch.tensor([[*front, *back] for front, back in both], device=model.device)

    batch = {"input_ids": padded(ids, filler), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    with torch.no_grad(), without_dropout(model):
        out = model.generate(**pair(batch, copies), **{"do_sample": False, "pad_token_id": filler, **options})
    out = out if isinstance(out, torch.Tensor) else out.sequences
    return tokenizer.batch_decode(out if encoder else out[:, width:], skip_special_tokens=True)


def objective(metric: Callable[[Any], Any], outputs: Any, copies: int, *, maximize: bool = False) -> torch.Tensor:
    """The loss of each evaluation by any measure of its outputs: what a closure of `QZO.step` returns.

    Parameters
    ----------
    metric
        metric(part) of the outputs of one evaluation: a number (accuracy, F1, a reward of the whole), or one for each
        row, of which the mean is taken. A NaN skips the step.
    outputs
        Of a batch that was stacked E times (`pair`, `generate_texts`): a tensor [E * B, ...], such as a model's logits,
        or a list of E * B texts or other things. A part is the rows of one evaluation.
    copies
        E, one for each evaluation.
    maximize
        The metric is better the larger it is: its negative is the loss.

    Returns
    -------
    torch.Tensor
        float32 [E], on the CPU.

    Raises
    ------
    ValueError
        Rows that E does not divide, or none.
    TypeError
        Outputs of another kind; a metric that returns no numbers.
    """
    sign = -1 if maximize else 1
    return torch.tensor([sign * _number(metric(_part(outputs, e, copies))) for e in range(copies)], dtype=torch.float32)


def _part(outputs: Any, e: int, copies: int) -> Any:
    """The rows of evaluation e."""
    if not isinstance(outputs, torch.Tensor | list | tuple):
        raise TypeError(
            f"outputs must be a tensor or a list, a row for each row of the batch; got {type(outputs).__name__}"
        )
    if not len(outputs) or len(outputs) % copies:
        raise ValueError(
            f"the outputs have {len(outputs)} rows, which {copies} evaluations do not divide; use qzo.pair"
        )
    count = len(outputs) // copies
    return outputs[e * count : (e + 1) * count]


def _number(value: Any) -> float:
    """A number, or the mean of several."""
    try:
        return float(torch.as_tensor(value, dtype=torch.float64).mean())
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"a metric returns a number, or one for each row; got {type(value).__name__}") from None
