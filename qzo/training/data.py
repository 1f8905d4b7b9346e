"""JSON lines -> examples -> batches.

A line is one of

    {"prompt": "...", "completion": "..."}                  the completion's tokens are learned
    {"messages": [{"role": ..., "content": ...}, ...]}      the last (assistant) message's tokens are learned; beside
                                                            them perhaps "tools": [...], for the chat template
    {"text": "..."}                                         every token is learned
    {"prompt": "...", "options": ["...", ...], "label": 0}  the right option among them; label: its number or its text
"""

import dataclasses
import json
import warnings
from pathlib import Path

import torch

from ..kernels.noise import SEED_ROUNDS, philox4x32
from ..loss.losses import static_batch
from .encode import Encoder

IGNORED = -100
WINDOW = 16  # batches among which examples are sorted
SPLITS = ("train", "valid", "test")
_FORMS = ({"prompt", "options", "label"}, {"prompt", "completion"}, {"messages"}, {"text"})


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids and what is learned: `labels` per token (those of the decoder, if the ids are an encoder's), or
    `options` (each a tuple of ids) and the right one."""

    ids: tuple
    labels: tuple | None = None
    options: tuple | None = None
    label: int | None = None


class Line(dict):
    """A record that knows its file and line."""

    def __init__(self, record, path, number):
        super().__init__(record)
        self.path, self.number = path, number


def read_jsonl(path):
    """The Lines of a JSONL file. ValueError naming the line that is no object or has none of the known shapes."""
    path = Path(path)
    records = []
    with open(path, "rb") as file:  # bytes: a line that is no UTF-8 has its number named
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            problem = _problem(record)
            if problem:
                raise ValueError(f"{path}, line {number}: {problem}")
            records.append(Line(record, path, number))
    if not records:
        raise ValueError(f"{path} holds no examples")
    return records


def _form(record):
    """The keys that say what the record is, whatever else it has; None for no known shape."""
    return next((form for form in _FORMS if form <= record.keys()), None)


def _problem(record):
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return f"a JSON object is wanted, got {type(record).__name__}"
    form = _form(record)
    if form is None:
        return f"has the keys {sorted(record)}; wanted are prompt+completion, messages, text, or prompt+options+label"
    for key in form & {"prompt", "completion", "text"}:
        if not isinstance(record[key], str):
            return f"{key!r} must be a string, got {type(record[key]).__name__}"
    if "completion" in form and isinstance(record.get("label"), bool):
        return (
            f"'label' is {str(record['label']).lower()}, and every completion is learned: leave out the unwanted "
            "ones, and the key"
        )
    if "messages" in form:
        messages = record["messages"]
        if (
            not isinstance(messages, list)
            or not all(isinstance(m, dict) for m in messages)
            or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
        ):
            return "'messages' must be a list of {role, content}"
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            return "'messages' must end with the assistant's, which is learned, after at least one other"
        tools = record.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            return f"'tools' must be a list of objects, got {type(tools).__name__}"
    if "options" in form:
        options, label = record["options"], record["label"]
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            return "'options' must be a list of at least two non-empty strings"
        if isinstance(label, bool) or not (
            label in options if isinstance(label, str) else isinstance(label, int) and 0 <= label < len(options)
        ):
            return f"label {label!r} is not among the options {options} (nor the number of one)"
    return None


def read_data(path):
    """split -> records. path: a JSONL file (train), or a folder with train.jsonl and perhaps valid.jsonl, test.jsonl.

    FileNotFoundError when there is no such file or no train.jsonl in the folder.
    """
    path = Path(path)
    if path.is_file():
        return {"train": read_jsonl(path)}
    if not path.is_dir():
        raise FileNotFoundError(f"no data at {path}: give a JSONL file, or a folder that holds train.jsonl")
    if not (path / "train.jsonl").is_file():
        raise FileNotFoundError(f"{path} holds no train.jsonl")
    return {split: read_jsonl(path / f"{split}.jsonl") for split in SPLITS if (path / f"{split}.jsonl").is_file()}


def tokenize(records, tokenizer, max_length=1024, limit="--max-length", encoder=False):
    """Records -> Examples, by an Encoder (encode.py). A prompt that is too long loses its beginning, a text its end. A
    warning says how many lines did, another in how many a token spans the prompt's end. limit: what set max_length, for
    the messages. encoder: the model is an encoder-decoder one, whose encoder reads the prompt (cut at its end) and
    whose decoder the completion.

    ValueError, naming the line or the number of the example, for a text that cannot be encoded, for one that leaves
    nothing to predict, for a chat template that refuses, and for a completion or option longer than max_length.
    """
    texts, examples, lengths, spanning = Encoder(tokenizer), [], [], []
    convert = _for_an_encoder if encoder else _example
    for number, record in enumerate(records, 1):
        try:
            example, length, spans = convert(record, texts, max_length, limit)
        except ValueError as error:
            raise ValueError(f"{_place(record, number)}: {error}") from None
        examples.append(example)
        lengths.append(length)
        if spans:
            spanning.append(_place(record, number))
    cut = sum(length > max_length for length in lengths)
    if cut:
        warnings.warn(
            f"{cut} {_of(records)} have more than {max_length} tokens (the longest {max(lengths)}): a prompt "
            f"has lost its {'end' if encoder else 'beginning'}, a text its end ({limit})",
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


def _place(record, number):
    return f"{record.path}, line {record.number}" if isinstance(record, Line) else f"example {number}"


def _of(records):
    return f"of {len(records)} lines" + (f" of {records[0].path}" if isinstance(records[0], Line) else "")


def _example(record, encoder, max_length, limit):
    """(Example, its tokens before any were cut, whether a token spanned the prompt's end)."""
    form = _form(record)
    if form is None:
        raise ValueError(_problem(record))
    if "options" in form:
        prompt, options, spans = encoder.options(record["prompt"], record["options"])
        longest = max(options, key=len)
        label = record["label"]
        return (
            Example(
                _fitted(encoder, prompt, longest, max_length, "an option", limit),
                options=tuple(map(tuple, options)),
                label=record["options"].index(label) if isinstance(label, str) else label,
            ),
            len(prompt) + len(longest),
            spans,
        )
    if "text" in form:
        ids, own = encoder.text(record["text"])
        if min(own, max_length) < 2:
            raise ValueError(
                "the text is one token: nothing to predict"
                if own < 2
                else f"max_length={max_length} leaves one token of the text: nothing to predict ({limit})"
            )
        return Example(tuple(ids[:max_length]), labels=tuple(ids[:max_length])), len(ids), False
    if "messages" in form:
        prompt, completion, own, spans = encoder.chat(record["messages"], record.get("tools"))
    else:
        prompt, completion, own, spans = encoder.completion(record["prompt"], record["completion"])
    if len(prompt) + own < 2:
        raise ValueError("the prompt and its completion are one token together: nothing to predict")
    fitted = _fitted(encoder, prompt, completion, max_length, "a completion", limit)
    labels = (IGNORED,) * len(fitted) + tuple(completion)
    return Example(fitted + tuple(completion), labels=labels), len(prompt) + len(completion), spans


def _for_an_encoder(record, texts, max_length, limit):
    """The same for an encoder-decoder model: an Example whose labels are the decoder's."""
    if _form(record) != {"prompt", "completion"}:
        raise ValueError(
            "an encoder-decoder model learns from lines of prompt and completion; this one has "
            f"{', '.join(sorted(record))}"
        )
    ids, labels, length = texts.both(record["prompt"], record["completion"], max_length)
    if len(labels) > max_length:
        raise ValueError(f"the completion has {len(labels)} tokens, max_length={max_length} ({limit})")
    return Example(tuple(ids), labels=tuple(labels)), length, False


def _fitted(encoder, prompt, following, max_length, what, limit):
    """The prompt's ids as the `following` ones leave room for them."""
    fitted = encoder.fitted(prompt, max_length - len(following))
    if fitted is None:
        raise ValueError(
            f"{what} has {len(following)} tokens: it does not fit behind its prompt in "
            f"max_length={max_length} ({limit})"
        )
    return tuple(fitted)


def check_one_kind(examples):
    """ValueError unless all examples are of one kind, with one number of options."""
    kinds = sorted({0 if e.options is None else len(e.options) for e in examples})
    if len(kinds) > 1:
        names = ["no options" if count == 0 else f"{count} options" for count in kinds]
        raise ValueError(f"the data mixes examples with {' and '.join(names)}; give all lines the same shape")


def collate(examples, pad_id, device=None, shape=None):
    """A batch for `losses`: padded on the right. All examples are of one kind (ValueError otherwise).

    shape: (tokens, targets) of each row instead of what the examples need; the batch is then `static` (losses.py).
    """
    check_one_kind(examples)
    label = {} if examples[0].options is None else {"label": torch.tensor([e.label for e in examples], device=device)}
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
    return static_batch(batch, targets) if shape and "labels" in batch else batch


def padded(rows, pad_id, device, width=None):
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


def pad(sequences, width, value, device=None):
    """int64 [rows, width]: each sequence, then `value`."""
    return torch.tensor([[*s, *[value] * (width - len(s))] for s in sequences], device=device)


def order(count, epoch, seed):
    """A permutation of range(count) that depends on (seed, epoch) alone: by Philox, the same everywhere."""
    zero = torch.zeros((), dtype=torch.int64)
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    words = philox4x32((torch.arange(count), zero + epoch, zero, zero + 2), key, SEED_ROUNDS)
    return (words[0] << 30 | words[1] >> 2).argsort(stable=True).tolist()


def batch_indices(step, lengths, batch_size, seed, strata=None):
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


def _by_rank(indices, lengths, strata):
    classes = {}
    for i in indices:
        classes.setdefault(None if strata is None else strata[i], []).append(i)
    rank = {}
    for members in classes.values():
        for place, i in enumerate(sorted(members, key=lambda i: lengths[i])):
            rank[i] = (place + 0.5) / len(members)
    return sorted(indices, key=rank.__getitem__)
