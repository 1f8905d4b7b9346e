"""Records -> examples -> batches.

Whatever a record's form (records.py), it becomes tokens and what is learned of them. Behind a completion, and behind a
`text`, stands the end-of-text token once, so that the model learns to stop; with text_eos=False (--no-text-eos) a text
ends as the tokenizer ends it: for pieces of longer texts. A prompt that is too long loses its beginning, a text its
end (and that token). Of a conversation the last message is learned, with chat_loss="all" (--chat-loss all) each of the
assistant's that answers something; what stands before the last is cut as a prompt is.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.noise import SEED_ROUNDS, philox4x32
from ..loss.losses import static_batch
from ..system.progress import tracked
from .chats import conversation, instruction
from .encode import Encoder
from .records import Line, form, problem

IGNORED = -100
WINDOW = 16  # batches among which examples are sorted
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids and what is learned: `labels` per token (those of the decoder, if the ids are an encoder's), or
    `options` (each a tuple of ids) and the right one. lost: how many of its tokens were cut off; no part of what an
    example is, so a journal's digest of the data (loop.recipe) knows nothing of it."""

    ids: tuple[int, ...]
    labels: tuple[int, ...] | Any = None  # None or these: the one is asked for where the other is not there
    options: tuple[tuple[int, ...], ...] | Any = None
    label: int | None = None
    lost: int = dataclasses.field(default=0, repr=False, compare=False)


def tokenize(
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    max_length: int = 1024,
    limit: str = "--max-length",
    encoder: bool = False,
    text_eos: bool = True,
    max_cut: float = 1.0,
    chat_loss: str = "last",
) -> list[Example]:
    """Records -> Examples, by an Encoder (encode.py). A prompt that is too long loses its beginning, a text its end. A
    warning says how many did, and how many tokens that would have been learned are lost; another in how many a token
    spans the prompt's end. limit: what set max_length, for the
    messages. encoder: the model is an encoder-decoder one, whose encoder reads the prompt (cut at its end) and whose
    decoder the completion. text_eos: whether the end-of-text token stands behind a `text`. max_cut: which share of the
    records may be cut. chat_loss: which of the assistant's messages are learned, the "last" or "all".

    ValueError, naming the line or the number of the example, for a record of no known form, a text that cannot be
    encoded, one that leaves nothing to predict, a chat template that refuses, and for a completion or option longer
    than max_length; and where more than max_cut of the records are cut, naming the length that is needed.
    """
    texts, examples, lengths, spanning, unlearned = Encoder(tokenizer, text_eos, chat_loss), [], [], [], 0
    convert = _for_an_encoder if encoder else _example
    for number, record in enumerate(tracked(records, "tokenizing", "examples"), 1):
        try:
            example, length, spans, labels = convert(record, texts, max_length, limit)
        except ValueError as error:
            raise ValueError(f"{_place(record, number)}: {error}") from None
        examples.append(dataclasses.replace(example, lost=max(0, length - max_length)))
        lengths.append(length)
        unlearned += labels
        if spans:
            spanning.append(_place(record, number))
    cut = sum(length > max_length for length in lengths)
    if cut:
        said = f"{cut} {_of(records)} have more than {max_length} tokens (the longest {max(lengths)})"
        if cut > max_cut * len(lengths):
            raise ValueError(f"{said}: {_too_many(lengths, max_cut)}")
        never = f"; {unlearned} tokens that would have been learned are cut off" if unlearned else ""
        warnings.warn(
            f"{said}: a prompt has lost its {'end' if encoder else 'beginning'}, a text its end ({limit}){never}",
            stacklevel=2,
        )
    if spanning:
        warnings.warn(
            f"in {len(spanning)} {_of(records)} a token holds the prompt's end and what follows it (the "
            f"first: {spanning[0]}). It is learned with what follows, but a server that is sent the prompt "
            "alone makes another token of its end: let completions and options begin with the space, not "
            "prompts end with it",
            stacklevel=2,
        )
    return examples


def _too_many(lengths: list[int], max_cut: float) -> str:
    """What to do where more than the share max_cut of these lengths would be cut."""
    longest, enough = max(lengths), sorted(lengths, reverse=True)[math.floor(max_cut * len(lengths))]
    some = "" if enough == longest else f", {enough} cuts no more than that"
    return (
        f"more than the {100 * max_cut:g} % that may be cut; --max-length {longest} holds them whole{some}; "
        "to learn from what is left of them, give --max-cut 1"
    )


