"""The output head: which of the positions that a model's own forward would give logits for are computed.

A model's forward runs as it is; only what its head reads is cut to the positions that are asked for, a bounded number
at a time. So whatever stands around the head (a dense layer, a scale, a soft cap, unused rows of the vocabulary) acts
as the model has it, and the logits of a whole batch over the whole vocabulary never exist.
"""

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

Inputs = Mapping[str, Any]  # what a model's forward is given: tensors, and flags

LOGIT_BYTES = 64 << 20  # float32 logits held at once
LEAST_ROWS = 4  # of an evaluation that a CPU's head reads: MKL rounds a row among fewer otherwise than among more

_whole: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose logits are taken whole


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes an argument of this name."""
    return any(_takes(type(model).forward, name))


def forward(model: "PreTrainedModel", inputs: Inputs) -> "ModelOutput":
    """The output of a model for its inputs: no cache, no router's loss beside the logits, no dropout in any mode."""
    config = model.config.get_text_config()
    named, open_ended = _takes(type(model).forward, "use_cache")
    if named or (open_ended and hasattr(config, "use_cache")):
        inputs = {**inputs, "use_cache": False}
    if getattr(config, "output_router_logits", False):
        inputs = {**inputs, "output_router_logits": False}
    with without_dropout(model) if model.training else contextlib.nullcontext():
        return model(**inputs)


