"""Experts: a mixture's stacked weights as one nn.Linear each, so that they can be quantized and run under evaluations.

transformers keeps the experts of a layer as gate_up_proj [X, 2I, H] and down_proj [X, H, I]. Routing moves rows: which
expert sees a row depends on the evaluation that the row is under. So the evaluations run one after another here,
and a row block has the bits that it has alone.
"""

import typing
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from .linear import QZOLinear

# in a file's names -> in the model's: Mixtral's checkpoints keep the names of its first code, and servers look for them
_RENAMED = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


Activation = Callable[[torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) of rows [R, H], without biases; weights are views of the stacks."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Activation) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Experts(nn.ModuleList):
    """In place of a transformers module of stacked experts; its forward is theirs, an evaluation at a time."""

    def __init__(self, stacked: nn.Module) -> None:
        with torch.no_grad():
            super().__init__(
                [
                    Expert(gate_up, down, typing.cast(Activation, stacked.act_fn))
                    for gate_up, down in zip(
                        stacked.get_parameter("gate_up_proj"), stacked.get_parameter("down_proj"), strict=True
                    )
                ]
            )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [R, H], the experts of each row and their weights [R, k] -> [R, H]."""
        found = [module for module in self.modules() if isinstance(module, QZOLinear)]
        evaluations = found[0].evaluations if found else None
        if evaluations is None:
            return self._mixed(hidden_states, top_k_index, top_k_weights)
        count = len(evaluations)
        if len(hidden_states) % count:
            raise ValueError(
                f"{len(hidden_states)} rows do not divide into {count} evaluations: stack the batch "
                f"{count} times along its first dimension (qzo.pair does it)"
            )
        blocks = zip(*(x.chunk(count) for x in (hidden_states, top_k_index, top_k_weights)), strict=True)
        parts = []
        try:
            for e, block in enumerate(blocks):
                one = evaluations[e : e + 1]
                for layer in found:
                    layer.evaluations = one
                parts.append(self._mixed(*block))
        finally:
            for layer in found:
                layer.evaluations = evaluations
        return torch.cat(parts)

    def _mixed(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for number, row, place in _chosen(index, len(self)):
            y.index_add_(0, row, (self[number](x[row]) * weights[row, place, None]).to(y.dtype))
        return y


def _chosen(index: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (expert, the rows that chose it, as which of their choices) of a choice [R, k] among `count` experts."""
    if index.is_meta:  # memory is predicted: the routing is not known, so rows are spread evenly
        rows = index.new_empty(-(-index.numel() // count))
        yield from ((number, rows, rows) for number in range(count))
        return
    for number in index.unique().tolist():
        yield number, *torch.where(index == number)


def _none(name: str) -> bool:
    return False


def stack_widths(module: nn.Module, kept: Callable[[str], bool] = _none) -> dict[str, int]:
    """Name -> in_features of the weights in every stack that `split_experts_` would split."""
    return {
        f"{name}.{part}": weight.shape[2]
        for name, m in _stacks(module, kept).items()
        if _known(m)
        for part, weight in m.named_parameters(recurse=False)
    }


def split_experts_(module: nn.Module, kept: Callable[[str], bool] = _none) -> None:
    """Replace every module of stacked experts in `module` by Experts, in place; those of a name that is `kept` stay.

    Warns once of stacks in a form that it does not know (biases, transposed or interleaved weights, a gate of their
    own): they stay dense and frozen.
    """
    stacks = _stacks(module, kept)
    other = {name: m for name, m in stacks.items() if not _known(m)}
    for name in stacks.keys() - other.keys():
        split_(module, name)
    if other:
        kinds = ", ".join(sorted({type(m).__name__ for m in other.values()}))
        warnings.warn(
            f"{len(other)} stacks of experts stay dense and frozen ({kinds}): only gate_up_proj and "
            "down_proj without biases, gate before up, can be quantized",
            stacklevel=3,
        )


def split_(module: nn.Module, name: str) -> None:
    """Replace the stacked experts of this dotted name by Experts."""
    owner, _, child = name.rpartition(".")
    setattr(module.get_submodule(owner), child, Experts(module.get_submodule(name)))


def stack_of(module: nn.Module, name: str) -> str | None:
    """Name of the stacked experts, of a known form, that a weight of one expert belongs to; None where there are
    none."""
    owner, found, _ = name.rpartition(".experts.")
    owner += ".experts"
    modules = dict(module.named_modules())
    return owner if found and owner in modules and _stacked(modules[owner]) and _known(modules[owner]) else None


def model_name(name: str) -> str:
    """The name in the model of a tensor or layer of a file."""
    return _renamed(name, _RENAMED.items()) if ".block_sparse_moe." in name else name


def file_name(name: str, model_type: str) -> str:
    """The name in a new file of a tensor or layer of a model of this type: `model_name` undone."""
    undone = [(new, old) for old, new in _RENAMED.items()]
    return _renamed(name, undone) if model_type == "mixtral" and ".mlp." in name else name


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    dotted = f"{name}."  # a layer's name may end where a tensor's goes on
    for old, new in pairs:
        dotted = dotted.replace(old, new)
    return dotted.removesuffix(".")


def _stacks(module: nn.Module, kept: Callable[[str], bool]) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if name and _stacked(m) and not kept(name)}


def _stacked(module: nn.Module) -> bool:
    own = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return bool(own) and "Experts" in type(module).__name__


def _known(module: nn.Module) -> bool:
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        all(getattr(module, name, None) == wanted for name, wanted in flags.items())
        and not getattr(module, "has_post_expert_norm", False)  # transformers 5.17 has none
        and getattr(gate, "__name__", "") == "_default_apply_gate"
        and {name for name, _ in module.named_parameters(recurse=False)} == {"gate_up_proj", "down_proj"}
    )
