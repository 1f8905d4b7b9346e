"""What the way a step's rows are drawn leaves of a derivative's variance, on the bases of the two examples:

    python -m qzo.bench.flow_variance --data FOLDER --out FILE.jsonl

d = (L+ - L-) / (2 eps) is taken along a few fixed directions, of many batches of as many rows (x0, n, s), drawn by each
of DESIGNS, which all estimate the same derivative. Its variance is over batches. A line of the file is a design; what
the file has is not measured again. The digits are the nines, which the base never saw, and as many others; the
emoji Google's, the base having been trained on Twitter's (FOLDER: as examples/emoji has it). All scales are perturbed.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from examples.digits import digits
from examples.emoji import emoji
from examples.shared import flow

from ..diffusion.objective import FlowLaw, Rows, draw
from ..kernels.noise import step_seed
from ..loss.losses import pair
from ..nn.evaluations import Evaluations
from ..nn.layers import evaluating, scales
from . import results
from .timing import machine

EPS = 1e-2
AT_ONCE = 256  # rows under an evaluation
INTERVALS = 8  # of the times, equally likely
TRIMMED = 8  # a trimmed mean leaves out an eighth of the rows at either end
HUBER = 1.345  # standard deviations: 95 % of the mean's efficiency where errors are normal
FIGURES = ("variance", "ratio", "squared_mean", "kept", "foretold")


class Design(NamedTuple):
    """How the rows of a step are drawn.

    draws, stratified : of a FlowLaw
    opposite : each (n, s) serves a second row, with -n, of the "same" picture or of "another"
    importance : times are drawn in proportion to the root of the squared derivative that independent rows had in their
        interval, and rows weighted so that the mean of the loss stays
    """

    draws: int = 1
    stratified: bool = True
    opposite: str = ""
    importance: bool = False

    @property
    def of_picture(self) -> int:
        """Rows of each picture of a batch."""
        return self.draws * (2 if self.opposite == "same" else 1)


DESIGNS = {
    "independent": Design(stratified=False),
    "stratified": Design(),
    "antithetic": Design(stratified=False, opposite="same"),
    "stratified, antithetic": Design(opposite="same"),
    "stratified, antithetic over two pictures": Design(opposite="another"),
    "stratified, 2 draws of a picture": Design(draws=2),
    "stratified, 4 draws of a picture": Design(draws=4),
    "stratified, 8 draws of a picture": Design(draws=8),
    "stratified, importance of times": Design(importance=True),
}
UNIT = 2 * max(design.of_picture for design in DESIGNS.values())


class Sizes(NamedTuple):
    """rows : of a batch, R; batches : B; directions : J"""

    rows: int = 16
    batches: int = 192
    directions: int = 4


class Case(NamedTuple):
    """A base, and the pictures that it is to learn."""

    model: nn.Module
    data: flow.Prompted


def digits_case(folder: Path | None = None) -> Case:
    """Nines and as many other digits; no folder is needed."""
    training, _ = digits.load()
    nine = training.labels == digits.UNSEEN
    shown = nine | ((~nine).cumsum(0) <= nine.sum())
    return Case(flow.load_base(digits.BASE, digits.GROUP), training.where(shown).prompted())


def emoji_case(folder: Path) -> Case:
    """All of Google's."""
    every, _ = emoji.split(folder, "google", held_out=0)
    return Case(flow.load_base(emoji.BASE, emoji.GROUP), every.data)


CASES: dict[str, Callable[[Path], Case]] = {"digits": digits_case, "emoji": emoji_case}


# ------------------------------------------------------------------------------------------------------------- the rows


@dataclasses.dataclass(frozen=True)
class Importance(FlowLaw):
    """A FlowLaw drawn more often where it counts. chances : of each of so many intervals that are equally likely
    under it; they add up to 1"""

    chances: tuple[float, ...] = (1.0,)

    def times(self, u: torch.Tensor) -> torch.Tensor:
        chances = torch.tensor(self.chances, dtype=torch.float64)
        ends = chances.cumsum(0)
        at = torch.bucketize(u, ends[:-1])
        within = 1 - (ends[at] - u) / chances[at]
        return super().times((at + within) / len(chances))

    def weights(self, times: torch.Tensor) -> torch.Tensor:
        count = len(self.chances)
        return 1 / (count * torch.tensor(self.chances)[interval(super().times, times, count)])


