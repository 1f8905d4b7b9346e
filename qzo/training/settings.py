"""What decides a run's result, beside the model and the data."""

import dataclasses
import math
from typing import Any

from ..kernels.noise import check_sharing, law_number
from ..nn.ops import check_large_rows
from ..optim.defaults import CLIP, EPS, FLOOR, SYNC_SECONDS
from ..optim.shares import TENSOR, check_parallel
from .encode import CHAT_LOSSES
from .packing import PACKINGS

PAPER: dict[str, Any] = dict(
    learning_rate=1e-7,
    eps=1e-3,
    clip=100.0,
    noise="gaussian",
    relative=False,
    floor=0.0,
    directions=1,
    one_sided=False,
    batch_size=16,
    decay=1.0,
    label_bias="none",
)
RATE = 2e-2  # learning rate per direction, relative to the scales, where none is measured
DECAY = 0.1  # the learning rate falls linearly to this part of itself
LABEL_BIASES = ("fit", "none")
KEEPS = ("last", "best")  # the step whose model is saved, where there is a validation split
MOST_DIRECTIONS = (1 << 16) - 1  # that a journal's records can number


@dataclasses.dataclass
class Settings:
    """What decides a run's result, beside the model and the data. Each field's range is checked here, so that a wrong
    one is refused before a model is loaded: ValueError names the field, what it was given, and its range.

    learning_rate : None or "auto": of a classification whose label biases are fitted measured (auto_rate.py), else 2e-2
        per direction; `fit` fills it in
    eps : with `relative` a part of a scale, in (0, 1]; else in the units of the scales
    one_sided : evaluate +eps of each direction alone, as `QZO` has it; None: of three directions or more
    decay : the learning rate falls linearly to this part of itself
    large_rows : "auto" becomes "fused" in `fit` unless rounded weights are measured to keep the signal (large_rows.py)
    cuda_graph : decides nothing of the result, only how steps are launched; None: as graphs on a CUDA device
    text_eos : whether the end-of-text token stands behind a `text` of the data, as it does behind a completion
    chat_loss : which messages of the assistant are learned of a conversation, the "last" or "all"
    max_cut : the share of examples that may be cut to max_length, in [0, 1]
    eval_every : steps between two measurements of the validation split; None: a tenth of the run
    patience : measurements in a row without a lower loss after which the run ends; None: it makes all its steps
    parallel : what several ranks divide among them, as `QZO` has it; decides nothing where there is one
    check_every : steps after which several ranks compare their scales; 0: never
    staleness : steps that are evaluated ahead of the scales, as `QZO` has it; 0: none
    journal_fsync : seconds of the run that a power failure may cost; 0: each step is synced to the disk
    label_bias : "fit": of a classification (the same options of one token in all examples) the steps learn what a bias
        per option cannot do, and these are fitted when the run has ended; "none": the steps learn all
    keep : "last", the last step is what is saved; or "best", the one with the lowest validation loss
    """

    max_steps: int = 200
    batch_size: int = 16
    learning_rate: float | None = None
    eps: float = EPS
    clip: float = CLIP
    directions: int = 8
    one_sided: bool | None = None
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
    text_eos: bool = True
    max_cut: float = 0.5
    chat_loss: str = "last"
    eval_every: int | None = None
    patience: int | None = None
    keep: str = "last"
    parallel: str = "data"
    check_every: int = 100
    staleness: int = 0
    journal_fsync: float = SYNC_SECONDS
    label_bias: str = "fit"

    def __post_init__(self) -> None:
        self._check_whole_numbers()
        if self.learning_rate == "auto":  # type: ignore[comparison-overlap]  # as commands and YAML say it
            self.learning_rate = None
        for name in ("learning_rate", "eps", "clip", "floor", "decay", "max_cut", "journal_fsync"):
            if name == "learning_rate" and self.learning_rate is None:
                continue
            try:
                setattr(self, name, float(getattr(self, name)))  # YAML reads 1e-2 as a text
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{name}={getattr(self, name)!r:.80}: expected a number") from None
        if self.one_sided is None:
            self.one_sided = self.directions > 2
        for name in ("one_sided", "relative", "sequential", "train_codebooks", "compile", "text_eos"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r:.80}: expected true or false")
        if not isinstance(self.cuda_graph, bool | None):
            raise ValueError(f"cuda_graph={self.cuda_graph!r:.80}: expected true or false, or null (on a CUDA device)")
        self._check_numbers()
        if self.one_sided and self.directions < 2:
            raise ValueError(
                f"directions={self.directions}: one-sided, directions are compared: give 2 or more, or pairs"
            )
        self._check_staleness()
        law_number(self.noise)
        check_sharing(self.sharing, self.relative)
        check_large_rows(self.large_rows)
        check_parallel(self.parallel)
        for name, known in (
            ("packing", PACKINGS),
            ("keep", KEEPS),
            ("chat_loss", CHAT_LOSSES),
            ("label_bias", LABEL_BIASES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r:.80}: known are {', '.join(known)}")

    def _check_staleness(self) -> None:
        if self.staleness >= self.max_steps:
            raise ValueError(
                f"staleness={self.staleness} with max_steps={self.max_steps}: every step would be evaluated on the "
                "scales before the run; give fewer than there are steps"
            )
        if self.staleness and self.cuda_graph:
            raise ValueError(
                f"staleness={self.staleness} with cuda_graph: a step whose update comes later is no one graph; leave "
                "one of them out"
            )
        if self.staleness and self.parallel == TENSOR:
            raise ValueError(
                f"staleness={self.staleness} with parallel={TENSOR!r}: all ranks work on each layer together, so none "
                "can be late; leave one of them out"
            )

    @property
    def evaluations(self) -> int:
        """Of a step."""
        return self.directions if self.one_sided else 2 * self.directions

    def _check_whole_numbers(self) -> None:
        ranges: dict[str, tuple[int, float, str]] = {
            "max_steps": (1, math.inf, "an int >= 1"),
            "batch_size": (1, math.inf, "an int >= 1"),
            "directions": (1, MOST_DIRECTIONS, f"an int from 1 to {MOST_DIRECTIONS}"),
            "max_length": (1, math.inf, "an int >= 1"),
            "seed": (-(1 << 63), (1 << 64) - 1, "an int of 64 bits, from -2**63 to 2**64 - 1"),
            "train_layers": (1, math.inf, "an int >= 1 (or none: the whole model)"),
            "eval_every": (1, math.inf, "an int >= 1 (or none: a tenth of the run)"),
            "check_every": (0, math.inf, "an int >= 0 (0: never)"),
            "staleness": (0, math.inf, "steps, an int >= 0 (0: no step runs ahead)"),
            "patience": (1, math.inf, "an int >= 1 (or none: the run makes all its steps)"),
        }
        for name, (least, most, wanted) in ranges.items():
            value = getattr(self, name)
            if value is None and wanted.count("or none"):
                continue
            if not _is_int(value) or not least <= value <= most:
                raise ValueError(f"{name}={value!r:.80}: expected {wanted}")

    def _check_numbers(self) -> None:
        finite = math.isfinite
        eps = "a number > 0 and <= 1, a part of each scale" if self.relative else "a finite number > 0"
        rate = self.learning_rate
        for name, good, wanted in (
            ("learning_rate", rate is None or (finite(rate) and rate >= 0), "a finite number >= 0"),
            ("eps", finite(self.eps) and self.eps > 0 and (self.eps <= 1 or not self.relative), eps),
            ("clip", self.clip > 0, "a number > 0 (inf: no clipping)"),
            ("floor", finite(self.floor) and self.floor >= 0, "a finite number >= 0"),
            ("decay", finite(self.decay) and self.decay >= 0, "a finite number >= 0"),
            ("journal_fsync", self.journal_fsync >= 0, "seconds >= 0 (0: each step is synced)"),
            ("max_cut", 0 <= self.max_cut <= 1, "a share from 0 to 1"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r:.80}: expected {wanted}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
