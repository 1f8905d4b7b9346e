"""What only a GPU can tell, in three calls of under six minutes: `python bench/gpu_check.py --call 1`, then 2 and 3.

The parts, in an order of value, each within its share of the time; before them, all that they time is compiled by as
many processes as the machine has cores (gpu_warm.py).

    tests    the GPU tests
    steps    whole steps of Llama-2-7B, call by call and as a CUDA graph, beside dense forwards, the official loop,
             MeZO and QLoRA (gpu_steps.py)
    bench    the benchmark cases that the targets name
    e2e      every fixture folder, then the command line: killed and resumed, replayed, exported (gpu_e2e.py)
    tiles    tiles beside the one that would be picked
    memory   what Llama-2-7B and 13B hold, against what was predicted
    diffusion  steps of Stable Diffusion 3.5 Large's transformer: peak, seconds, modulations (gpu_diffusion.py)

A part that fails or runs out of time is a row with a note, and the others go on. The rows go into one results file that
`qzo bench table` reads, as they are made: a part that is run again replaces its own. Without a GPU it says so and exits
with 2.
"""

import argparse
import datetime
import json
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: as the module that it is
    sys.path[0] = str(ROOT)
    runpy.run_module("qzo.bench.gpu_check", run_name="__main__", alter_sys=True)
    sys.exit()

SECONDS = 340  # of a call
CALLS = {1: ("tests", "steps", "bench"), 2: ("e2e", "tiles", "memory"), 3: ("diffusion",)}
SHARES = {  # of the time
    **{"warm": 60, "tests": 90, "steps": 90, "bench": 100, "e2e": 130, "tiles": 90, "memory": 60},
    "diffusion": 280,
}


class Check:
    """The rows of a results file, those that it held before included, and the time that is left. ValueError for a file
    of another device."""

    def __init__(self, out, seconds, device="cuda"):
        import torch

        from . import results, timing

        self.device, self.dtype = device, torch.float16 if device == "cuda" else torch.float32
        self.machine = timing.machine(device)
        self.out, self.part = out, ""
        self.rows = results.read(out) if out.exists() and out.stat().st_size else []
        for row in self.rows:
            if row["device"] != self.machine["device"]:
                raise ValueError(
                    f"{out} holds results of {row['device']}, this is {self.machine['device']}: give another --out"
                )
        self.ends = self.share_ends = time.monotonic() + seconds

    def left(self):
        return self.share_ends - time.monotonic()

    def begin(self, part):
        """Rows belong to this part from now on; what it has left in the file before goes."""
        self.part = part
        self.rows = [row for row in self.rows if row.get("part") != part]
        self.out.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def add(self, row):
        row = {**row, "part": self.part}
        self.rows.append(row)
        with open(self.out, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)
        print(
            "  "
            + " ".join(
                str(row[key])
                for key in ("case", "provider", "mode", "ms", "ratio", "note")
                if row.get(key) not in (None, "")
            ),
            flush=True,
        )

    def note(self, kind, case, provider="qzo", **fields):
        """A row that is no benchmark case."""
        from .results import FIELDS, SCHEMA

        empty = {**dict.fromkeys(FIELDS), "rows": 0, "n": 0, "k": 0, "group": 0, "dtype": "", "noise": ""}
        self.add(
            {
                **empty,
                "schema": SCHEMA,
                "kind": kind,
                "case": case,
                "provider": provider,
                "note": "",
                **self.machine,
                "date": datetime.date.today().isoformat(),
                **fields,
            }
        )


def parts():
    """name -> function of a Check."""
    from . import gpu_diffusion, gpu_e2e, gpu_parts, gpu_steps

    return {
        "tests": gpu_parts.tests,
        "steps": gpu_steps.steps,
        "bench": gpu_parts.bench,
        "e2e": gpu_e2e.e2e,
        "tiles": gpu_parts.tiles,
        "memory": gpu_parts.memory,
        "diffusion": gpu_diffusion.diffusion,
    }


def run(check, names, warm=True):
    """The parts in turn, each within its share of the time and what the one before has left."""
    from .gpu_parts import failures
    from .gpu_warm import jobs
    from .gpu_warm import warm as compile_all

    every = {**parts(), "warm": lambda check: compile_all(check, jobs(check.device, names))}
    names = ["warm", *names] if warm else names
    asked, total = sum(SHARES[name] for name in names), check.left()
    check.share_ends = time.monotonic()
    for name in names:
        check.share_ends = min(check.ends, check.share_ends + total * SHARES[name] / asked)
        print(f"{name}: {check.left():.0f} s", flush=True)
        begun = time.monotonic()
        check.begin(name)
        try:
            found = every[name](check)
            if found:
                check.out.with_suffix(f".{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        except failures() as error:  # the other parts go on; the row says what broke
            check.note(name, name, note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"{name}: took {time.monotonic() - begun:.0f} s", flush=True)


def main(arguments=None):
    every = [name for call in CALLS.values() for name in call]
    parser = argparse.ArgumentParser(
        prog="python bench/gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--call", type=int, choices=CALLS, help="the parts of this call (default: all calls')")
    parser.add_argument("--parts", nargs="+", choices=every, help="these instead")
    parser.add_argument(
        "--seconds", type=float, help=f"for everything (default {SECONDS}, and {len(CALLS) * SECONDS} for all calls)"
    )
    parser.add_argument(
        "--out", type=Path, help="results file (default bench/results/<gpu>-<date>.jsonl); the tiles go beside it"
    )
    parser.add_argument("--no-warm", action="store_true", help="compile nothing ahead: this machine has done it")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: there is no CUDA or ROCm device here; nothing was measured", file=sys.stderr)
        return 2
    names = options.parts or (CALLS[options.call] if options.call else every)
    all_calls = not options.parts and not options.call
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = options.out or ROOT / "bench" / "results" / f"{gpu}-{datetime.date.today().isoformat()}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        check = Check(out, options.seconds or (len(CALLS) * SECONDS if all_calls else SECONDS))
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    run(check, list(names), warm=not options.no_warm)
    print(f"results: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