def interval(quantile: Callable[[torch.Tensor], torch.Tensor], times: torch.Tensor, count: int) -> torch.Tensor:
    """int64: which of `count` equally likely intervals each time is in, by the quantile function of their law."""
    return torch.bucketize(times, quantile(torch.arange(1, count, dtype=torch.float64) / count).float())


class Drawn(NamedTuple):
    """Rows of pictures. shown : int64 [R], the picture of each; weights : float32 [R], of their losses"""

    shown: torch.Tensor
    rows: Rows
    weights: torch.Tensor


def batch_of(design: Design, law: FlowLaw, data: flow.Prompted, rows: int, seed: int, step: int) -> Drawn:
    """A batch of so many rows, a multiple of UNIT; each picture has the design's number of them. ValueError for too few
    pictures."""
    if rows > len(data.pictures):
        raise ValueError(f"{rows} rows of as many pictures, but there are {len(data.pictures)}: give fewer rows")
    shuffled = torch.randperm(len(data.pictures), generator=torch.Generator().manual_seed(step_seed(seed, step, 0)))
    shown = shuffled[: rows // design.of_picture].repeat_interleave(design.of_picture)
    own = rows // (design.draws * (2 if design.opposite else 1))
    drawn = draw(law, seed, step, own, data.pictures.shape[1:])
    if design.opposite:
        times, noise, dropped = drawn
        both = torch.stack([noise, -noise], 1).flatten(0, 1)
        drawn = Rows(times.repeat_interleave(2), both, dropped.repeat_interleave(2))
    return Drawn(shown, drawn, law.weights(drawn.times))


@torch.no_grad()
def derivatives(case: Case, shown: torch.Tensor, rows: Rows, seeds: list[int]) -> torch.Tensor:
    """float64 [J, R]: (L+ - L-) / (2 eps) of each row along the direction of each seed."""
    found = torch.empty(len(seeds), len(shown), dtype=torch.float64)
    for part in torch.arange(len(shown)).split(AT_ONCE):
        data = flow.Prompted(*pair([each[shown[part]] for each in case.data], 2))
        drawn = Rows(*pair([each[part] for each in rows], 2))
        for j, seed in enumerate(seeds):
            with evaluating(case.model, Evaluations([seed, seed], [EPS, -EPS])):
                plus, minus = flow.losses(case.model, data, drawn).double().chunk(2)
            found[j, part] = (plus - minus) / (2 * EPS)
    return found


# ---------------------------------------------------------------------------------------------------------- the figures


def trimmed(each: torch.Tensor) -> torch.Tensor:
    """The mean over the last dimension without the least and the greatest eighth."""
    cut = each.shape[-1] // TRIMMED
    return each.sort(-1).values[..., cut : each.shape[-1] - cut].mean(-1)


def huber(each: torch.Tensor) -> torch.Tensor:
    """Huber's mean over the last dimension; a standard deviation is 1.4826 median distances from the median."""
    centre = each.median(-1, keepdim=True).values
    bound = HUBER * 1.4826 * (each - centre).abs().median(-1, keepdim=True).values
    for _ in range(30):
        weights = (bound / (each - centre).abs().clamp(min=1e-30)).clamp(max=1)
        centre = (weights * each).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    return centre.squeeze(-1)


MEANS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda each: each.mean(-1),
    "trimmed mean": trimmed,
    "Huber's mean": huber,
}


def figures(each: torch.Tensor, weights: torch.Tensor, d: torch.Tensor, of_picture: int) -> torch.Tensor:
    """float64 [5], FIGURES, of the rows' weighted derivatives [J, B, R], their weights [B, R], and what a mean makes of
    each batch, [J, B]; means over the directions.

    variance : over batches
    ratio : to that of as many independent rows. It is taken from these very rows, each of which has the law by itself
    squared_mean : over batches, without what the variance adds to it
    kept : the mean over that of the plain mean, by least squares over the directions
    foretold : the squared standard error that the rows of a batch foretell, a picture's rows as one, over the variance
    """
    batches, rows = each.shape[1:]
    plain = each.mean(2)
    variance = d.var(1).mean()
    independent = ((each**2 / weights).mean((1, 2)) - each.mean((1, 2)) ** 2).mean() / rows
    covariance = ((d - d.mean(1, True)) * (plain - plain.mean(1, True))).sum(1) / (batches - 1)
    product = (d.mean(1) * plain.mean(1) - covariance / batches).mean()
    of_pictures = each.unflatten(2, (-1, of_picture)).mean(3)
    return torch.stack(
        [
            variance,
            variance / independent,
            (d.mean(1) ** 2 - d.var(1) / batches).mean(),
            product / (plain.mean(1) ** 2 - plain.var(1) / batches).mean(),
            (of_pictures.var(2) / of_pictures.shape[2]).mean() / variance,
        ]
    )


