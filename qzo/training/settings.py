"""What decides a run's result, beside the model and the data."""

import dataclasses

from ..optim.defaults import CLIP, EPS, FLOOR

PAPER = dict(
    learning_rate=1e-7,
    eps=1e-3,
    clip=100.0,
    noise="gaussian",
    relative=False,
    floor=0.0,
    directions=1,
    batch_size=16,
    decay=1.0,
)
LEARNING_RATE_PER_DIRECTION = 2e-2  # relative; one pair over a small batch diverges at twice this
DECAY = 0.1  # the learning rate falls linearly to this part of itself


@dataclasses.dataclass
class Settings:
    """What decides a run's result, beside the model and the data. `learning_rate` None: 2e-2 per direction.
    `cuda_graph` decides nothing of it, only how steps are launched; None: as graphs on a CUDA device. `large_rows`
    "auto" becomes "fused" in `fit` unless rounded weights are measured to keep the signal (large_rows.py)."""

    max_steps: int = 200
    batch_size: int = 8
    learning_rate: float | None = None
    eps: float = EPS
    clip: float = CLIP
    directions: int = 4
    noise: str = "rademacher"
    relative: bool = True
    sharing: str = "group"
    large_rows: str = "auto"
    sequential: bool = False
    floor: float = FLOOR
    decay: float = DECAY
    seed: int = 0
    train_layers: int | None = None
    max_length: int = 1024
    packing: str = "off"
    train_codebooks: bool = False
    cuda_graph: bool | None = None
    compile: bool = False

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "directions", "max_length"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: an int >= 1 is wanted")
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATE_PER_DIRECTION * self.directions
        for name in ("seed", "train_layers"):
            if not _is_int(getattr(self, name)) and (name, self.train_layers) != ("train_layers", None):
                raise ValueError(f"{name}={getattr(self, name)!r}: an int is wanted")
        for name in ("learning_rate", "eps", "clip", "floor", "decay"):
            try:
                setattr(self, name, float(getattr(self, name)))  # YAML reads 1e-2 as a text
            except (TypeError, ValueError):
                raise ValueError(f"{name}={getattr(self, name)!r}: a number is wanted") from None
        for name in ("relative", "sequential", "train_codebooks", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: true or false is wanted")
        if not isinstance(self.cuda_graph, bool | None):
            raise ValueError(f"cuda_graph={self.cuda_graph!r}: true or false is wanted, or null (on a CUDA device)")

    def rate(self, step):
        """Learning rate of a step: linear from learning_rate to decay * learning_rate."""
        return self.learning_rate * (1 - (1 - self.decay) * step / self.max_steps)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)
