"""What stands for the weight of a QZOLinear where a model asks its Linear for one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch


class NoValues(torch.Tensor):
    """Stands for a matrix that is never made: what it is like can be asked, nothing can be computed with it."""

    @staticmethod
    def __new__(cls, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> "NoValues":
        return torch.Tensor._make_wrapper_subclass(cls, (rows, columns), dtype=dtype, device=device)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function.__name__ in ("__get__", "size", "dim", "numel", "is_floating_point"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise RuntimeError(
            f"{function.__name__}: the weight of a QZOLinear is codes and scales and has no values of "
            "its own; layer(x) multiplies by it, layer.dequantize() makes it"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the C function that a subclass turns off by it
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        raise RuntimeError(f"{function}: the weight of a QZOLinear has no values of its own; use layer.dequantize()")

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes a text to show in place of the values
        return f"weight of a QZOLinear: {list(self.shape)}, {self.dtype}, no values (see dequantize)"
