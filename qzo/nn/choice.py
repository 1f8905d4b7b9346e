"""Which layers of a float model are quantized, and in which groups: from_pretrained, quantize_, transformers'
quantizer, `qzo quantize` and what is predicted of a model all ask here.

Quantized is what can be loaded back and computes the same from codes: nn.Linear and transformers' Conv1D (GPT-2's,
whose weight is transposed), and none of a subclass: those compute something of their own (Llama 4's router gives two
tensors) or others read their weight (nn.MultiheadAttention's). Dense stay, by default,
    heads                       names in HEADS and what lies inside; with "lm_head" the output head under any name, and
                                a weight that is tied to another tensor
    towers and projectors       of a model of several parts all that is no text part (`text_parts`)
    weights that others read    the owner's code multiplies by `self.NAME.weight` itself, as Mamba does by dt_proj's
A layer whose inputs the group size does not divide takes the largest of 128, 64, 32 below it that does, else its whole
row, else stays dense; one warning tells of all of them, `strict` refuses them instead.
"""

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..kernels.table import named_table
from ..kernels.tiles import GROUPS
from ..system.progress import tracked
from .experts import split_experts_, stack_widths
from .layers import arena_of, layers
from .linear import QZOLinear
from .quantize import check_form, quantize_weight
from .weights import check_group_size

Skip = Sequence[str | Callable[[str], bool]]  # how names end, and for `choose` functions of a name
Model = TypeVar("Model", bound=nn.Module)
HEADS = ("lm_head", "score", "classifier", "qa_outputs")
_OTHER_INPUTS = {"image", "video", "audio", "time"}
_STRICT = "; without strict=True this layer alone takes another"
_TABLE_BLOCK = 32  # bitsandbytes has no smaller ones, so a layer of a table has to fill them to be loaded back


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A layer that is quantized: W [out_features, in_features], `group_size` inputs sharing a scale.

    transposed: the module holds W^T, as Conv1D does
    """

    module: Any
    in_features: int
    out_features: int
    group_size: int
    transposed: bool = False

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """W of the tensor that the module or a file holds."""
        return weight.T.contiguous() if self.transposed else weight


def sizes_of(module: Any) -> tuple[int, int] | None:
    """(out_features, in_features) of a module that a QZOLinear can stand for, else None."""
    if type(module) is nn.Linear:
        return module.out_features, module.in_features
    return (module.nf, module.nx) if is_transposed(module) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D; by name: nothing here imports transformers."""
    return (type(module).__name__, type(module).__module__) == ("Conv1D", "transformers.pytorch_utils")


def quantize_(
    module: Model,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    skip: Skip = HEADS,
    table: str | Sequence[float] | None = None,
    strict: bool = False,
) -> Model:
    """Replace the Linears inside `module` by QZOLinears, in place, and return the module.

    Which ones, qzo/nn/choice.py says above: heads, tied weights, towers and projectors stay dense. Stacked experts are
    split into Linears first. A tower of a model of several parts is quantized by a call on the tower itself.

    Parameters
    ----------
    module
        Any module; for a bare Linear use `QZOLinear.from_linear`.
    bits, group_size, symmetric, table
        As in `QZOLinear.from_linear`.
    skip
        What has a name that ends in one of these (a whole dotted part, or several), and what lies inside, stays as it
        is.
    strict
        Refuse a group_size that does not divide a layer's inputs, instead of taking another for it with a warning.

    Raises
    ------
    ValueError
        When there is nothing to replace, and where strict refuses; the module is then unchanged.
    """
    check_form(bits, symmetric, named_table(table))
    replaced = {}
    wanted = choose_(module, group_size, skip, strict, named_table(table))
    for name, chosen in tracked(wanted.items(), "quantizing", "layers"):
        parent, _, child = name.rpartition(".")
        old = chosen.module
        if id(old) not in replaced:
            weight = quantize_weight(
                chosen.matrix(old.weight.detach()), chosen.group_size, symmetric, bits, named_table(table)
            )
            replaced[id(old)] = QZOLinear.from_packed(weight, None if old.bias is None else old.bias.detach())
        setattr(module.get_submodule(parent), child, replaced[id(old)])
    arena_of(module, exact=True)
    return module


