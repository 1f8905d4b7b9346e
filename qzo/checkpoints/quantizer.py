"""transformers' own front door: its from_pretrained makes QZOLinear, its save_pretrained writes the source's format.

A float checkpoint is quantized with `quantization_config=QZOConfig(...)`; folders of 4-bit weights load inside
`loading()`. transformers reads and renames the tensors; the quantizer here takes each layer's as a PackedWeight
and puts the QZOLinears in when all is read: as buffers of a module, transformers would fill them anew at the end.
The package is imported without transformers, this module when one of its names is first used.
"""

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, _IdentityOp
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..kernels.tiles import GROUPS
from ..nn.choice import HEADS, Chosen, choose, sizes_of
from ..nn.experts import stack_widths
from ..nn.layers import arena_of, layers
from ..nn.quantize import quantize_weight
from ..nn.weights import PackedWeight, check_bits, check_group_size
from ..system.memory import Trimmer
from . import state
from .fill import put_packed
from .formats import GATHERED, floats, safetensors_file
from .formats.protocol import Gathered, Quantization
from .names import Names
from .new_folder import own_config
from .source import Source, set_source, source_of

METHOD = "qzo"
_SETTINGS = ("bits", "group_size", "symmetric", "skip", "strict")
HELD_ELEMENT_BYTES = 0.625  # of a stored weight: 4 bits and a float32 scale for each 32


