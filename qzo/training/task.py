"""A task: examples, the batches made of them, and what the model scores on them; with or without a frozen prefix."""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..loss import own_loss
from ..loss.head import has_encoder
from ..loss.label_bias import Biases, add_biases_, biases_of, fit_label_bias
from ..loss.linear_probe import scores_and_states
from ..loss.losses import loss_sums, losses, model_inputs, option_scores, pair
from ..system.progress import tracked
from .buckets import Buckets, next_step, padding_bounds
from .compiled import Compiled
from .data import IGNORED, Batch, Example, batch_indices, check_one_kind, collate, padded
from .packing import PACKINGS, joining_pays, one_token_each, packed_batch, row_of, rows_batch, sharing_pays, why_not
from .prefix import FrozenPrefix, PrefixCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measure = dict[str, float | None]
FITTED = 1024  # examples that label biases are fitted on, at the most


class Look(NamedTuple):
    """What a model makes of n examples with options, on the CPU: scores float32 [n, O], labels int64 [n]; of a
    classification its `Task.classes`, and the hidden states [n, H] behind the scores, in the dtype they have in the
    model, where they were asked for and the head's input can be read."""

    scores: torch.Tensor
    label: torch.Tensor
    classes: tuple[int, ...] | None
    states: torch.Tensor | None