def choose_(
    module: nn.Module,
    group_size: int | None = 128,
    skip: Skip = HEADS,
    strict: bool = False,
    table: Sequence[float] | None = None,
    quiet: bool = False,
) -> dict[str, Chosen]:
    """name -> Chosen of all that `quantize_` replaces; experts are split for that, in place. Raises as it does."""
    if sizes_of(module):
        raise ValueError("quantize_ replaces the Linears inside a module; for a bare one use QZOLinear.from_linear")
    choose(module, group_size, skip, strict, table, quiet=True)
    split_experts_(module, _Skipped(module, skip).by_name)
    return choose(module, group_size, skip, strict, table, quiet)


def choose(
    module: nn.Module,
    group_size: int | None = 128,
    skip: Skip = HEADS,
    strict: bool = False,
    table: Sequence[float] | None = None,
    quiet: bool = False,
) -> dict[str, Chosen]:
    """name -> Chosen of what is quantized of a module whose experts, if it has some, are split already.

    A module under several names is there under each. skip: as `quantize_` takes it, or functions of a name among them.
    group_size None: as `group_for` has it. Warns, unless `quiet`, of
    layers with another group size. ValueError for a group size that the kernels lack, where nothing is to be quantized,
    and where `strict` refuses.
    """
    found = _candidates(module, _Skipped(module, skip))
    stacks = stack_widths(module, _Skipped(module, skip).by_name)
    if not found and not stacks and not layers(module, trainable=None):
        raise ValueError(_nothing(module, skip))
    if group_size is None:
        group_size = _common([k for _, _, k in found.values()])
    if strict or group_size not in (-1, *GROUPS):
        for name, width in ({name: k for name, (_, _, k) in found.items()} | stacks).items():
            try:
                check_group_size(group_size, width)
            except ValueError as error:
                raise ValueError(f"{name}: {error}{_STRICT if strict else ''}") from None
    chosen: dict[str, Chosen] = {}
    other: dict[int, list] = {}
    for name, (layer, n, k) in found.items():
        size = fitting_group(group_size, k, table)
        if size:
            chosen[name] = Chosen(layer, k, n, size, is_transposed(layer))
        if size not in (group_size, k if group_size == -1 else group_size):
            other.setdefault(size if size in (0, *GROUPS) else -1, []).append((name, k))
    if other and not quiet:
        warnings.warn(_another(group_size, other, len(found)), stacklevel=3)
    return chosen


def fitting_group(group_size: int, in_features: int, table: Sequence[float] | None = None) -> int:
    """The number of inputs of a layer that share a scale where `group_size` is asked for; 0: it stays dense."""
    if group_size in (-1, in_features):
        return in_features
    fits = [g for g in GROUPS if g <= group_size and in_features % g == 0]
    if fits:
        return max(fits)
    return 0 if table is not None and in_features % _TABLE_BLOCK else in_features


def group_for(model: nn.Module, group_size: int | None = None) -> int:
    """The group size given, or the largest of 128, 64, 32 that divides the inputs of every layer to quantize, those
    apart that no group divides."""
    return _common([layer.in_features for layer in choose(model, None, quiet=True).values()], group_size)


def _common(widths: Sequence[int], group_size: int | None = None) -> int:
    widths = [width for width in widths if width % min(GROUPS) == 0]
    fitting = (g for g in sorted(GROUPS, reverse=True) if all(width % g == 0 for width in widths))
    return next(fitting) if group_size is None else group_size


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module of all that from_pretrained would quantize, each once."""
    once = {id(layer.module): (name, layer.module) for name, layer in reversed(choose(model, quiet=True).items())}
    return dict(reversed(once.values()))


# ---------------------------------------------------------------------------------------------- what stays dense


def text_parts(model: Any) -> list[str] | None:
    """Names of the parts that read text, of a transformers model of several parts; None of a model that is one.

    It has several parts where its config has a text config inside, of another class than its own. Text parts are its
    decoder and every model inside with a config and a vocabulary of its own that is given tokens and no pictures or
    sound; the rest is towers and projectors. A model with one config (Whisper) is one part, whatever it reads.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or type(config.get_text_config(decoder=True)) is type(config):
        return None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = [
        name for name, m in model.named_modules() if m is not model and (m is decoder or _reads_text(m, model.config))
    ]
    return names or None


