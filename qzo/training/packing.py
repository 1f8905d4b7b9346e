"""Rows without waste: options behind the one prompt they share, examples behind one another without padding.

A token at place j of a row is seen from places j to seen_until[j] - 1. That one number per token says it all:

    shared    [prompt | option 1 | option 2 ...]    the prompt is seen to the row's end, an option to its own
    joined    [example 1 | example 2 ...]           an example, in either form, is seen to its own end
    padding                                         a token of padding is seen by itself

Positions start again at 0 with each example, and after the prompt with each option, so that every token sees
what it would see in a row of its own. Attention, though, is computed for all pairs of a row, seen or not:
`price` weighs that against the tokens saved. And not every model can do it (sliding windows, ALiBi, recurrent
layers, kernels that take no such mask): `why_not` compares hidden states on real examples, and where it
objects, rows stay as they are.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..loss.head import head_input
from ..loss.losses import model_inputs, pair
from ..system.memory import is_out_of_memory
from .data import IGNORED, Batch, Example, check_one_kind, pad, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKINGS = ("off", "auto")
PAIRS_PER_TOKEN = 1024  # pairs of attention that cost a token's way through the linears; 2200 measured
LONGEST = 4096  # tokens of a joined row: its mask holds 64 MB of float32
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of tokens and where it is read; tuples of ints.

    ids, positions, seen_until [T]: tokens, their position_ids, the place before which each is seen
    sources [N]: places whose hidden states the output head reads, in the order of the tokens to predict
    targets [N]: the token to predict at each; slots [N]: the option of the row it belongs to
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    seen_until: tuple[int, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


def row_of(example: Example, one_token: bool = False) -> Row:
    """The row of an example. one_token: the prompt alone, read at its end, for options of one token each."""
    ids, width = example.ids, len(example.ids)
    if example.options is None:
        read = [t for t in range(width - 1) if example.labels[t + 1] != IGNORED]
        return _causal(ids, read, [example.labels[t + 1] for t in read])
    if one_token:
        return _causal(ids, [width - 1], [IGNORED])
    total = width + sum(map(len, example.options))
    positions, seen_until = [*range(width)], [total] * width
    sources: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    for slot, option in enumerate(example.options):
        start, end = len(positions), len(positions) + len(option)
        positions += range(width, width + len(option))
        seen_until += [end] * len(option)
        sources += [width - 1, *range(start, end - 1)]
        targets += option
        slots += [slot] * len(option)
    ids += tuple(itertools.chain(*example.options))
    return Row(ids, tuple(positions), tuple(seen_until), tuple(sources), tuple(targets), tuple(slots))


def _causal(ids: tuple[int, ...], sources: Sequence[int], targets: Sequence[int]) -> Row:
    width = len(ids)
    seen_until, slots = (width,) * width, (0,) * len(sources)
    return Row(ids, tuple(range(width)), seen_until, tuple(sources), tuple(targets), slots)


def joined(rows: Sequence[Row], slots: int = 1) -> Row:
    """One row of several, none of which sees another. slots: options in each, to number them through."""
    starts = [0, *itertools.accumulate(map(len, rows))]
    parts = [
        dataclasses.replace(
            row,
            seen_until=tuple(s + start for s in row.seen_until),
            sources=tuple(s + start for s in row.sources),
            slots=tuple(s + slots * number for s in row.slots),
        )
        for number, (row, start) in enumerate(zip(rows, starts, strict=False))
    ]
    return Row(
        *(tuple(itertools.chain(*(getattr(part, field.name) for part in parts))) for field in dataclasses.fields(Row))
    )


def packed_batch(
    examples: Sequence[Example],
    pad_id: int,
    device: torch.device | str | None = None,
    join: bool = False,
    shape: tuple[int, int | None] | None = None,
) -> Batch:
    """A batch for `losses` in which options share their prompt; join: and all examples one row, unpadded.

    int64 [R, T], R the number of examples or 1: input_ids, position_ids, seen_until
    int64 [R, N]: sources, and for labels and options of several tokens targets (-100: none) and slots
    beside them, as `collate` gives them: option_ids [B, O], or options O; label [B]

    shape: (T, N) instead of what the rows need; the batch is then `static` (losses.py) if it has targets; N may be
    None, and only T is given
    ValueError when the examples are not of one kind, or a static batch has no target.
    """
    check_one_kind(examples)
    one_token = one_token_each(examples)
    count = len(examples[0].options or (None,))
    rows = [row_of(example, one_token) for example in examples]
    rows = [joined(rows, count)] if join else rows
    batch = rows_batch(rows, pad_id, device, shape or (None, None))
    if examples[0].options is not None:
        batch["label"] = torch.tensor([e.label for e in examples], device=device)
        if one_token:
            del batch["targets"], batch["slots"]
            batch["option_ids"] = torch.tensor([[o[0] for o in e.options] for e in examples], device=device)
        else:
            batch["options"] = count
    if shape and shape[1] is not None and "targets" in batch:
        if not any(row.targets for row in rows):
            raise ValueError("no position of the batch carries a label: every entry of labels is -100")
        batch["static"] = True
    return batch


def rows_batch(
    rows: Sequence[Row],
    pad_id: int,
    device: torch.device | str | None = None,
    shape: tuple[int | None, int | None] = (None, None),
) -> Batch:
    """The tensors of rows, padded on the right; shape: (T, N), None for what the rows need."""
    width, count = shape
    width, count = width or max(map(len, rows)), count or max(len(row.sources) for row in rows)

    def padded_to(name: str, size: int, value: int) -> torch.Tensor:
        return pad([getattr(row, name) for row in rows], size, value, device)

    batch = {
        "input_ids": padded_to("ids", width, pad_id),
        "position_ids": padded_to("positions", width, 0),
        "seen_until": padded_to("seen_until", width, 0),
    }
    return {
        **batch,
        "sources": padded_to("sources", count, 0),
        "targets": padded_to("targets", count, IGNORED),
        "slots": padded_to("slots", count, 0),
    }


def one_token_each(examples: Sequence[Example]) -> bool:
    """Whether the examples have options, all of one token."""
    return examples[0].options is not None and all(len(o) == 1 for e in examples for o in e.options)


def price(rows: int, width: int) -> float:
    """What `rows` rows of `width` tokens cost, in tokens: themselves, and the pairs of their attention."""
    return rows * (width + width * width / PAIRS_PER_TOKEN)


def sharing_pays(examples: Sequence[Example]) -> bool:
    """Whether prompts that options share cost less, over these examples, than a row for each option."""
    rows = shared = 0.0
    for e in examples:
        rows += price(len(e.options), len(e.ids) + max(map(len, e.options)))
        shared += price(1, len(e.ids) + sum(map(len, e.options)))
    return shared < rows


def joining_pays(lengths: Sequence[int]) -> bool:
    """Whether one row of all costs less than rows of these lengths, padded to the longest."""
    return sum(lengths) <= LONGEST and price(1, sum(lengths)) < price(len(lengths), max(lengths))


def why_not(
    model: "PreTrainedModel",
    examples: Sequence[Example],
    pad_id: int,
    device: torch.device | str | None = None,
) -> str | None:
    """None when the model computes packed rows of these examples as it computes plain ones; else why not.

    The longest and behind it the shortest example, joined, against plain rows: the hidden states of every
    token may be apart by 8 eps of their norm, eps that of the activations, but by 1e-4 in float32.
    SmolLM2-135M's rounding came to 1.6e-6 in float32, 0.0025 in float16 (allowed: 0.0078), 0.033 in bfloat16
    (0.0625); another mask or position gives 0.1 and more.
    """
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no mask of this kind (sdpa and eager do)"
    ends = [max(examples, key=_tokens), min(examples, key=_tokens)]
    one_token = one_token_each(examples)
    row = joined([row_of(example, one_token) for example in ends])
    plain, places, start = [], [], 0
    for example in ends:
        prompt, behind = range(start, start + len(example.ids)), start + len(example.ids)
        for option in [()] if one_token else example.options or [()]:
            plain.append((example.ids + option, None))
            places.append([*prompt, *range(behind, behind + len(option))])
            behind += len(option)
        start = behind
    with torch.no_grad():
        want = head_input(model, padded(plain, pad_id, device))
        try:
            packed = pair(rows_batch([row], pad_id, device), 2)  # two evaluations, as in a step
            got = head_input(model, model_inputs(model, packed, 2))[0]
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            return f"its forward refuses them ({' '.join(str(error).split())[:160]})"
    apart = max(_apart(got[here], states[: len(here)]) for here, states in zip(places, want, strict=True))
    if apart <= max(8 * torch.finfo(want.dtype).eps, 1e-4):
        return None
    return f"its hidden states come out {apart:.1g} of their norm apart"


def _apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest distance of two states [T, H] of a token, over the norm of what is wanted."""
    want = want.float()
    return float(((got.float() - want).norm(dim=1) / want.norm(dim=1)).max())


def _tokens(example: Example) -> int:
    return len(example.ids) + max(map(len, example.options or [()]))