def _place(record: dict[str, Any], number: int) -> str:
    return record.place if isinstance(record, Line) else f"example {number}"


def _of(records: Sequence[dict[str, Any]]) -> str:
    """ "of 12 lines of FILE"."""
    first = records[0]
    return f"of {len(records)} " + (f"{first.unit}s of {first.path}" if isinstance(first, Line) else "lines")


# with its tokens before any were cut, whether a token spanned the prompt's end, how many that were cut had labels
Made = tuple[Example, int, bool, int]


def _example(record: dict[str, Any], encoder: Encoder, max_length: int, limit: str) -> Made:
    keys = form(record) or set()
    wrong = problem(record) if not keys else None
    if wrong:
        raise ValueError(wrong)
    if "options" in keys:
        return _choice(record, encoder, max_length, limit)
    if "text" in keys:
        ids, own = encoder.text(record["text"])
        if min(own, max_length) < 2:
            raise ValueError(
                "the text is one token: nothing to predict"
                if own < 2
                else f"max_length={max_length} leaves one token of the text: nothing to predict ({limit})"
            )
        cut = max(0, len(ids) - max_length)
        return Example(tuple(ids[:max_length]), labels=tuple(ids[:max_length])), len(ids), False, cut
    if "completion" in keys and isinstance(record["prompt"], str):
        both: tuple[str, str] | None = (record["prompt"], record["completion"])
    else:
        both = instruction(record) if "instruction" in keys and not encoder.chats else None
    if both:
        prompt, completion, own, spans = encoder.completion(*both)
        learned = [False] * len(prompt)
    else:
        prompt, completion, learned, spans = encoder.chat(*conversation(record))
        own = len(completion)
    if len(prompt) + own < 2:
        raise ValueError("the prompt and its completion are one token together: nothing to predict")
    kept = _fitted(encoder, prompt, completion, max_length, "a completion", limit)
    labels = [prompt[place] if learned[place] else IGNORED for place in kept] + completion
    example = Example(tuple([prompt[place] for place in kept] + completion), labels=tuple(labels))
    return example, len(prompt) + len(completion), spans, sum(learned) - sum(learned[place] for place in kept)


def _choice(record: dict[str, Any], encoder: Encoder, max_length: int, limit: str) -> Made:
    """Of a record with options."""
    prompt, options, spans = encoder.options(record["prompt"], record["options"])
    longest, label = max(options, key=len), record["label"]
    kept = _fitted(encoder, prompt, longest, max_length, "an option", limit)
    example = Example(
        tuple(prompt[place] for place in kept),
        options=tuple(map(tuple, options)),
        label=record["options"].index(label) if isinstance(label, str) else label,
    )
    return example, len(prompt) + len(longest), spans, 0


def _for_an_encoder(record: dict[str, Any], texts: Encoder, max_length: int, limit: str) -> Made:
    """The same for an encoder-decoder model: an Example whose labels are the decoder's."""
    keys = form(record) or set()
    plain = "completion" in keys and isinstance(record["prompt"], str)
    if not plain and "instruction" not in keys:
        messages = " of messages" if "completion" in keys else ""
        raise ValueError(
            "an encoder-decoder model learns from lines of prompt and completion, or of instruction and output; this "
            f"one has {', '.join(sorted(record))}{messages}"
        )
    both = (record["prompt"], record["completion"]) if plain else instruction(record)
    ids, labels, length = texts.both(both[0], both[1], max_length)
    if len(labels) > max_length:
        raise ValueError(f"the completion has {len(labels)} tokens, max_length={max_length} ({limit})")
    return Example(tuple(ids), labels=tuple(labels)), length, False, 0


def _fitted(
    encoder: Encoder, prompt: list[int], following: list[int], max_length: int, what: str, limit: str
) -> list[int]:
    """The places of the prompt's ids that the `following` ones leave room for."""
    fitted = encoder.fitted(prompt, max_length - len(following))
    if fitted is None:
        raise ValueError(
            f"{what} has {len(following)} tokens: it does not fit behind its prompt in "
            f"max_length={max_length} ({limit})"
        )
    return fitted


def check_one_kind(examples: Sequence[Example]) -> None:
    """ValueError unless all examples are of one kind, with one number of options."""
    kinds = sorted({0 if e.options is None else len(e.options) for e in examples})
    if len(kinds) > 1:
        names = ["no options" if count == 0 else f"{count} options" for count in kinds]
        raise ValueError(f"the data mixes examples with {' and '.join(names)}; give all lines the same shape")


