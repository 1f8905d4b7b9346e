"""How long cases will take before they are measured: a formula, and a probe of how fast this machine is just now.

Most of a case is the same for all: every provider's weights are built, compared with float64 and run for a while. What
grows with a case is the least number of turns, over its weights (MeZO draws noise for each) and its operations.
"""

import dataclasses
import time

import torch

from . import timing
from .run import PROVIDERS


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Seconds of a case of layers, of each set of its weights, each weight and each operation; of a case without
    layers; all providers together, on the machine where the probe takes `probe` seconds."""

    case: float
    copy: float
    weight: float
    flop: float
    small: float
    probe: float


# two cores of a Xeon whose 260 MB of cache every provider's weights have to exceed; one H100 with kernels compiled
COSTS = {"cpu": _Cost(4.2, 1.2e-3, 2.2e-7, 9e-10, 1.5, 0.07), "cuda": _Cost(4.0, 0.0, 3e-9, 0.0, 1.0, 0.0)}


def seconds(case, device, names=None):
    """Of one case, by formula. names: the providers that are asked for, or None for all."""
    cost, able = COSTS[device], [p for p in PROVIDERS if case.kind in p.kinds and not p.missing(device, case)]
    asked = [p for p in able if not names or p.name in names]
    if not case.shapes:
        return cost.small * len(asked) / max(1, len(able))
    weights = sum(k * n for k, n in case.shapes)
    copies = timing.cache_bytes(device) * 8 / (weights * case.form.weight_bits) if case.kind == "linear" else 1
    whole = cost.case + cost.copy * copies + cost.weight * weights + cost.flop * case.flops
    return whole * len(asked) / len(able)


def probe(device):
    """What to multiply those seconds by: the time of a little work now, other processes included, over the expected."""
    if device != "cpu":
        return 1.0
    generator = torch.Generator().manual_seed(0)
    side, numbers = 1024, 1 << 23

    def work():
        x = torch.randn(side, side, generator=generator)
        torch.mm(x, x)
        torch.normal(0.0, 1.0, (numbers,), generator=generator)

    work()
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) / COSTS[device].probe


def said(spent):
    """Seconds in words: 40 s, 6 min, 2.1 h."""
    if spent < 90:
        return f"{spent:.0f} s"
    return f"{spent / 60:.0f} min" if spent < 5400 else f"{spent / 3600:.1f} h"


class Budget:
    """Which cases still fit into `limit` seconds (None: all), as their formulas, corrected by what went before, say."""

    def __init__(self, limit, factor):
        self.limit, self.factor, self.begun = limit, factor, time.monotonic()
        self.expected = 0.0

    def spent(self):
        return time.monotonic() - self.begun

    def refuses(self, wanted):
        """Why a case whose formula says `wanted` seconds is left out, or None."""
        if self.limit is None:
            return None
        left, needed = max(0.0, self.limit - self.spent()), wanted * self.factor
        if needed <= left:
            return None
        return f"left out: it takes about {said(needed)}, and {said(left)} of --seconds {self.limit:g} are left"

    def done(self, wanted):
        """A case whose formula says `wanted` seconds has ended."""
        self.expected += wanted
        self.factor = self.spent() / self.expected
