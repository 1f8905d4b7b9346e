"""Zero points of GPTQ's tensors that say themselves how they are stored.

A symmetric layer has the zero point 2^(bits - 1) in every group: stored so in version 2, less one in version 1. Whole
published models say `sym: true` and checkpoint_format "gptq" (version 1) and store 2^(bits - 1): read as the config
says, every weight would be off by one scale. Asymmetric zero points tell nothing: the config is believed.
"""

import warnings

import torch

from ...kernels.codes import middle

NAMES = {1: "gptq", 2: "gptq_v2"}  # version -> checkpoint_format


class StoredZeros:
    """The version of one checkpoint's zero points, layer by layer. version: what the config says, 1 or 2; unsure: it
    says both."""

    def __init__(self, version: int, unsure: bool = False) -> None:
        self._said, self._unsure = version, unsure
        self._first: tuple[int, str] | None = None  # (version, layer) that the first layer is read as

    def version(self, layer: str, fields: torch.Tensor, bits: int, sym: bool | None) -> int:
        """The version of a layer's zero points. fields: they as stored, uint8 [G, N]; sym: what the config says, None
        where it says nothing.

        Warns once where the words contradict the config. ValueError where they contradict each other, or `sym`.
        """
        least, most = (int(field) for field in fields.aminmax())
        known = {middle(bits) - 1: 1, middle(bits): 2}.get(least) if least == most else None
        if sym and known is None:
            found = f"all {least}" if least == most else f"numbers from {least} to {most}"
            raise ValueError(
                f"the config says sym true, for which all zero points of {bits} bits are stored as "
                f"{middle(bits) - 1} (gptq) or {middle(bits)} (gptq_v2), and these are {found}; if they "
                "are what is meant, set sym to false in the quantization_config"
            )
        told = None if sym is False else known
        if self._unsure and told is None:
            raise ValueError(
                "checkpoint_format and format of the quantization_config read its zero points "
                "differently; remove the wrong one"
            )
        version: int = self._said if told is None else told
        if self._first is None:
            self._first = version, layer
            if version != self._said:
                warnings.warn(
                    f"checkpoint_format {NAMES[self._said]!r} would read the zero points of this symmetric "
                    f"model as {least - self._said + 2}, not {middle(bits)}: they are stored as "
                    f"{NAMES[version]!r} has them, and read so",
                    stacklevel=2,
                )
        if version != self._first[0]:
            raise ValueError(
                f"its zero points are stored as checkpoint_format {NAMES[version]!r} has them and those "
                f"of {self._first[1]} as {NAMES[self._first[0]]!r}, so it cannot be told what the others "
                "mean; the files are of two checkpoints"
            )
        return version