@functools.cache
def _takes(forward: Callable[..., Any], name: str) -> tuple[bool, bool]:
    """(whether the forward of a class names an argument, whether it takes any other)."""
    parameters = inspect.signature(forward).parameters
    return name in parameters, any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def logits_at(
    model: "PreTrainedModel",
    inputs: Inputs,
    row: torch.Tensor,
    column: torch.Tensor,
    copies: int = 1,
    most: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the float32 logits [E, m, V] at positions (row[i], column[i]), m of each evaluation at a time.

    row, column: int64 [N], equal blocks in the order of the evaluations that the rows of `inputs` are stacked for
    copies: E, how many evaluations these are
    most: how many of each evaluation at a time; by default what LOGIT_BYTES hold

    ValueError for a model whose output has no logits.
    """
    head, each = output_head(model), len(row) // copies
    if head is None or is_whole(model):
        logits = _logits(model, inputs)
        if head is None:
            take_whole(model, "it does not say which module its head is (get_output_embeddings)")
        yield logits[row, column].float().view(copies, each, -1)
        return
    most = most or max(1, LOGIT_BYTES // (4 * copies * _vocabulary(model, head)))
    reading = _Reading(model, head, row, column, copies)
    for start in range(0, each, most):
        logits = reading.run(inputs, start, most, again=each > most)
        if reading.rows is None:  # the head was not called, or on something else than [rows, tokens, H]
            take_whole(model, "its head is not called with hidden states [rows, tokens, features]")
            yield logits[row, column].float().view(copies, each, -1)
            return
        yield logits.float()


def head_input(model: "PreTrainedModel", inputs: Inputs) -> torch.Tensor:
    """What the output head reads, [rows, T, H]; the logits of a model without a head that is called."""
    head = output_head(model)
    if head is None or is_whole(model):
        return _logits(model, inputs)
    first = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
    reading = _Reading(model, head, first, first)
    logits = reading.run(inputs, 0, 1)
    return logits if reading.states is None else reading.states


@contextlib.contextmanager
def inputs_seen(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside, the first input of each call of `module` is put into the list that this yields."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def row_count(batch: Inputs) -> int:
    """How many rows of tokens a batch has; of one without them (a sound's), what its first tensor has. ValueError for a
    batch that holds none."""
    known = [batch.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels")]
    rows = (len(value) for value in (*known, *batch.values()) if isinstance(value, torch.Tensor) and value.dim())
    count = next(rows, None)
    if count is None:
        raise ValueError(f"the batch holds no tensor of tokens (its keys: {', '.join(batch)})")
    return count


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Every module as `eval` has it, and then as it was: two losses that are compared may not differ by dropout."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_encoder(model: "PreTrainedModel") -> bool:
    """Whether its labels are those of a decoder behind an encoder."""
    return getattr(model.config, "is_encoder_decoder", False)


def decoder_inputs(model: "PreTrainedModel", labels: torch.Tensor) -> torch.Tensor:
    """What the decoder of an encoder-decoder model is fed for labels [rows, T]: they, shifted by one place."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    config = model.config
    if config.decoder_start_token_id is None or config.pad_token_id is None:
        raise ValueError(
            f"{type(model).__name__} does not say how labels become inputs of its decoder: give "
            "decoder_input_ids beside labels"
        )
    shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, or None."""
    try:
        head = getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):  # the base class's, or of a head that is elsewhere
        head = None
    return head if isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList | nn.ModuleDict) else None


def body(model: nn.Module) -> nn.Module:
    """The module whose forward ends before the head begins: the base model, or the largest module beside the head."""
    base = getattr(model, "base_model", model)
    head = output_head(model)
    if base is not model or head is None:
        return base
    return max(_beside(model, head), key=lambda m: sum(p.numel() for p in m.parameters()), default=model)


def is_whole(model: nn.Module) -> bool:
    """Whether the logits of whole batches are computed for this model."""
    return model in _whole


def take_whole(model: nn.Module, reason: str) -> None:
    """From now on the logits of whole batches are computed; one warning says so."""
    if not is_whole(model):
        _whole.add(model)
        warnings.warn(
            f"{type(model).__name__}: the logits of all tokens are computed, not of the labelled ones alone, "
            f"which takes more memory and time: {reason}",
            stacklevel=3,
        )


class _Reading:
    """One batch on its way through a model: the head reads the rows at some positions, some of them in each run.

    states: what the head would have read, [rows, T, H]; rows: those at the positions, [E, n, H], or None
    """

    def __init__(
        self, model: "PreTrainedModel", head: nn.Module, row: torch.Tensor, column: torch.Tensor, copies: int = 1
    ) -> None:
        self.model, self.head, self.place, self.copies = model, head, (row, column), copies
        self.states: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.outputs: dict[nn.Module, list[Any]] = {}  # of the modules beside the head, in the first run

    def run(self, inputs: Inputs, start: int, count: int, again: bool = False) -> torch.Tensor:
        """The logits of rows start to start + count of each evaluation. again: keep what further runs need."""
        read = self.head.forward
        stacked = row_count(inputs)

        def forward_rows(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 3 and len(x) == stacked):
                    return read(x, *args, **kwargs)
                self.states = x
                self.rows = x[self.place].view(self.copies, -1, x.shape[-1])
            part = self.rows[:, start : start + count]
            missing = LEAST_ROWS - part.shape[1] if part.device.type == "cpu" else 0
            if missing <= 0:
                return read(part, *args, **kwargs)
            part = torch.cat([part, part[:, :1].expand(-1, missing, -1)], 1)
            return read(part, *args, **kwargs)[:, :-missing]

        with contextlib.ExitStack() as patches:
            patches.enter_context(_patched(self.head, forward_rows))
            if again:
                for module in self.beside:
                    patches.enter_context(_patched(module, self._once(module)))
            return _logits(self.model, inputs)

    @functools.cached_property
    def beside(self) -> list[nn.Module]:
        return _beside(self.model, self.head)

    def _once(self, module: nn.Module) -> Callable[..., Any]:
        """A forward that runs the first time, and then gives what it gave."""
        run, seen = module.forward, self.outputs.setdefault(module, [])
        if self.rows is not None:
            left = iter(seen)
            return lambda *args, **kwargs: next(left)

        def remember(*args: Any, **kwargs: Any) -> Any:
            seen.append(run(*args, **kwargs))
            return seen[-1]

        return remember


@contextlib.contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _beside(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules beside the way from a model to its head, lists of modules taken apart."""
    name = next(name for name, module in model.named_modules() if module is head)
    beside, owner = [], model
    for part in name.split("."):
        for child_name, child in owner.named_children():
            if child_name != part:
                beside += _called(child)
        owner = getattr(owner, part)
    return beside


def _called(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [called for child in module.children() for called in _called(child)]
    return [module]


def _logits(model: "PreTrainedModel", inputs: Inputs) -> torch.Tensor:
    output = forward(model, inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"{type(model).__name__} has no language-model head (its output has no logits): labels "
            "[rows, tokens] and options need one"
        )
    return logits


def _vocabulary(model: "PreTrainedModel", head: nn.Module) -> int:
    return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size
