"""What is done with all QZOLinear layers of a module: who trains, in which arena, under which evaluations."""

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn

from ..system.memory import Trimmer
from .arena import ScaleArena, codebooks_name
from .evaluations import Evaluations
from .linear import QZOLinear
from .siblings import Siblings


def layers(module: nn.Module, trainable: bool | None = True) -> dict[str, QZOLinear]:
    """name -> QZOLinear of every layer that trains (trainable=None: of all of them), in the sorted order of names."""
    found = {name: m for name, m in module.named_modules() if isinstance(m, QZOLinear)}
    return {name: found[name] for name in sorted(found) if trainable is None or found[name].trainable == trainable}


def _shapes(name: str, layer: QZOLinear, codebooks: bool) -> dict[str, tuple[int, int]]:
    """name -> (groups, outputs) of a layer's scales and of codebooks that train, whose entries lie in quads of four."""
    shapes = {name: (layer.in_features // layer.group_size, layer.out_features)}
    return shapes | ({codebooks_name(name): (4, layer.held_codebooks().numel() // 4)} if codebooks else {})


def arena_of(module: nn.Module, exact: bool = False) -> ScaleArena:
    """The arena of the module's trained layers, made on first use.

    exact: it has to hold these layers and no others, so that one launch over it is a step on this module.
    Raises ValueError when nothing in the module trains.
    """
    found = layers(module)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no QZOLinear layer that trains; quantize it first "
            "(qzo.quantize_(module)) or load a 4-bit checkpoint (qzo.from_pretrained)"
        )
    arenas = {id(layer.arena) for layer in found.values()}
    arena = next(iter(found.values())).arena
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in found.items():
        shapes |= _shapes(name, layer, layer.trains_codebooks)
    if len(arenas) == 1 and (not exact or len(arena.slots) == len(shapes)):
        return arena
    devices = {layer.codes.device for layer in found.values()}
    if len(devices) > 1:
        raise ValueError(f"the layers lie on {sorted(map(str, devices))}: all that train must be on one device")
    arena = ScaleArena.of_shapes(shapes, devices.pop())
    _introduce(module)
    trimmer = Trimmer()
    for name, layer in found.items():
        layer.join(arena, name, layer.trains_codebooks)
        trimmer.took(4 * arena.slots[name].groups * arena.slots[name].outputs)
    return arena


def _introduce(module: nn.Module) -> None:
    """Let layers that are children of one module know each other."""
    for parent in module.modules():
        children = [child for child in parent.children() if isinstance(child, QZOLinear)]
        siblings = Siblings() if len(children) > 1 else None
        for child in children:
            child.siblings = siblings


def train_only_(module: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """Freeze every QZOLinear whose name `wanted(name)` refuses; the others share a new arena.

    Frozen layers leave the arena: no memory traffic, no noise, no journal entry.

    Parameters
    ----------
    module
        Holds the layers.
    wanted
        Name of a layer in `module`, as in `named_modules` -> whether it trains.

    Returns
    -------
    list[str]
        Names of the layers that train, sorted.

    Raises
    ------
    ValueError
        None is left.
    """
    for name, layer in layers(module, trainable=None).items():
        layer.trainable = bool(wanted(name))
        if not layer.trainable:
            _freeze_codebooks(layer)
        if not layer.trainable and len(layer.arena.slots) > 1:
            _leave(layer, codebooks=False)
    arena_of(module, exact=True)
    return list(layers(module))


def train_slots_(module: nn.Module, names: Collection[str]) -> None:
    """Train what has these names in an arena, layers and codebooks of layers, as the header of a journal lists them.
    Where some are not the module's, nothing changes: comparing arenas tells that."""
    codebooks = {name for name in layers(module, trainable=None) if codebooks_name(name) in names}
    trained = set(names) - {codebooks_name(name) for name in codebooks}
    if trained <= set(layers(module, trainable=None)):
        train_only_(module, trained.__contains__)
        for name in codebooks:
            train_codebooks_(module.get_submodule(name))
        arena_of(module, exact=True)


def train_codebooks_(module: nn.Module, train: bool = True) -> list[str]:
    """Let codebooks (AQLM, arXiv 2401.06118) of the layers that train train along with the scales, or no longer.

    Their entries are then float32 in the arena, beside the layer's own, perturbed and updated as scales are, each
    keeping its sign; a layer's codebooks under one evaluation are held while it runs. Noise is each entry's own:
    sharing="row" is refused. Off by default: a codebook of 2^16 entries has more numbers than a layer has scales by a
    hundred times.

    Parameters
    ----------
    module
        Holds the layers.
    train
        False: they are frozen again, as they are now.

    Returns
    -------
    list[str]
        Names of the layers whose codebooks these are, sorted.

    Raises
    ------
    ValueError
        No layer that trains has codebooks.
    """
    found = {name: layer for name, layer in layers(module).items() if layer.codebooks is not None}
    if not found:
        raise ValueError(
            f"no layer of {type(module).__name__} that trains has codebooks: only AQLM layers have codebooks"
        )
    for layer in found.values():
        if train and not layer.trains_codebooks:
            _leave(layer, codebooks=True)
        if not train:
            _freeze_codebooks(layer)
    arena_of(module, exact=True)
    return list(found)


def _freeze_codebooks(layer: QZOLinear) -> None:
    if layer.trains_codebooks:
        layer.held_codebooks().copy_(layer.trained_codebooks())
        _leave(layer, codebooks=False)


def _leave(layer: QZOLinear, codebooks: bool) -> None:
    """Give the layer an arena of its own, with its codebooks in it or not."""
    layer.join(ScaleArena.of_shapes(_shapes("", layer, codebooks), layer.arena.data.device), "", codebooks)


def check_sharing_of(module: nn.Module, sharing: str) -> None:
    """ValueError where noise is to be shared by rows and codebooks train, which have none, or layers' rows are cut."""
    cut = [name for name, layer in layers(module).items() if layer.part is not None and layer.part.cuts_rows]
    if sharing == "row" and cut:
        raise ValueError(
            f"sharing='row' has one z for each output row, that of its first scale, which ranks that hold other inputs "
            f"of {cut[0]} do not see (rowwise); use sharing='group', or divide steps instead (parallel='data')"
        )
    if sharing == "row" and any(layer.trains_codebooks for layer in layers(module).values()):
        raise ValueError(
            "sharing='row' has one z for each output row, which codebooks that train do not have; use sharing='group'"
        )


@contextlib.contextmanager
def evaluating(module: nn.Module, evaluations: Evaluations) -> Iterator[Evaluations]:
    """Run forwards of `module` under `evaluations`: a context manager.

    Row block e of every QZOLinear's input sees scales perturbed by evaluation e; layers that do not train see theirs as
    they are. The batch has to be stacked `len(evaluations)` times along its first dimension (`qzo.pair`). Restores the
    state before on exit, also after an error.

    Parameters
    ----------
    module
        Holds the layers.
    evaluations
        E of them; they are taken to the device of the scales.

    Yields
    ------
    Evaluations
        The evaluations on the device of the scales.

    Raises
    ------
    TypeError
        `evaluations` is no Evaluations.
    ValueError
        Nothing in the module trains; noise is shared by rows and codebooks train. In a forward: rows that E does not
        divide.
    RuntimeError
        Inside `generating` of such a layer.
    """
    if not isinstance(evaluations, Evaluations):
        raise TypeError(f"evaluating() takes qzo.Evaluations(seeds, coefs), got {type(evaluations).__name__}")
    arena = arena_of(module)
    evaluations = evaluations.to(arena.data.device)
    found = list(layers(module, trainable=None).values())
    check_sharing_of(module, evaluations.sharing)
    if any(layer._planned is not None and layer._planned[1].turned is not None for layer in found):
        raise RuntimeError(
            "evaluating() inside qzo.generating(): losses would differ in their last digits from those that a journal "
            "replays; leave generating() before a step"
        )
    before = [layer.evaluations for layer in found]
    try:
        for layer in found:
            layer.evaluations = evaluations
            layer.prepare()
        yield evaluations
    finally:
        for layer, old in zip(found, before, strict=True):
            layer.evaluations = old


def scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the scales that train, in the sign of the checkpoint.

    Parameters
    ----------
    model
        Holds the layers.

    Returns
    -------
    dict[str, torch.Tensor]
        Module name -> float32 [G, N], G groups along the inputs, N outputs; on the layer's device.

    Raises
    ------
    ValueError
        Nothing in the model trains.
    """
    arena_of(model)
    return {name: layer.read_scales() for name, layer in layers(model).items()}


def codebooks(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the codebooks that train (`train_codebooks_`).

    Parameters
    ----------
    model
        Holds the layers.

    Returns
    -------
    dict[str, torch.Tensor]
        Module name -> float32 [C, 2^bits, 8], C codebooks of vectors of eight weights; empty where none train.
    """
    return {name: layer.trained_codebooks() for name, layer in layers(model).items() if layer.trains_codebooks}


def scale_index(model: nn.Module) -> dict[str, torch.Tensor]:
    """The global index by which the noise law knows each scale: what `qzo.noise` takes.

    Parameters
    ----------
    model
        Holds the layers.

    Returns
    -------
    dict[str, torch.Tensor]
        Module name -> int64 [G, N], G groups along the inputs, N outputs; on the layer's device.

    Raises
    ------
    ValueError
        Nothing in the model trains.
    """
    arena_of(model)
    return {name: layer.arena.index(layer.arena_name) for name, layer in layers(model).items()}


def digest_parts(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (name, what, tensor) of everything quantized in a fixed order: what a journal's digest covers."""
    for name, layer in layers(model, trainable=None).items():
        packed = layer.packed()
        yield name, "codes", packed.unpacked()
        yield name, "scales", packed.scales
        if packed.zeros is not None:
            yield name, "zeros", packed.zeros
        if layer.perm is not None:
            yield name, "perm", layer.perm
        if layer.table is not None:
            yield name, "table", torch.tensor(layer.table)
        books = layer.read_codebooks()
        if books is not None:
            yield name, "codebooks", books.to(torch.float32)