def collate(
    examples: Sequence[Example],
    pad_id: int,
    device: torch.device | str | None = None,
    shape: tuple[int, int | None] | None = None,
) -> Batch:
    """A batch for `losses`: padded on the right. All examples are of one kind (ValueError otherwise).

    shape: (tokens, targets) of each row instead of what the examples need; the batch is then `static` (losses.py).
    Without targets (None) it is a plain one of as many tokens.
    """
    check_one_kind(examples)
    label: Batch = (
        {} if examples[0].options is None else {"label": torch.tensor([e.label for e in examples], device=device)}
    )
    if examples[0].options is None:
        rows = [(e.ids, e.labels) for e in examples]
    elif all(len(o) == 1 for e in examples for o in e.options):
        rows = [(e.ids, None) for e in examples]
        label["option_ids"] = torch.tensor([[o[0] for o in e.options] for e in examples], device=device)
    else:
        rows = [(e.ids + o, (IGNORED,) * len(e.ids) + o) for e in examples for o in e.options]
        label["options"] = len(examples[0].options)
    width, targets = shape or (None, None)
    batch = {**padded(rows, pad_id, device, width), **label}
    return static_batch(batch, targets) if targets is not None and "labels" in batch else batch


def padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int] | Any]],
    pad_id: int,
    device: torch.device | str | None,
    width: int | None = None,
) -> dict[str, torch.Tensor]:
    """(ids, labels or None) of each row -> input_ids, attention_mask and perhaps labels, int64 [rows, T]. T: width, or
    the longest row's; a decoder's labels have their own."""
    width = width or max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": pad([ids for ids, _ in rows], width, pad_id, device),
        "attention_mask": pad([[1] * len(ids) for ids, _ in rows], width, 0, device),
    }
    if rows[0][1] is not None:
        if any(len(labels) != len(ids) for ids, labels in rows):  # a decoder's
            width = max(len(labels) for _, labels in rows)
        batch["labels"] = pad([labels for _, labels in rows], width, IGNORED, device)
    return batch


def pad(
    sequences: Sequence[Sequence[int]], width: int, value: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """int64 [rows, width]: each sequence, then `value`."""
    return torch.tensor([[*s, *[value] * (width - len(s))] for s in sequences], device=device)


def order(count: int, epoch: int, seed: int) -> list[int]:
    """A permutation of range(count) that depends on (seed, epoch) alone: by Philox, the same everywhere."""
    zero = torch.zeros((), dtype=torch.int64)
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    words = philox4x32((torch.arange(count), zero + epoch, zero, zero + 2), key, SEED_ROUNDS)
    return (words[0] << 30 | words[1] >> 2).argsort(stable=True).tolist()


def batch_indices(
    step: int, lengths: Sequence[int], batch_size: int, seed: int, strata: Sequence[int | None] | None = None
) -> list[int]:
    """Which examples step `step` sees.

    lengths: tokens of each example; strata: the class of each, or None. Each pass over the data is a fresh permutation.
    Within every WINDOW batches of it the examples are ordered by their rank of length within their class, so that a
    batch holds the classes in their proportion (less noise in the losses) and needs little padding; then the batches
    are shuffled. A pass's incomplete last batch is left out.
    """
    count = len(lengths)
    per_epoch = max(1, count // batch_size)
    epoch, at = divmod(step, per_epoch)
    shuffled = order(count, 2 * epoch, seed)
    window = WINDOW * batch_size
    mixed = [
        i for start in range(0, count, window) for i in _by_rank(shuffled[start : start + window], lengths, strata)
    ]
    at = order(per_epoch, 2 * epoch + 1, seed)[at]
    return mixed[at * batch_size : (at + 1) * batch_size]


def _by_rank(indices: Sequence[int], lengths: Sequence[int], strata: Sequence[int | None] | None) -> list[int]:
    classes: dict[int | None, list[int]] = {}
    for i in indices:
        classes.setdefault(None if strata is None else strata[i], []).append(i)
    rank = {}
    for members in classes.values():
        for place, i in enumerate(sorted(members, key=lambda i: lengths[i])):
            rank[i] = (place + 0.5) / len(members)
    return sorted(indices, key=rank.__getitem__)
