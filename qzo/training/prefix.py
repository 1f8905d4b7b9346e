"""The frozen prefix: when only the top blocks train, the blocks below them need to run once per example, not per step.

Their output is kept per example (rows of float [tokens, hidden]); a forward then starts at the first trained block.

Terms (prefix): docs/glossary.md.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ..loss.head import forward, has_encoder, head_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Reached(Exception):
    """Raised at the first trained block to leave a forward early."""


class FrozenPrefix:
    """Everything below the top `train_layers` blocks of a decoder.

    Parameters
    ----------
    model : a transformers model whose blocks stand in one nn.ModuleList of config.num_hidden_layers entries
    train_layers : how many of the top blocks train

    Raises ValueError when there are fewer blocks, none can be found, or an encoder stands before a decoder.
    """

    def __init__(self, model: "PreTrainedModel", train_layers: int) -> None:
        if has_encoder(model):
            raise ValueError(
                f"{type(model).__name__} has an encoder before its decoder: train it whole (without train_layers)"
            )
        name, blocks = decoder_blocks(model)
        if not 1 <= train_layers <= len(blocks):
            raise ValueError(f"train_layers={train_layers}: {type(model).__name__} has {len(blocks)} blocks")
        self.model = model
        self.below = list(blocks[: len(blocks) - train_layers])
        self.first = blocks[len(blocks) - train_layers]
        self.trained_names = tuple(f"{name}.{i}." for i in range(len(self.below), len(blocks)))

    def trains(self, layer_name: str) -> bool:
        """Whether a layer of this dotted name lies in a trained block."""
        return layer_name.startswith(self.trained_names)

    @torch.no_grad()
    def states(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Input of the first trained block for model inputs [B, T]: [B, T, hidden]."""
        caught = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        handle = self.first.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with contextlib.suppress(_Reached):
                forward(self.model, inputs)
        finally:
            handle.remove()
        return caught[0]

    @contextlib.contextmanager
    def skipped(self, states: torch.Tensor) -> Iterator[None]:
        """Inside, the model's forward starts from `states` [rows, T, hidden] at the first trained block."""
        for block in self.below:
            block.forward = _pass_on
        if self.below:  # with no block below, the model makes these states itself
            self.below[-1].forward = lambda *_, **__: states
        try:
            yield
        finally:
            for block in self.below:
                del block.forward

    def check(self, inputs: dict[str, Any]) -> None:
        """Raise ValueError unless the split forward gives the bits of the whole one on these inputs."""
        states = self.states(inputs)
        with torch.no_grad():
            whole = head_input(self.model, inputs)
            with self.skipped(states):
                split = head_input(self.model, inputs)
        if not torch.equal(whole, split):
            raise ValueError(
                f"{type(self.model).__name__} does not run the same from its block {len(self.below)} on: "
                "train it whole (without train_layers)"
            )


class PrefixCache:
    """States of the frozen prefix for a fixed list of token rows, made when first needed and kept.

    Rows are grouped by length once, and a group is always computed whole: a row's states have the same bits whichever
    batch asks first, so a resumed run sees what the unbroken one saw. Groups beyond `max_bytes` are dropped, the least
    recently used first, and made again when needed.

    rows: sequences of tokens; inputs(rows): the model's inputs for some of them, padded on the right.
    """

    GROUP = 32

    def __init__(
        self,
        prefix: FrozenPrefix,
        rows: Sequence[Any],
        inputs: Callable[[list[Any]], dict[str, Any]],
        max_bytes: int = 4 << 30,
    ) -> None:
        self.prefix, self.rows, self.inputs, self.max_bytes = prefix, rows, inputs, max_bytes
        by_length = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        self.groups = [by_length[at : at + self.GROUP] for at in range(0, len(rows), self.GROUP)]
        self.group_of = {i: g for g, members in enumerate(self.groups) for i in members}
        self._held: collections.OrderedDict[int, dict[int, torch.Tensor]] = collections.OrderedDict()
        self._bytes = 0

    def batch(self, indices: Sequence[int], lengths: Sequence[int], width: int) -> torch.Tensor:
        """States [len(indices), width, hidden] of the rows' first `lengths` tokens, zero beyond."""
        found = self._states(indices, lengths)
        out = found[0].new_zeros(len(found), width, found[0].shape[1])
        for row, states in zip(out, found, strict=True):
            row[: len(states)] = states
        return out

    def joined(self, indices: Sequence[int], lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
        """The same states behind one another: [1, width, hidden]; width: the sum of the lengths, or zero beyond it."""
        found = torch.cat(self._states(indices, lengths))
        return functional.pad(found, (0, 0, 0, (width or len(found)) - len(found))).unsqueeze(0)

    def _states(self, indices: Sequence[int], lengths: Sequence[int]) -> list[torch.Tensor]:
        return [self._group(self.group_of[i])[i][:length] for i, length in zip(indices, lengths, strict=True)]

    def _group(self, number: int) -> dict[int, torch.Tensor]:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        members = self.groups[number]
        states = self.prefix.states(self.inputs([self.rows[i] for i in members]))
        self._held[number] = {i: s[: len(self.rows[i])].clone() for i, s in zip(members, states, strict=True)}
        self._bytes += self._size(number)
        while self._bytes > self.max_bytes and len(self._held) > 1:
            oldest = next(iter(self._held))
            self._bytes -= self._size(oldest)
            del self._held[oldest]
        return self._held[number]

    def _size(self, number: int) -> int:
        return sum(states.nbytes for states in self._held[number].values())


def _pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def decoder_blocks(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """(dotted name, nn.ModuleList) of a transformers model's blocks. ValueError when there is no such list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(
        f"{type(model).__name__} holds its blocks in no list of {count} entries: train_layers cannot be used"
    )
