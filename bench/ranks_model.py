"""What ranks cost a step, on up to 1,024 of them, modelled: `python -m qzo.bench.ranks_model` prints the table.

A step on R ranks takes as long as the slowest of them, and one all-gather of 16 bytes for each of a rank's evaluations.

step      measured: median, 20th and 80th percentile of a row of a results file, the same work on each rank. Its times
          are taken to be normal, so that of R ranks the slowest is late by E[max of R] = inverse cdf of
          (R - 3/8) / (R + 1/4) standard deviations (Blom, "Statistical estimates and transformed beta-variables", 1958)
exchange  a ring of R - 1 hops, as NCCL and gloo make it: the call, each hop, and the bytes of all ranks over the link.
          NCCL: its own model of its low-latency protocol (src/graph/tuning.cc: 6.6 us a call, 2.7 us a hop over a
          network, 0.6 x 1.8 us over NVLink, a quarter of the link's bandwidth), a link of 400 Gb/s.
          gloo: 30 us a hop over TCP, assumed, a link of 10 Gb/s
"""

import dataclasses
import statistics
from pathlib import Path

from . import results

RESULTS = Path(__file__).parent / "results" / "nvidia-h100-80gb-hbm3-2026-11-27.jsonl"
CASE = "whole step meta-llama-2-7b 16 x 64"
DIRECTIONS = 4
BYTES = 16  # of an evaluation, on the wire (qzo/optim/shares.py)
RANKS = (2, 8, 64, 256, 1024)


@dataclasses.dataclass(frozen=True)
class Network:
    """call, hop, near: microseconds of a call, of a hop between machines, of one inside; per_machine: ranks of a
    machine; gbps: GB/s of what a link carries."""

    name: str
    call: float
    hop: float
    near: float
    per_machine: int
    gbps: float

    def gather(self, ranks, nbytes):
        """Milliseconds of an all-gather of so many bytes a rank."""
        far = -(-ranks // self.per_machine) - 1
        hops = far * self.hop + (ranks - 1 - far) * self.near
        return 1e-3 * (self.call + hops) + 1e-6 * ranks * nbytes / self.gbps


NETWORKS = (
    Network("NCCL, 8 GPUs a machine", 6.6, 2.7, 0.6 * 1.8, 8, 400 / 8 / 4),
    Network("NCCL, one a machine", 6.6, 2.7, 0.0, 1, 400 / 8 / 4),
    Network("gloo over TCP, one a machine", 0.0, 30.0, 0.0, 1, 10 / 8),
)


def measured(path=RESULTS, case=CASE):
    """(median, standard deviation) of a step in milliseconds. ValueError if the file has no such row."""
    for row in results.read(path):
        if (row["case"], row["provider"], row["ms"] is None) == (case, "qzo", False):
            return row["ms"], (row["p80"] - row["p20"]) / (2 * statistics.NormalDist().inv_cdf(0.8))
    raise ValueError(f"{path} has no row of qzo for {case!r}")


def lateness(ranks, deviation):
    """Milliseconds by which the slowest of so many ranks is later than the median one."""
    return deviation * statistics.NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def efficiency(ranks, network, step, deviation, evaluations=2 * DIRECTIONS):
    """What part of a step is the median rank's own work: its samples a second over R times those of one rank."""
    return step / (step + lateness(ranks, deviation) + network.gather(ranks, BYTES * evaluations))


def as_markdown(step, deviation):
    """The table of docs/many-gpus.md."""
    lines = [f"| ranks | slowest, ms later | {' | '.join(n.name for n in NETWORKS)} |", "|---|---|---|---|---|"]
    for ranks in RANKS:
        cells = []
        for network in NETWORKS:
            gather = network.gather(ranks, 2 * DIRECTIONS * BYTES)
            cells.append(f"{gather:.2f} ms, {efficiency(ranks, network, step, deviation):.1%}".replace("%", " %"))
        lines.append(f"| {ranks:,} | {lateness(ranks, deviation):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown(*measured()))
