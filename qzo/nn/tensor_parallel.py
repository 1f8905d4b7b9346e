"""Layers cut in parts, one for each rank of torch.distributed, by the plan of a transformers model (`tp_plan`).

Codes and zero points are cut, the scales are not: part.py says what a rank then holds, and what it multiplies. A plan's
other modules (norms, embeddings, a float head) stay whole on every rank, and give what they would give in parts.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..system.ranks import Ranks
from .layers import layers
from .linear import QZOLinear
from .part import STYLES, Part

ALIASES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}  # of transformers 4
WHOLE = {"replicated_with_grad_allreduce", "mla_kv_a_proj"}  # styles that change gradients alone


def shard_(model: nn.Module, plan: Mapping[str, str] | None = None) -> dict[str, str]:
    """Cut the codes of a model's quantized layers in parts, and leave each rank its own: tensor parallelism.

    To be called on every rank of torch.distributed's default group, with the same model, whole, in it; one process
    alone keeps it whole. A forward then has all ranks at work on the same batch, and the same output on each. Scales,
    their indices and the noise stay those of the whole model, on every rank; train it with
    `qzo.QZO(..., parallel="tensor")`.

    Parameters
    ----------
    model
        Holds QZOLinear layers.
    plan
        Name of a module, with `*` for numbers in it -> how it is cut: "colwise", "colwise_gather_output", "rowwise" or
        "rowwise_split_input", as transformers names them. None: the model's own, `model.tp_plan`. What it says of
        parameters, and of modules that are no linear layers, is not looked at.

    Returns
    -------
    dict[str, str]
        Name of each layer that is cut -> how. The others stay whole.

    Raises
    ------
    ValueError
        No plan, one that cuts no QZOLinear, or cuts one in another way, or a float nn.Linear that has to be cut along
        with others; a layer that the ranks do not divide; a model that is offloaded or cut already. Nothing is changed.
    """
    ranks = Ranks()
    plan = getattr(model, "tp_plan", None) if plan is None else plan
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no tp_plan: give one, such as "
            '{"layers.*.up_proj": "colwise", "layers.*.down_proj": "rowwise"}'
        )
    parts: dict[str, Part] = {}
    for name, module in model.named_modules():
        style = _style(plan, name)
        if isinstance(module, QZOLinear):
            _check_whole(name, module)
        if isinstance(module, QZOLinear) and style is not None and style not in WHOLE:
            parts[name] = _part(model, name, module, style, ranks)
        elif type(module) is nn.Linear and style in ("colwise", "rowwise"):
            raise ValueError(
                f"{name}: the plan cuts it ({style}), but it is a float nn.Linear, and only quantized layers are cut: "
                "quantize it too, or leave it and its partners out of the plan"
            )
    if not parts:
        raise ValueError(
            f"the plan names no quantized layer of {type(model).__name__}; it names {', '.join(plan):.300}"
        )
    if ranks.count > 1:
        for name, part in parts.items():
            _cut(model.get_submodule(name), part)
    return {name: part.style for name, part in parts.items()}


def unshard_(model: nn.Module) -> None:
    """Give every rank all codes of a model that `shard_` has cut, in place: to save it, or to run it alone.

    Parameters
    ----------
    model
        As `shard_` left it; one that is whole stays as it is. To be called on every rank.
    """
    for layer in layers(model, trainable=None).values():
        if layer.part is not None:
            codes, zeros = layer.read_codes()
            layer.part = None
            layer.codes, layer.zeros = codes, zeros


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_` has cut some of its layers."""
    return any(layer.part is not None for layer in layers(model, trainable=None).values())


def _style(plan: Mapping[str, str], name: str) -> str | None:
    """How the plan cuts a module, by its name or by the name with `*` for its numbers; None: it does not name it."""
    style = plan.get(name, plan.get(re.sub(r"(?<![^.])\d+(?![^.])", "*", name)))
    return None if style is None else ALIASES.get(style, style)


def _check_whole(name: str, layer: QZOLinear) -> None:
    if layer.part is not None:
        raise ValueError(f"{name} is cut in parts already: unshard_(model) first")
    if layer.stored is not None:
        raise ValueError(
            f"{name} is offloaded, and its codes are not here to be cut: restore() what qzo.offload returned"
        )


def _part(model: nn.Module, name: str, layer: QZOLinear, style: str, ranks: Ranks) -> Part:
    """This rank's part of a layer. ValueError where there is none, naming the layer."""
    if style not in STYLES:
        raise ValueError(f"{name}: the plan cuts it {style!r}; {', '.join(map(repr, STYLES))} are what can be done")
    if style.startswith("rowwise") and layer.perm is not None:
        raise ValueError(
            f"{name}: its columns are sorted by group (act-order), so no rank's inputs are groups of their own "
            f"({style}); quantize without desc_act, or leave it and its partners out of the plan"
        )
    books = 0 if layer.codebooks is None else len(layer.codebooks)
    try:
        part = Part(
            layer.out_features, layer.in_features, layer.group_size, style, ranks, ranks.rank, layer.bits, books
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    head: Any = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    if style == "colwise" and isinstance(head, int) and layer.out_features // ranks.count % head:
        raise ValueError(
            f"{name}: {layer.out_features // head} heads of {head} cannot be divided over {ranks.count} ranks: start "
            "as many as divide them"
        )
    return part


def _cut(layer: nn.Module, part: Part) -> None:
    assert isinstance(layer, QZOLinear), "only those have parts"
    codes, zeros = part.codes_of(layer.codes), part.zeros_of(layer.zeros)
    layer.codes, layer.zeros, layer.part = codes, zeros, part
