"""auto-round's own exports: GPTQ's tensors (version 1, no g_idx) or AWQ's, told apart by packing_format.

Half of the scales of a symmetric one are negative.
"""

import re
from types import ModuleType
from typing import Any

from . import awq, gptq
from .folder_format import gathered
from .protocol import Make, Quantization

METHOD = "auto-round"
_FORMS = {"auto_round:auto_gptq": gptq, "auto_round:auto_awq": awq}
_PATTERN = set("*+?^$()[]{}|\\")  # a name of extra_config with one of these is a pattern, found anywhere


def check_config(quantization: Quantization, where: object) -> tuple[ModuleType, dict[str, Any]]:
    """(module, quantization_config as that module reads it). ValueError naming what cannot be read."""
    packing, kind = str(quantization.get("packing_format")), quantization.get("data_type", "int")
    if packing not in _FORMS or kind != "int":
        raise ValueError(
            f"{where}: auto-round weights of data_type {kind!r:.40} in packing_format "
            f"{packing!r:.60}; supported are int in {' and '.join(_FORMS)}"
        )
    if quantization.get("act_bits") not in (None, 16, 32):
        raise ValueError(
            f"{where}: activations are quantized too (act_bits {quantization['act_bits']!r:.40}), which qzo does not "
            "compute; qzo.from_pretrained(..., weight_only=True), on the command line --weight-only, trains the "
            "weights as if they were not"
        )
    form = _FORMS[packing]
    plain = {name: quantization.get(name) for name in ("bits", "group_size", "sym")}
    extra = _dynamic(quantization.get("extra_config") or {}, where)
    symmetric = plain["sym"] is True and all(changes.get("sym", True) for changes in extra.values())
    plain |= {"version": "gemm", "zero_point": not symmetric} if form is awq else {"dynamic": extra}
    form.check_config(plain, where)
    return form, plain


def _dynamic(extra: object, where: object) -> dict[str, dict[str, Any]]:
    """extra_config, what single layers have instead, as gptq.py's `dynamic`: names before patterns."""
    if not isinstance(extra, dict) or not all(isinstance(value, dict) for value in extra.values()):
        raise ValueError(f"{where}: extra_config must be layers and what they change, got {extra!r:.80}")
    names = {f"{re.escape(name)}$": changes for name, changes in extra.items()}
    return names | {f".*(?:{name})": changes for name, changes in extra.items() if _PATTERN & set(name)}


def packer(quantization: Quantization, where: object) -> Make:
    """make(layer, {part: tensor}) of a quantization_config: the PackedWeight of a layer; ValueError as check_config."""
    form, plain = check_config(quantization, where)
    return form.packer(plain, where)


# GPTQ's parts are AWQ's and a g_idx that is never there; both layouts have scales of one name and order
FORMAT = gathered(METHOD, check_config, packer, gptq.PARTS, gptq.SCALES)