@register_quantization_config(METHOD)
class QZOConfig(QuantizationConfigMixin):
    """How transformers' from_pretrained quantizes the Linears of a float checkpoint while it loads.

    The config of a model that is loaded holds one with a `source`: the quantization_config of the format that the
    model is saved in.

    Parameters
    ----------
    bits, group_size, symmetric, strict
        As in `qzo.from_pretrained`.
    skip
        Layers that stay dense, beside those that always do (heads, tied weights, towers, projectors; qzo/nn/choice.py):
        how their names end, or regular expressions of how they begin.

    Raises
    ------
    ValueError
        For other bits or group sizes.
    TypeError
        For a skip that is no list of names.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        skip: Sequence[str] = ("lm_head",),
        strict: bool = False,
    ) -> None:
        check_bits(bits)
        check_group_size(group_size, math.lcm(*GROUPS))
        if isinstance(skip, str) or not all(isinstance(name, str) for name in skip):
            raise TypeError(f"skip={skip!r}: expected a list of names, such as ('lm_head',)")
        self.quant_method = METHOD
        self.bits, self.group_size, self.symmetric, self.strict = bits, group_size, symmetric, strict
        self.skip = list(skip)
        self.source: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what `to_dict` gave: its own arguments, or the quantization_config of another format."""
        own = config_dict.get("quant_method", METHOD) == METHOD
        arguments = {name: value for name, value in config_dict.items() if own and name != "quant_method"}
        unknown = sorted(set(arguments) - set(_SETTINGS))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no settings of QZOConfig, which has {', '.join(_SETTINGS)}")
        made = super().from_dict(arguments, return_unused_kwargs, **kwargs)
        (made[0] if return_unused_kwargs else made).source = None if own else copy.deepcopy(config_dict)
        return made

    def to_dict(self) -> dict[str, Any]:
        """The arguments, or the source's own dictionary."""
        if self.source is not None:
            return copy.deepcopy(self.source)
        return {"quant_method": METHOD} | {name: getattr(self, name) for name in _SETTINGS}


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Inside, transformers loads folders of GPTQ, AWQ, auto-round and compressed-tensors weights with QZOLinear.

    That is everything that calls from_pretrained: AutoModel classes, pipelines, trainers that are given a path.
    It holds for the whole process; transformers' own quantizers are back on exit, also after an error.
    """
    known = AUTO_QUANTIZATION_CONFIG_MAPPING
    named = {name for method in GATHERED for name in (method, method.upper(), method.title(), method.capitalize())}
    before = {name: known[name] for name in named if name in known}
    known.update(dict.fromkeys(named, QZOConfig))
    try:
        yield
    finally:
        for name in named - before.keys():
            known.pop(name, None)
        known.update(before)


@register_quantizer(METHOD)
class QZOQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model; QZOConfig and `loading` lead here."""

    def __init__(self, quantization_config: QZOConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._chosen: dict[str, Chosen] = {}  # what is quantized
        self._stored: set[torch.nn.Parameter] = set()  # weights that a 4-bit folder may hold as codes
        self._packed: dict[str, tuple[PackedWeight, str]] = {}  # name of a weight -> it, where it came from
        self._errors: list[str] = []
        self._files: list[Path] = []
        self._names: Any = None  # of a 4-bit folder's tensors: Names
        self._make: Any = None  # what makes its layers: protocol.Make
        self._info: Any = None  # transformers' own, of what is missing and what is left
        self._kept_in_float32: Any = None
        self._trimmer: Any = None

    is_trainable = is_qat_trainable = True

    @property
    def _form(self) -> Gathered:
        """The format of a 4-bit folder, whose quant_method may be written in capitals."""
        return GATHERED[self.quantization_config.source["quant_method"].lower()]

    def is_serializable(self) -> bool:
        return True

    # ------------------------------------------------------------------------------------------ before the weights

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        source = self.quantization_config.source
        if self.pre_quantized and source is None:
            raise ValueError(
                "config.json: quant_method 'qzo' is no format of weights; save such a model with qzo.save_pretrained"
            )
        if self.pre_quantized:
            self._make = self._form.packer(source, "config.json")
        if isinstance(device_map, dict):
            _check_one(device_map.values())

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        self._files, self._trimmer = [Path(file) for file in checkpoint_files or ()], Trimmer()
        if self.pre_quantized and not all(file.suffix == ".safetensors" for file in self._files):
            raise ValueError(f"{self._files[0]}: 4-bit weights are read from safetensors files only; fetch those")
        config = self.quantization_config
        if self.pre_quantized:
            self._names = Names(model)
            head = model.get_output_embeddings()
            self._stored = {m.weight for m in model.modules() if sizes_of(m) and m is not head}
            return
        if stack_widths(model):
            raise ValueError(
                f"{type(model).__name__} keeps its experts in one tensor, which cannot be quantized while "
                "transformers loads it; use qzo.from_pretrained"
            )
        self._chosen = choose(model, config.group_size, (*HEADS, _Patterns(config.skip)), config.strict)
        # a weight is quantized from the numbers in the file, not from what they are in the model's dtype
        self._kept_in_float32 = model._keep_in_fp32_modules_strict
        model._keep_in_fp32_modules_strict = {
            *(self._kept_in_float32 or ()),
            *(rf"^{re.escape(name)}\.weight$" for name in self._chosen),
        }

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return not self.pre_quantized and param_name.removesuffix(".weight") in self._chosen

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if param in self._stored:
            return HELD_ELEMENT_BYTES
        chosen = self._chosen.get(param_name.removesuffix(".weight"))
        if chosen is None or param is not chosen.module.weight:
            return super().param_element_size(model, param_name, param)
        return self.quantization_config.bits / 8 + 4 / chosen.group_size

    # ------------------------------------------------------------------------------------------ each weight

    def get_quantize_ops(self) -> "_Quantize":
        return _Quantize(self)

    def get_weight_conversions(self) -> list["_Stored"]:
        if not self.pre_quantized:
            return []
        # on the CPU until they are packed: a device would hold all of the file's tensors beside the packed ones
        return [_Stored([rf"\.{part}$" for part in self._form.parts], ".weight", [_IdentityOp()], force_cpu=True)]

    def get_new_dtype(self, converter: Any, param: torch.Tensor, dtype: Any) -> Any:
        return None if isinstance(converter, _Stored) else super().get_new_dtype(converter, param, dtype)

    def quantized(self, name: str, tensor: torch.Tensor) -> PackedWeight:
        """The PackedWeight of a float weight that was read."""
        chosen, config = self._chosen[name.removesuffix(".weight")], self.quantization_config
        return quantize_weight(chosen.matrix(tensor.cpu()), chosen.group_size, config.symmetric, config.bits)

    def take(self, model: Any, name: str, make: Callable[[], PackedWeight], where: str, missing: set[str]) -> None:
        """Hold the PackedWeight that make() gives for the weight `name`, one of the `missing` until now.

        A ValueError of it is raised after loading: here transformers would make a report of many lines of it.
        """
        try:
            packed = make()
            self._packed[name] = packed, where
            self._trimmer.took(packed.codes.nbytes)
        except ValueError as error:
            self._errors.append(f"{where}: {error}")
        model.get_parameter(name)._is_hf_initialized = True  # it stays on the meta device
        missing.discard(name)

    def take_stored(self, model: Any, name: str, source: str, parts: dict[str, torch.Tensor], info: Any) -> None:
        """The same for the tensors {part: tensor} of the layer that the file calls `source`."""
        self._info, layer = info, name.removesuffix(".weight")
        first = self._form.parts[0]
        if source != layer:
            self._names.changed[source] = layer

        def make() -> PackedWeight:
            if first not in parts:
                raise ValueError(f"not beside {' and '.join(sorted(parts))}: the checkpoint is incomplete")
            return self._make(source, parts)

        self.take(model, name, make, f"{source}.{first}", info.missing_keys)

    # ------------------------------------------------------------------------------------------ after the weights

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if not self.pre_quantized:
            model._keep_in_fp32_modules_strict = self._kept_in_float32
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [conversion for conversion in used if not isinstance(conversion, _Stored)]
        if self._errors:
            raise ValueError(self._errors[0])
        self._check_homes(model)
        device = _device(model)
        while self._packed:
            name, (packed, where) = self._packed.popitem()
            put_packed(model, name, packed, where, device)
            self._trimmer.took(packed.codes.nbytes)
        self._chosen, self._stored, self._info, self._trimmer = {}, set(), None, None
        if not layers(model, trainable=None):
            raise ValueError(f"{type(model).__name__}: the checkpoint holds no 4-bit linear layer of this model")
        model.requires_grad_(False)
        arena_of(model, exact=True)
        source = self._source(model)
        if source is not None:
            set_source(model, source)
        if not self.pre_quantized:
            self.quantization_config = QZOConfig.from_dict(own_config(model))
            model.config.quantization_config = self.quantization_config

    def _check_homes(self, model: Any) -> None:
        """ValueError for 4-bit weights of a module that is there and has no such Linear: experts held as one tensor."""
        modules = dict(model.named_modules())
        for key in sorted(self._info.unexpected_keys if self._info else ()):
            owner = key.removesuffix(".weight")
            while owner and owner not in modules:
                owner = owner.rpartition(".")[0]
            held = [p for p in modules[owner]._parameters.values() if p is not None] if owner else []
            stacked = any(p.dim() == 3 for p in held)  # transformers 5.17 has other names for what it gathers
            if held and (key.endswith(".weight") or stacked):
                raise ValueError(
                    f"{key}: {owner} of {type(model).__name__} is a {type(modules[owner]).__name__}, "
                    "which has no nn.Linear for it; load such a model with qzo.from_pretrained"
                )

    def _source(self, model: Any) -> Source | None:
        """Where the model came from, None if there are no files to tell."""
        config = self._files[0].parent / "config.json" if self._files else None
        if config is None or not config.is_file():
            return None
        folder, used = config.parent.resolve(), {config, *self._files} if self.pre_quantized else {config}
        sizes = tuple((folder / file.name, file.stat().st_size) for file in sorted(used))
        for name in (name for file in self._files if self.pre_quantized for name in safetensors_file.places(file)):
            self._names(name)
        names = tuple(self._names.changed.items()) if self.pre_quantized else ()
        method = self._form.method if self.pre_quantized else floats.METHOD
        return Source(method, folder, sizes, model.dtype, names)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return state.tensors(model), {}


class _Patterns:
    """Whether transformers' patterns fit a name."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = patterns

    def __call__(self, name: str) -> bool:
        return not should_convert_module(name, self.patterns)

    def __repr__(self) -> str:
        return ", ".join(map(repr, self.patterns))


class _Quantize(ConversionOps):
    """Quantizes each weight that transformers has read, on the CPU: the same bits on every machine."""

    def __init__(self, quantizer: QZOQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **_: Any
    ) -> dict[str, Any]:
        rest = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.quantizer.param_needs_quantization(model, name):
                make = functools.partial(self.quantizer.quantized, name, tensor)
                self.quantizer.take(model, name, make, name, missing_keys)
            else:
                rest[name] = value
        return rest


class _Stored(WeightConverter):
    """Gathers the tensors of a quantized layer and gives them to the quantizer instead of to the model."""

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Any]:
        [source] = {key.rpartition(".")[0] for key in self.layer_targets[layer_name]}
        parts = {pattern[2:-1]: tensors[0] for pattern, tensors in self.materialize_tensors().items()}
        hf_quantizer.take_stored(model, layer_name, source, parts, loading_info)
        return {}


def _check_one(devices: Iterable[object]) -> None:
    devices = sorted(set(map(str, devices)))
    if len(devices) > 1:
        raise ValueError(
            f"device_map spreads the model over {', '.join(devices)}: all that trains must be on one "
            "device; give device_map='cuda' or 'cpu'"
        )


def _device(model: Any) -> torch.device:
    """The device of the dense tensors. ValueError if there are several."""
    _check_one(getattr(model, "hf_device_map", {}).values())
    held = [t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta]
    _check_one(held)
    return held[0]


def attach(model: Any, quantization: Quantization | None) -> None:
    """Let transformers' save_pretrained write a model that qzo.from_pretrained loaded: `state.tensors` tells how.

    quantization: the quantization_config of its folder; None or empty where there is none.
    """
    source = source_of(model)
    if source is None or source.copied is None:  # saved as a new folder, by the model's own names
        quantization, model._weight_conversions = own_config(model), []
    config = QZOConfig.from_dict(dict(quantization or {}))
    if quantization:
        model.config.quantization_config = config
    model.hf_quantizer = QZOQuantizer(config)
