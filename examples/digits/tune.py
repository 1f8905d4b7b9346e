"""Teaches the 4-bit base to draw a 9, which it never saw, by forward passes alone; says what that did to all digits.

python -m examples.digits.tune --seeds 0 1 2 --out results.jsonl --picture samples.png
"""

import argparse
import datetime
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import qzo
from examples.digits.digits import BASE, EMPTY, GROUP, UNSEEN, Digits, Reader, load, prompts, trained_reader
from examples.shared.flow import Prompted, Recipe, compared, load_base, losses, rows_to_measure, sample, tune
from qzo.bench import results
from qzo.diffusion.metrics import features_of, kid, side_by_side

RECIPE = Recipe(steps=600, batch=32, learning_rate=1.6, directions=4)
DRAWS = 8  # rows of each held-out picture
SAMPLES = torch.tensor([50] * 9 + [200])  # of each digit
LINES = 8  # samples of each digit in the picture


def batches(training: Digits) -> Callable[[torch.Generator], Prompted]:
    """Draws steps of nines and as many other digits, which are to stay what they are."""
    parts = [training.where((training.labels == UNSEEN) == wanted) for wanted in (True, False)]
    half = RECIPE.batch // 2

    def batch(generator: torch.Generator) -> Prompted:
        some = [torch.randint(len(part.labels), (half,), generator=generator) for part in parts]
        shown = [Digits(part.pictures[i], part.labels[i]).prompted() for part, i in zip(parts, some, strict=True)]
        return Prompted(*(torch.cat(both) for both in zip(*shown, strict=True)))

    return batch


class Exam:
    """What is asked of the base and of what was made of it: the loss on held-out digits, and what is drawn."""

    def __init__(self, training: Digits, held_out: Digits, base: nn.Module) -> None:
        self.held_out, self.nine = held_out, held_out.labels == UNSEEN
        self.rows = rows_to_measure(held_out.pictures, DRAWS)
        self.labels = torch.arange(10).repeat_interleave(SAMPLES)
        self.reader: Reader = trained_reader(training)
        self.reader_accuracy = float((self.reader.read(held_out.pictures) == held_out.labels).float().mean())
        if self.reader_accuracy < 0.95:
            raise ValueError(f"the reader reads {self.reader_accuracy:.1%} of held-out digits: 95 % are wanted")
        nines = torch.cat([d.pictures[d.labels == UNSEEN] for d in (training, held_out)])
        self.real_nines = features_of(self.reader.features, nines)
        self.losses_before, (self.drawn, self.before) = self.losses(base), self.draws(base)

    @torch.no_grad()
    def losses(self, model: nn.Module) -> torch.Tensor:
        """float32 [N, DRAWS]: of the fixed rows of each held-out digit."""
        return losses(model, self.held_out.prompted(), self.rows).view(-1, DRAWS)

    def compare(self, after: torch.Tensor, kept: torch.Tensor) -> dict[str, Any]:
        """The base's mean loss over the digits that the mask keeps, and what it became, on the same rows."""
        return compared(self.losses_before[kept].flatten(), after[kept].flatten(), DRAWS)

    def draws(self, model: nn.Module) -> tuple[torch.Tensor, dict[str, Any]]:
        """(samples, {"read_right": the share of each digit's that is read as it, "nines_read_as": how many as each,
        "kid_of_nines": [value, error], in the reader's features, to all real nines})."""
        pictures = sample(model, prompts()[self.labels], prompts()[EMPTY])
        read = self.reader.read(pictures)
        right = [float((read[self.labels == digit] == digit).float().mean()) for digit in range(10)]
        nines = self.labels == UNSEEN
        return pictures, {
            "read_right": [round(share, 4) for share in right],
            "nines_read_as": torch.bincount(read[nines], minlength=10).tolist(),
            "kid_of_nines": list(kid(features_of(self.reader.features, pictures[nines]), self.real_nines)),
        }


def run(seed: int, training: Digits, exam: Exam, picture: str | None = None) -> dict[str, Any]:
    """One training, as a row of the results file; what the base does is measured once and kept by the exam."""
    model = load_base(BASE, GROUP)
    started = time.perf_counter()
    curve = tune(model, RECIPE, batches(training), seed)
    seconds = time.perf_counter() - started
    losses_after, (drawn, after) = exam.losses(model), exam.draws(model)
    if picture:
        shown = torch.cat([torch.nonzero(exam.labels == digit)[:LINES, 0] for digit in range(10)])
        side_by_side(exam.drawn[shown], drawn[shown], LINES, zoom=3).save(picture, optimize=True)
    return {
        "case": "digits: the unseen 9",
        "seed": seed,
        **RECIPE._asdict(),
        "scales": sum(scale.numel() for scale in qzo.scales(model).values()),
        "training_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "reader_accuracy": round(exam.reader_accuracy, 4),
        "before": exam.before,
        "after": after,
        "loss_of_nines": exam.compare(losses_after, exam.nine),
        "loss_of_others": exam.compare(losses_after, ~exam.nine),
        "curve": curve,
        "versions": {"qzo": qzo.__version__, "torch": torch.__version__},
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """A run of each seed, one after another, each a line of the results file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", help="a JSONL file that the results are appended to")
    parser.add_argument("--picture", help="a PNG of samples before (left) and after (right) the first seed's run")
    options = parser.parse_args()
    training, held_out = load()
    exam = Exam(training, held_out, load_base(BASE, GROUP))
    for seed in options.seeds:
        row = run(seed, training, exam, options.picture if seed == options.seeds[0] else None)
        results.append(row, options.out)


if __name__ == "__main__":
    main()
