"""What `qzo bench` does: time qzo beside its rivals, with the roof of the machine next to it."""

import json
import sys

import torch
from tqdm import tqdm

from . import cases, estimate, results
from .run import check_providers, left_out, measure
from .timing import keep_memory

CPU_SECONDS = 600  # of the set that a CPU measures when it is not told which


def execute(options):
    """Run the chosen action; exit status. ValueError and OSError for bad input."""
    if options.action == "run":
        return _run(options)
    if options.action == "compare":
        both, slower = results.compare(results.read(options.old), results.read(options.new), options.threshold)
        for case, provider, old, new, ratio in both:
            if options.json:
                print(json.dumps({"case": case, "provider": provider, "old_ms": old, "new_ms": new, "ratio": ratio}))
            else:
                mark = "SLOWER" if (case, provider, old, new, ratio) in slower else ""
                print(f"{case}, {provider}: {old:.4g} -> {new:.4g} ms, {ratio:.3f}x {mark}".rstrip())
        return 1 if slower else 0
    if options.action == "table":
        print(results.as_markdown(results.read(options.file)))
        return 0
    results.plot(results.read(options.file), options.out)
    return 0


def _run(options):
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds {options.seconds:g}: expected more than 0")
    if options.rows and min(options.rows) < 1:
        raise ValueError(f"--rows {' '.join(map(str, options.rows))}: expected rows per evaluation, each at least 1")
    names = options.providers.split(",") if options.providers else None
    check_providers(names)
    chosen = cases.choose(device, options.filter)
    if options.rows:
        known = sorted({c.rows for c in chosen})
        chosen = tuple(c for c in chosen if c.rows in options.rows)
        if not chosen:
            raise ValueError(
                f"--rows {' '.join(map(str, options.rows))}: the chosen cases have "
                f"{', '.join(map(str, known))} rows per evaluation"
            )
    if options.list:
        print("\n".join(c.name for c in chosen))
        return 0
    if device == "cpu":
        torch.set_num_threads(1)
        keep_memory()
    rows, told = [], set()
    out = open(options.out, "w", encoding="utf-8") if options.out else None  # noqa: SIM115  closed below
    try:
        limit = CPU_SECONDS if device == "cpu" and options.filter is None else None
        for row in _measured(chosen, device, names, options.seconds or limit):
            rows.append(row)
            line = json.dumps(row)
            if out:
                print(line, file=out, flush=True)
            if options.json:
                print(line, flush=True)
            note = results.note_of(row)
            if note and note not in told and not options.json:
                told.add(note)
                tqdm.write(note, file=sys.stderr)
    finally:
        if out:
            out.close()
    if not options.json:
        print(results.as_markdown(rows))
    return 0


def _measured(chosen, device, names, limit):
    """The rows of the cases in turn, with what it will take before and a live line on standard error meanwhile."""
    costs = {case: estimate.seconds(case, device, names) for case in chosen}
    budget = estimate.Budget(limit, estimate.probe(device))
    others = len(cases.every(device)) - len(chosen)
    print(
        f"{len(chosen)} cases on {device}, about {estimate.said(budget.factor * sum(costs.values()))}"
        f"{f', --seconds {limit:g}' if limit else ''}; {others} not chosen (qzo bench run --list names them)",
        file=sys.stderr,
    )
    # in the seconds of the formula, so that tqdm's own guess of what remains knows which cases are long
    with tqdm(
        total=sum(costs.values()),
        disable=None,
        smoothing=0,
        bar_format="{percentage:3.0f}% {elapsed}, {remaining} left: {desc}",
    ) as bar:
        for case, wanted in costs.items():
            bar.set_description_str(case.name)
            refused = budget.refuses(wanted)
            if refused:
                yield left_out(case, device, refused)
            else:
                yield from measure(case, device, names)
                budget.done(wanted)
            bar.update(wanted)
