"""What is timed beside the products: the update of an arena, noise, a record of the journal."""

import functools
import tempfile
from pathlib import Path

import torch

from ..kernels.noise import kernel_coefs, law_number, noise
from ..nn import ops
from ..optim.journal import Journal, Record
from . import overhead
from .providers import EVERY, LR, SEED, Built, Provider, sweep


class Arena:
    """A Problem without layers: `n` scales."""

    def __init__(self, case, device, least_bytes):
        self.case, self.device = case, device
        self.copies = max(2, -(-least_bytes // (4 * case.n))) if case.kind == "update" else 1

    def sample(self, y):
        return y.double()


def _update(problem):
    arenas = [torch.rand(problem.case.n, device=problem.device) + 0.5 for _ in range(problem.copies)]
    law = law_number(problem.case.noise)
    seeds = torch.tensor([SEED], device=problem.device)
    coefs = kernel_coefs([1e-3], law).to(problem.device)

    def run(part=EVERY):
        for scales in arenas[part]:
            ops.update_op(scales, seeds, coefs, 0, law, True, 0.0)

    probe = arenas[0][:4096].clone()
    index = torch.arange(4096, device=problem.device)
    want = probe.double() * (1 + 1e-3 * noise(problem.case.noise, SEED, index).double())

    def output():
        scales = probe.clone()
        ops.update_op(scales, seeds, coefs, 0, law, True, 0.0)
        return scales

    return Built(run, problem.copies, output, want, 1e-6)


def _official_update(problem):
    """One sweep over float16 scales with materialized noise, in tensors of a layer's size."""
    arenas = [
        [torch.rand(part, device=problem.device).half() + 0.5 for part in _parts(problem.case.n)]
        for _ in range(problem.copies)
    ]

    def seeded():
        return torch.Generator(problem.device).manual_seed(SEED)

    generator = seeded()

    def run(part=EVERY):
        for scales in arenas[part]:
            sweep(scales, LR, generator)

    probe = arenas[0][0].clone()
    z = torch.normal(0.0, 1.0, probe.shape, generator=seeded(), device=problem.device, dtype=probe.dtype)

    def output():
        scales = probe.clone()
        sweep([scales], 0.1, seeded())
        return scales

    return Built(run, problem.copies, output, probe.double() + 0.1 * z.double(), 1e-3, (generator,))


def _parts(n, layer=1 << 17):
    return [min(layer, n - start) for start in range(0, n, layer)]


def _noise(problem):
    law, count = problem.case.noise, problem.case.n
    index = torch.arange(count, device=problem.device)

    def mean_square(values):
        return values[: 1 << 16].double().square().mean()[None]

    return Built(
        lambda part: noise(law, SEED, index),
        1,
        lambda: mean_square(noise(law, SEED, index)),
        torch.ones(1, dtype=torch.float64, device=problem.device),
        0.03,
    )  # variance 1, of 65,536


def _randn(problem):
    generator = torch.Generator(problem.device).manual_seed(SEED)
    out = torch.empty(problem.case.n, device=problem.device)

    def run(part=EVERY):
        return torch.randn(out.shape, generator=generator, out=out, device=problem.device)

    return Built(
        run,
        1,
        lambda: run()[: 1 << 16].double().square().mean()[None],
        torch.ones(1, dtype=torch.float64, device=problem.device),
        0.03,
        (generator,),
    )


def _journal(problem):
    folder = tempfile.TemporaryDirectory()
    journal = Journal.create(Path(folder.name) / "journal.qzo", {"directions": 1})
    step = 0

    def run(part=EVERY):
        nonlocal step
        journal.append([Record(step, 0, SEED, 0.5, 1.0, 2.0, False)])
        step += 1

    def output():  # it keeps the folder, which goes with its last reference
        run()
        return torch.tensor([(Path(folder.name) / "journal.qzo").stat().st_size > 32], dtype=torch.float64)

    return Built(run, 1, output, torch.ones(1, dtype=torch.float64), 0.0, host=True)


def _overhead(make, problem):
    run = make(problem.case.rows) if make is overhead.quantized else make()
    return Built(run, overhead.TURNS * overhead.LINEARS, host=True)


PROVIDERS = (
    Provider("qzo", functools.partial(_overhead, overhead.quantized), kinds=("overhead",)),
    Provider("dense", functools.partial(_overhead, overhead.dense), kinds=("overhead",)),
    Provider("qzo", _update, kinds=("update",)),
    Provider("official", _official_update, kinds=("update",)),
    Provider("qzo", _noise, kinds=("noise",)),
    Provider("torch.randn", _randn, kinds=("noise",)),
    Provider("qzo", _journal, kinds=("journal",)),
)