def with_errors(each: torch.Tensor, weights: torch.Tensor, mean: str, of_picture: int) -> dict[str, list[float]]:
    """{name: [figure, standard error]}: the errors by leaving out a batch at a time."""
    d, batches = MEANS[mean](each), each.shape[1]
    without = []
    for b in range(batches):
        left = torch.arange(batches) != b
        without.append(figures(each[:, left], weights[left], d[:, left], of_picture))
    errors = ((batches - 1) * torch.stack(without).var(0, correction=0)).sqrt()
    found = torch.stack([figures(each, weights, d, of_picture), errors], 1)
    return {name: [rounded(x) for x in both] for name, both in zip(FIGURES, found.tolist(), strict=True)}


def rounded(value: float) -> float:
    """Four digits, as the errors deserve."""
    return float(f"{value:.4g}")


# ------------------------------------------------------------------------------------------------------ the measurement


def measure(name: str, case: Case, design: str, sizes: Sizes, by_time: list[float] | None) -> dict[str, Any]:
    """A row of the results file.

    by_time : mean squared derivative of a row in each of INTERVALS, which the row of independent draws has; importance
        needs it
    """
    started, chosen = time.process_time(), DESIGNS[design]
    law = dataclasses.replace(flow.LAW, draws=chosen.draws, stratified=chosen.stratified)
    if chosen.importance:
        roots = torch.tensor(by_time, dtype=torch.float64).sqrt()
        law = Importance(**vars(law), chances=tuple((roots / roots.sum()).tolist()))
    number = list(DESIGNS).index(design)  # each design has batches of its own
    batches = [batch_of(chosen, law, case.data, sizes.rows, number, b) for b in range(sizes.batches)]
    shown, weights = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("shown", "weights"))
    rows = Rows(*(torch.cat(part) for part in zip(*(batch.rows for batch in batches), strict=True)))
    found = derivatives(case, shown, rows, [step_seed(0, 0, j) for j in range(sizes.directions)])
    each = (found * weights).unflatten(1, (sizes.batches, sizes.rows))
    at = interval(flow.LAW.times, rows.times, INTERVALS)
    return {
        "case": name,
        "design": design,
        **sizes._asdict(),
        "eps": EPS,
        "scales": sum(scale.numel() for scale in scales(case.model).values()),
        "means": {
            mean: with_errors(each, weights.double().view(sizes.batches, -1), mean, chosen.of_picture) for mean in MEANS
        },
        "by_time": [rounded(float((found[:, at == i] ** 2).mean())) for i in range(INTERVALS)],
        "seconds": round(time.process_time() - started, 1),  # of a core
        **machine("cpu"),
        "date": time.strftime("%Y-%m-%d"),
    }


def read(path: str | None) -> dict[tuple[str, str, Sizes], dict[str, Any]]:
    """The rows of a results file, by what they are of; none where there is no file."""
    if path is None or not Path(path).exists():
        return {}
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {(row["case"], row["design"], Sizes(*(row[name] for name in Sizes._fields))): row for row in rows}


def main(arguments: list[str] | None = None) -> None:
    """Measure what the file lacks, and append it."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.flow_variance", description=__doc__.partition(":\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--data", type=Path, help="the folder of the emoji's packages")
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--out", help="a JSONL file the rows are appended to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = Sizes(options.rows, options.batches, options.directions)
    if sizes.rows < 1 or sizes.rows % UNIT:
        parser.error(f"--rows {sizes.rows}: give a multiple of {UNIT}, the rows of two pictures in every design")
    if sizes.batches < 3 or sizes.directions < 1:
        parser.error(f"--batches {sizes.batches} --directions {sizes.directions}: give at least 3, and at least 1")
    if "emoji" in options.cases and options.data is None:
        parser.error("the emoji need --data FOLDER, which examples/emoji/README.md tells how to get")
    done = read(options.out)
    for name in options.cases:
        case = CASES[name](options.data)
        for design in DESIGNS:
            if (name, design, sizes) not in done:
                pilot = done.get((name, "independent", sizes), {})
                done[name, design, sizes] = row = measure(name, case, design, sizes, pilot.get("by_time"))
                results.append(row, options.out)


if __name__ == "__main__":
    main()