def _reads_text(module: nn.Module, outer: Any) -> bool:
    config, inputs = getattr(module, "config", None), getattr(module, "input_modalities", ())
    inputs = {inputs} if isinstance(inputs, str) else set(inputs)
    own = config is not None and config is not outer and getattr(config, "vocab_size", None)
    return bool(own) and "text" in inputs and not inputs & _OTHER_INPUTS


class _Skipped:
    """What of a module stays dense by its name, its place or its ties."""

    def __init__(self, module: nn.Module, skip: Skip) -> None:
        self._skip, self._parts, self._heads, self._tied = tuple(skip), text_parts(module), (), set()
        if "lm_head" in self._skip:
            head = getattr(module, "get_output_embeddings", lambda: None)()
            self._heads = () if head is None else tuple(name for name, m in module.named_modules() if m is head)
            tied = getattr(module, "all_tied_weights_keys", None) or {}
            self._tied = {*tied, *tied.values()}

    def by_name(self, name: str) -> bool:
        """Whether the names in `skip` tell so, or it is in no text part; of modules and stacks of experts."""
        dotted = f".{name}."
        outside = self._parts is not None and not any(dotted.startswith(f".{part}.") for part in self._parts)
        return outside or name in self._heads or any(s(name) if callable(s) else f".{s}." in dotted for s in self._skip)

    def __call__(self, name: str, owner: nn.Module) -> bool:
        return self.by_name(name) or f"{name}.weight" in self._tied or _is_read(type(owner), name.rpartition(".")[2])  # type: ignore[arg-type]


@functools.cache
def _is_read(owner: type, child: str) -> bool:
    """Whether code of the class `owner` multiplies by the weight of its `child` without calling it."""
    try:
        text = inspect.getsource(owner)
    except (OSError, TypeError):  # typed at a prompt, or built in
        return False
    weight = rf"self\.{re.escape(child)}\.weight"
    return re.search(rf"{weight}\s*@|@\s*{weight}\b", text) is not None


def _candidates(module: nn.Module, skipped: Callable[[str, nn.Module], bool]) -> dict[str, tuple[nn.Module, int, int]]:
    """name -> (module, out_features, in_features) of what is not skipped."""
    modules = dict(module.named_modules(remove_duplicate=False))
    sizes = {name: sizes_of(m) for name, m in modules.items()}
    return {
        name: (modules[name], *found)
        for name, found in sizes.items()
        if found and not skipped(name, modules[name.rpartition(".")[0]])
    }


# ---------------------------------------------------------------------------------------------- what is said


def _another(group_size: int, other: dict[int, list[tuple[str, int]]], count: int) -> str:
    """other: group size (-1 the whole row, 0 none) -> [(layer, its inputs)]."""
    does = {-1: "take their whole row", 0: "stay dense and frozen"}
    parts = [
        f"{len(found)} {does.get(size, f'take groups of {size}')} (the first: {found[0][0]}, {found[0][1]} inputs)"
        for size, found in sorted(other.items(), reverse=True)
    ]
    return (
        f"group_size={group_size} does not divide the inputs of {sum(map(len, other.values()))} of {count} layers: "
        f"{', '.join(parts)}; strict=True refuses such a model"
    )


def _nothing(module: nn.Module, skip: Skip) -> str:
    skip = ", ".join(dict.fromkeys(map(repr, skip)))
    matrices = [m for m in module.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    held = sorted({type(m).__name__ for m in matrices})
    return (
        f"{type(module).__name__} has no nn.Linear to quantize (skip: {skip or 'none'}), nor a Conv1D of transformers: "
        f"its matrices are in {', '.join(held) or 'no module'}; leave out of skip what is meant, or give another model"
    )