class Task:
    """Examples on a model. With a FrozenPrefix, forwards start at the first trained block from cached states.

    Options of several tokens share one pass of their prompt where that costs less and the model computes the
    same. packing: "auto", and a batch is one row without padding on the same two conditions (packing.py); or "off".
    A model that refuses is named in a warning. pad_id: 0 stands in for one that the model does not know, as padding is
    masked. ValueError for examples of several kinds, another packing, tokens or
    lengths that the model has no row of a table for, or a model whose own loss is another (own_loss.py).

    bucketed: pad batches to a few shapes (buckets.py); None: on a CUDA device, where steps are captured by shape. The
    losses are the same but for rounding, so it must not depend on whether they are. compiled: the model's body is
    called through a `Compiled` (compiled.py) when a step runs, not where the task is measured.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        examples: Sequence[Example],
        pad_id: int,
        prefix: FrozenPrefix | None = None,
        packing: str = "off",
        bucketed: bool | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        check_one_kind(examples)  # now, not at the first step whose batch mixes them
        if packing not in PACKINGS:
            raise ValueError(f"packing={packing!r}: known are {', '.join(PACKINGS)}")
        self.model, self.examples, self.pad_id = model, examples, pad_id
        self.prefix, self.packing = prefix, packing
        check_ids_and_lengths(model, examples)
        if pad_id >= known_tokens(model):
            self.pad_id = 0
        self.device = next(model.parameters()).device
        self.bucketed = self.device.type == "cuda" if bucketed is None else bucketed
        if has_encoder(model):  # its rows have another decoder's
            self.bucketed, self.packing = False, "off"
        self.compiled = compiled
        own_loss.check(model, collate(examples[:1], self.pad_id, self.device))  # before a prefix skips its blocks

    @functools.cached_property
    def buckets(self) -> Buckets:
        """The Buckets of the examples' rows."""
        several, sizes = _several(self.examples), []
        for example in self.examples:
            width = max(map(len, self._rows(example, several)))
            sizes.append((width, self._targets(example, several)))
        return Buckets(sizes, padding_bounds(self.model.config))

    @functools.cached_property
    def shares(self) -> bool:
        """Whether options stand behind one prompt: decided when first asked, outside of any evaluation."""
        return _several(self.examples) and sharing_pays(self.examples) and self._packs(self.examples)

    @functools.cached_property
    def joins(self) -> bool:
        """Whether batches that gain by it become one row; decided as `shares` is."""
        if self.packing == "off":
            return False
        return self.shares if _several(self.examples) else self._packs(self.examples)

    def _packs(self, examples: Sequence[Example]) -> bool:
        reason = why_not(self.model, examples, self.pad_id, self.device)
        if reason:
            warnings.warn(f"{type(self.model).__name__} runs without packed rows: {reason}", stacklevel=4)
        return reason is None

    def check(self) -> None:
        """ValueError where a forward from the prefix's states is not the model's own (prefix.py)."""
        if self.prefix is not None:
            batch = collate(self.examples[:2], self.pad_id, self.device)
            self.prefix.check({key: batch[key] for key in ("input_ids", "attention_mask")})

    def fingerprint(self) -> str:
        """A text that differs where the examples do."""
        return repr(self.examples)

    def notes(self) -> dict[str, Any]:
        """Nothing: the loop's own numbers are all."""
        return {}

    def settle(self) -> tuple[bool, bool]:
        """Decide both now, on the scales as they are: a resumed run has to decide as the unbroken one did."""
        return self.shares, self.joins

    @functools.cached_property
    def cache(self) -> tuple[PrefixCache, list[int]]:
        """(PrefixCache, the first of its rows for each example)."""
        assert self.prefix is not None, "asked for with a prefix only"
        rows: list[tuple[int, ...]] = []
        first_row: list[int] = []
        several = _several(self.examples)
        for example in self.examples:
            first_row.append(len(rows))
            rows += self._rows(example, several)

        def inputs(some: list[Any]) -> dict[str, Any]:
            if several and self.shares:
                return model_inputs(self.model, rows_batch(some, self.pad_id, self.device))
            return padded([(ids, None) for ids in some], self.pad_id, self.device)

        return PrefixCache(self.prefix, rows, inputs), first_row

    def indices(self, step: int, batch_size: int, seed: int) -> list[int]:
        """The examples of a step (data.batch_indices)."""
        lengths, strata = self._lengths_and_strata
        return batch_indices(step, lengths, batch_size, seed, strata)

    @functools.cached_property
    def _lengths_and_strata(self) -> tuple[list[int], list[int | None]]:
        return [len(example.ids) for example in self.examples], [example.label for example in self.examples]

    def closure(self, indices: Sequence[int], count: int) -> Callable[[], torch.Tensor]:
        """A function that returns the loss of each of `count` evaluations over these examples, float32 [count].

        The batch and the prefix's states are made here, outside the perturbed forward that calls the function.
        """
        return functools.partial(self.losses, self.batch(indices, count), count)

    def losses(self, batch: Batch, count: int) -> torch.Tensor:
        """The loss of each of `count` evaluations over a `batch`, float32 [count]."""
        with self.starting(batch):
            return losses(self.model, batch, count)

    def compiled_losses(self, batch: Batch, count: int) -> torch.Tensor:
        """The same through the compiled body, if there is one."""
        with self._body():
            return self.losses(batch, count)

    def compiled_sums(self, batch: Batch, count: int, centred: bool = False) -> torch.Tensor:
        """What those are the means of, as `loss_sums` gives it, through the compiled body too."""
        with self._body(), self.starting(batch):
            return loss_sums(self.model, batch, count, centred)

    def _body(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.compiled is None else self.compiled.body()

    def scores(self, batch_size: int = 32, first: int | None = None) -> torch.Tensor:
        """float32 [examples, options] of a task with options, in the order of the examples; first: of so many."""
        return self.look(batch_size, first, with_states=False).scores.to(self.device)

    @torch.no_grad()
    def look(self, batch_size: int = 32, first: int | None = None, with_states: bool = True) -> Look:
        """One pass over the examples of a task with options, or the first of them, in their order."""
        batches, scores, states = self._by_length(batch_size, len(self.examples[:first])), [], []
        reads = with_states and self.classes is not None
        for indices in tracked(batches, "evaluating", "batches"):
            batch = self.batch(indices, 1)
            with self.starting(batch):
                some, read = scores_and_states(self.model, batch) if reads else (option_scores(self.model, batch), None)
            scores.append(some.cpu())
            states += [] if read is None else [read.cpu()]
        place = torch.tensor([i for indices in batches for i in indices]).argsort()
        found = torch.cat(states)[place] if len(states) == len(scores) else None
        return Look(torch.cat(scores)[place], self.labels()[:first].cpu(), self.classes, found)

    def scores_of(self, batch: Batch) -> torch.Tensor:
        """float32 [B, options] of a `batch` for one evaluation."""
        with self.starting(batch):
            return option_scores(self.model, batch)

    def evaluate(self, batch_size: int = 32, fitted: bool = False) -> Measure:
        """{"loss", "accuracy"}: mean over examples; of a task without options over labelled tokens, and accuracy None.
        So exp(loss) is then the perplexity, and no batch size changes what is meant. fitted: with label biases fitted
        on these very examples, for a run that fits the model's own when it ends."""
        if self.examples[0].options is not None:
            scores, label, _, _ = self.look(batch_size, with_states=False)
            return measure(scores + fit_label_bias(scores, label) if fitted else scores, label)
        total, count = 0.0, 0
        for indices in tracked(self._by_length(batch_size, len(self.examples)), "evaluating", "batches"):
            tokens = sum(self._targets(self.examples[i], False) for i in indices)
            total += float(self.closure(indices, 1)()) * tokens
            count += tokens
        return {"loss": total / count, "accuracy": None}

    @functools.cached_property
    def classes(self) -> tuple[int, ...] | None:
        """The tokens of the options, where these are the same and one token each in all examples: a classification."""
        options = self.examples[0].options
        if options is None or _several(self.examples) or any(e.options != options for e in self.examples):
            return None
        return tuple(token for (token,) in options)

    def fit_biases_(self) -> Biases:
        """Fit a label bias per class on the first examples, and add it to the model's; returns all that it has then."""
        assert self.classes is not None, "asked for of a classification only"
        scores, label, _, _ = self.look(first=FITTED, with_states=False)
        bias = fit_label_bias(scores, label)
        return add_biases_(self.model, self.classes, bias.tolist())

    def labels(self) -> torch.Tensor:
        """int64 [examples]: the right option of each."""
        return torch.tensor([e.label for e in self.examples], device=self.device)

    def _by_length(self, batch_size: int, count: int) -> list[list[int]]:
        """Batches of the first `count` examples, of similar length: little padding."""
        order = sorted(range(count), key=lambda i: (len(self.examples[i].ids), i))
        return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]

    def batch(self, indices: Sequence[int], count: int, among: Sequence[int] | None = None) -> Batch:
        """The batch of these examples for `count` evaluations, stacked; with the prefix's output as `states`.

        among: the examples of the whole step, where these are a rank's part of them: rows that are not joined have the
        width they have in the batch of all, so that they also have the bits.
        """
        examples = [self.examples[i] for i in indices]
        several = _several(examples)
        rows = [self._rows(example, several) for example in examples]
        lengths = of_all = [len(row) for some in rows for row in some]
        if among is not None:
            step = [self.examples[i] for i in among]
            of_all = [len(row) for example in step for row in self._rows(example, _several(step))]
        join = self.joins and joining_pays(of_all)
        shape: tuple[int, int | None] | None = None
        if self.bucketed:
            shape = self._shape(examples, several, lengths if join else of_all, join)
        elif among is not None and not join:
            shape = max(of_all), None
        if join or (several and self.shares):
            batch = packed_batch(examples, self.pad_id, self.device, join, shape)
        else:
            batch = collate(examples, self.pad_id, self.device, shape)
        biases = biases_of(self.model)
        if biases and "option_ids" in batch:
            rows_of_biases = [[biases.get(token, 0.0) for (token,) in example.options] for example in examples]
            batch["option_bias"] = torch.tensor(rows_of_biases, device=self.device)
        if self.prefix is not None:
            cache, first_row = self.cache
            numbers = [first_row[i] + k for i, some in zip(indices, rows, strict=True) for k in range(len(some))]
            width = batch["input_ids"].shape[1]
            batch["states"] = (cache.joined if join else cache.batch)(numbers, lengths, width)
        return pair(batch, count)

    def starting(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """What the model runs a batch in."""
        return contextlib.nullcontext() if self.prefix is None else self.prefix.skipped(batch["states"])

    def _shape(self, examples: Sequence[Example], several: bool, lengths: list[int], join: bool) -> tuple[int, int]:
        """(tokens, targets) of the batch's rows, of which one holds all if they are joined."""
        if not join:
            return self.buckets.shape(max(lengths))
        count = sum(self._targets(example, several) for example in examples)
        return next_step(sum(lengths)), next_step(count) if count else len(examples)

    def _targets(self, example: Example, several: bool) -> int:
        """How many places of a row of the example are read to predict a token."""
        if example.options is None:
            first = 0 if has_encoder(self.model) else 1  # a decoder behind an encoder predicts its first label too
            return sum(label != IGNORED for label in example.labels[first:])
        return 0 if not several else (sum if self.shares else max)(map(len, example.options))

    def rows(self, example: Example) -> list[tuple[int, ...]]:
        """The rows of tokens that an example goes through the model as, if none are joined."""
        return self._rows(example, _several(self.examples))

    def _rows(self, example: Example, several: bool) -> list[Any]:
        """The rows of tokens an example needs: its ids, or its options behind them in one row or a row each."""
        if not several:
            return [example.ids]
        return [row_of(example)] if self.shares else [example.ids + option for option in example.options]


def measure(scores: torch.Tensor, label: torch.Tensor) -> Measure:
    """{"loss", "accuracy"} of option scores [B, O] against labels [B]."""
    loss = torch.nn.functional.cross_entropy(scores.float(), label)
    return {"loss": float(loss), "accuracy": float((scores.argmax(1) == label).double().mean())}


def known_tokens(model: "PreTrainedModel") -> float:
    """How many tokens the model knows; infinity where it does not say."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    except (AttributeError, NotImplementedError):
        return math.inf


def check_ids_and_lengths(model: "PreTrainedModel", examples: Sequence[Example]) -> None:
    """ValueError for a token or a place that the model has no row for: a GPU would end the process."""
    known, longest = known_tokens(model), 0
    for number, example in enumerate(examples, 1):
        behind = example.options or ()
        highest = max(map(max, filter(None, (example.ids, example.labels, *behind))))
        if highest >= known:
            raise ValueError(
                f"example {number} has the token {highest}, {type(model).__name__} knows {known}: the "
                "tokenizer is another model's"
            )
        longest = max(longest, len(example.ids) + max(map(len, behind), default=0), len(example.labels or ()))
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for name, module in model.named_modules():  # a table has a row or two more, or begins behind padding's
        if (
            isinstance(module, torch.nn.Embedding)
            and ("pos" in name or name.endswith("wpe"))
            and places <= module.num_embeddings <= places + 2
        ):
            free = 0 if module.padding_idx is None else module.padding_idx + 1
            most = min(places, module.num_embeddings - free)
            if longest > most:
                raise ValueError(
                    f"an example has {longest} tokens, {type(model).__name__} has places for {most}: give "
                    f"--max-length {most}"
                )


def _several(examples: Sequence[Example]) -> bool:
    """Whether some option has several tokens."""
    return examples[0].options is not None and not one_token_each(examples)
