"""Teaches the 4-bit base to draw a 9, which it never saw, by forward passes alone; says what that did to all digits.

python examples/digits/tune.py --seeds 0 1 2 --out results.jsonl --picture samples.png
"""

import argparse
import datetime
import json
import time
from typing import Any

import torch
from digits import LAW, UNSEEN, Digits, Reader, load, load_base, losses, sample, trained_reader
from torch import nn

import qzo
from qzo.diffusion.metrics import features_of, fixed_rows, kid, paired_difference, side_by_side
from qzo.diffusion.objective import Rows, draw

STEPS = 600
DIRECTIONS = 4
BATCH = 32  # half of it nines, half other digits, which are to stay what they are
LEARNING_RATE = 1.6  # relative to the scales; falls linearly to a tenth
DRAWS = 8  # rows of each held-out picture
SAMPLES = torch.tensor([50] * 9 + [200])  # of each digit
LINES = 8  # samples of each digit in the picture


def train(model: nn.Module, training: Digits, seed: int = 0, steps: int = STEPS, tell: Any = None) -> None:
    """QZO on the scales of every layer. tell(step, mean loss) every 50 steps."""
    nine = training.where(training.labels == UNSEEN)
    other = training.where(training.labels != UNSEEN)
    optimizer = qzo.QZO(model, LEARNING_RATE, directions=DIRECTIONS, seed=seed)
    evaluations = 2 * DIRECTIONS
    generator = torch.Generator().manual_seed(seed)
    half = BATCH // 2
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.9 * step / steps)
        some = [torch.randint(len(part.labels), (half,), generator=generator) for part in (nine, other)]
        pictures, labels = (torch.cat([a[some[0]], b[some[1]]]) for a, b in zip(nine, other, strict=True))
        rows = draw(LAW, seed, step, BATCH, pictures.shape[1:])
        digits, rows = Digits(*qzo.pair((pictures, labels), evaluations)), Rows(*qzo.pair(tuple(rows), evaluations))
        loss = optimizer.step(lambda d=digits, r=rows: losses(model, d, r).view(evaluations, -1).mean(1))
        if tell and step % 50 == 49:
            tell(step + 1, loss)


class Exam:
    """What is asked of the base and of what was made of it: the loss on held-out digits, and what is drawn."""

    def __init__(self, training: Digits, held_out: Digits, base: nn.Module) -> None:
        self.held_out, self.nine = held_out, held_out.labels == UNSEEN
        fixed = fixed_rows(LAW.times, len(held_out.labels), DRAWS, held_out.pictures.shape[1:])
        self.rows = Rows(fixed.times, fixed.noise, torch.zeros(len(fixed.times), dtype=torch.bool))
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
        return losses(model, self.held_out, self.rows).view(-1, DRAWS)

    def compare(self, after: torch.Tensor, kept: torch.Tensor) -> dict[str, Any]:
        """The base's mean loss over the digits that the mask keeps, and what it became, on the same rows."""
        before = self.losses_before[kept]
        changed = paired_difference(before.flatten(), after[kept].flatten(), DRAWS)
        return {"before": float(before.mean()), **changed._asdict()}

    def draws(self, model: nn.Module) -> tuple[torch.Tensor, dict[str, Any]]:
        """(samples, {"read_right": the share of each digit's that is read as it, "nines_read_as": how many as each,
        "kid_of_nines": [value, error], in the reader's features, to all real nines})."""
        pictures = sample(model, self.labels)
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
    model = load_base()
    curve: list[tuple[int, float]] = []
    started = time.perf_counter()
    train(model, training, seed, tell=lambda step, loss: curve.append((step, round(loss, 4))))
    seconds = time.perf_counter() - started
    losses_after, (drawn, after) = exam.losses(model), exam.draws(model)
    if picture:
        shown = torch.cat([torch.nonzero(exam.labels == digit)[:LINES, 0] for digit in range(10)])
        side_by_side(exam.drawn[shown], drawn[shown], LINES, zoom=3).save(picture, optimize=True)
    return {
        "case": "digits: the unseen 9",
        "seed": seed,
        "steps": STEPS,
        "directions": DIRECTIONS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
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
    exam = Exam(training, held_out, load_base())
    for seed in options.seeds:
        line = json.dumps(run(seed, training, exam, options.picture if seed == options.seeds[0] else None))
        print(line, flush=True)
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                print(line, file=file)


if __name__ == "__main__":
    main()
