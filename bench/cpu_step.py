"""What a step costs on a CPU: `python -m qzo.bench.cpu_step [--rows 256] [--repeats 9] [--json]`.

One step = the stacked forward of every linear under +eps and -eps, noise made on the way, and the update of the
arena; against two dense float32 forwards of the same linears (`F.linear`, both sets of rows). One thread, process
time, the two measured in turn, medians. The linears together are larger than the last-level cache, so every pass
reads its weights from memory. Also the bytes a layer keeps, against float32.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from ..kernels.noise import kernel_coefs, law_number
from ..nn.evaluations import Evaluations
from ..nn.layers import arena_of, evaluating, layers
from ..nn.linear import QZOLinear
from ..nn.ops import update_op
from ..nn.weights import PackedWeight

# name -> (in, out) of the linears of a block, blocks, group size, zero points
CASES = {
    "SmolLM2-135M, 6 blocks, Q4_1": (
        [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)],
        6,
        32,
        "float",
    ),
    "768x3072, 6 blocks, group 128": ([(768, 768)] * 4 + [(768, 3072), (3072, 768)], 6, 128, None),
    "2048x5632, 2 blocks, group 128": ([(2048, 2048)] * 2 + [(2048, 5632)] * 2 + [(5632, 2048)], 2, 128, None),
}


def build(shapes, blocks, group, zeros):
    """A ModuleList of random 4-bit linears; their dense float32 ones have other numbers, of the same shape."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleList()
    for k, n in shapes * blocks:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
        scales = torch.rand(k // group, n, generator=generator) * 0.02 + 0.01
        zero = 8 + torch.rand(k // group, n, generator=generator) if zeros == "float" else None
        model.append(QZOLinear.from_packed(PackedWeight.from_codes(codes, scales, zero)))
    arena_of(model, exact=True)
    dense = [torch.randn(n, k, generator=generator) for k, n in shapes * blocks]
    return model, dense


def resident_ratio(model):
    """Bytes of codes, scales and zero points over those of float32 weights."""
    held = sum(
        layer.codes.nbytes
        + layer.arena.quads(layer.arena_name).nbytes
        + (0 if layer.zeros is None else layer.zeros.nbytes)
        for layer in layers(model).values()
    )
    return held / sum(4 * layer.in_features * layer.out_features for layer in layers(model).values())


def measure(name, rows, repeats, noise="rademacher"):
    """One result row: medians of the step and of two dense forwards, interleaved, and their ratio."""
    shapes, blocks, group, zeros = CASES[name]
    model, dense = build(shapes, blocks, group, zeros)
    arena = arena_of(model)
    x = {k: torch.randn(2 * rows, k) for k, _ in shapes}
    evaluations = Evaluations([1, 1], [1e-2, -1e-2], noise)
    law = law_number(noise)
    coef = kernel_coefs([1e-6], law)

    def step():
        with torch.no_grad(), evaluating(model, evaluations):
            for layer in model:
                layer(x[layer.in_features])
        update_op(arena.data, evaluations.seeds[:1], coef, 0, law, True, 2.0**-24)

    def two_dense_forwards():
        for weight in dense:
            torch.nn.functional.linear(x[weight.shape[1]][:rows], weight)
            torch.nn.functional.linear(x[weight.shape[1]][rows:], weight)

    times: dict[Callable[[], None], list[float]] = {step: [], two_dense_forwards: []}
    for turn in range(repeats + 1):
        for run, seconds in times.items():
            begun = time.process_time()
            run()
            if turn:  # the first turn warms allocator and threads up
                seconds.append(time.process_time() - begun)
    step_ms, dense_ms = (1e3 * statistics.median(times[run]) for run in (step, two_dense_forwards))
    each = sorted(a / b for a, b in zip(times[step], times[two_dense_forwards], strict=True))
    return {
        "case": f"cpu step: {name}",
        "rows": rows,
        "noise": noise,
        "ms": round(step_ms, 2),
        "two_dense_forwards_ms": round(dense_ms, 2),
        "ratio": round(statistics.median(each), 3),
        "ratio_min": round(each[0], 3),
        "ratio_max": round(each[-1], 3),
        "repeats": repeats,
        "resident_over_float32": round(resident_ratio(model), 4),
        "dense_gflops": round(4e-6 * rows * sum(w.numel() for w in dense) / dense_ms, 1),
        "threads": 1,
        "device": _processor(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }


def _processor():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m qzo.bench.cpu_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024], help="rows per evaluation")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--filter", default="", help="cases whose name contains this, in any case")
    parser.add_argument("--noise", default="rademacher", choices=("rademacher", "ih4", "gaussian"))
    parser.add_argument("--json", action="store_true", help="JSON lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in CASES:
        for rows in options.rows:
            if options.filter.lower() in name.lower():
                row = measure(name, rows, options.repeats, options.noise)
                print(
                    json.dumps(row)
                    if options.json
                    else f"{row['case']}, {rows} rows: {row['ms']:.1f} ms, {row['ratio']:.2f}x of two dense forwards "
                    f"({row['ratio_min']:.2f}-{row['ratio_max']:.2f}); weights {row['resident_over_float32']:.3f} of "
                    "float32",
                    flush=True,
                )


if __name__ == "__main__":
    main()
