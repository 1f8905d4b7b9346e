"""The quantization_config of a folder, wherever its writer put it.

Most stand in config.json. Exports of vision-language models have theirs inside the part that is quantized
(text_config). AutoGPTQ's first folders have a quantize_config.json only, AutoAWQ's a quant_config.json.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import awq, files, gptq, hqq

AWQ_CONFIG = "quant_config.json"
_KEY = "quantization_config"
_ACTIVATIONS = ("input_activations", "output_activations")
_OLDER_KEY = "compression_config"  # compressed-tensors' first name for it


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a folder, its quant_method in lower case, empty for HQQ's own files, None for floats.

    ValueError for one that names no quant_method, and for several that differ.
    """
    path = folder / "config.json"
    content = files.read_object(path)
    found = {"": content[_KEY]} if content.get(_KEY) is not None else dict(_inside(content))
    if not found and content.get(_OLDER_KEY) is not None:
        found = {"": content[_OLDER_KEY]}
    for part, said in found.items():
        if not (isinstance(said, dict) and isinstance(said.get("quant_method"), str)):
            raise ValueError(
                f"{path}: its quantization_config{part and ' in ' + part} names no quant_method; add the "
                "one that the weights are stored by, such as gptq, awq or compressed-tensors"
            )
    if found:
        (part, said), *others = found.items()
        for other, another in others:
            if another != said:
                raise ValueError(
                    f"{path}: the quantization_config in {part} and that in {other} differ, and one for "
                    "the whole model is read; put that beside model_type, outside of both"
                )
        return said | {"quant_method": said["quant_method"].lower()}
    if (folder / hqq.FILE).is_file():
        return {}
    for name, method in ((gptq.CONFIG, gptq.METHOD), (AWQ_CONFIG, awq.METHOD)):
        if (folder / name).is_file():
            said = files.read_object(folder / name)
            named = said.get("quant_method") or method
            return said | {"quant_method": named.lower() if isinstance(named, str) else named}
    return None


def _inside(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name of the part, its quantization_config) of the parts of a config."""
    for name, part in content.items():
        if isinstance(part, dict) and name != _KEY:
            where = f"{path}.{name}" if path else name
            if part.get(_KEY) is not None:
                yield where, part[_KEY]
            yield from _inside(part, where)


def weight_only(said: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A quantization_config as if what goes into and out of the layers were not quantized, and None, or what it says of
    that."""
    groups = said.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    named = sorted({n for g in groups.values() if isinstance(g, dict) for n in _ACTIVATIONS if g.get(n)})
    if said.get("act_bits") not in (None, 16, 32):  # auto-round's
        named.append("act_bits")
    if not named:
        return said, None
    plain = {key: g | dict.fromkeys(_ACTIVATIONS) if isinstance(g, dict) else g for key, g in groups.items()}
    return said | ({"config_groups": plain} if groups else {}) | {"act_bits": None}, " and ".join(named)


def untold(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without any quantization_config."""
    return {
        name: untold(part) if isinstance(part, dict) else part
        for name, part in content.items()
        if name not in (_KEY, _OLDER_KEY)
    }


def forget(config: Any) -> None:
    """Take the quantization_config out of a transformers config and of its parts: the model in memory is not of it."""
    for key in (_KEY, _OLDER_KEY):
        vars(config).pop(key, None)
    for part in vars(config).values():
        if hasattr(part, "model_type") and hasattr(part, "__dict__"):
            forget(part)
