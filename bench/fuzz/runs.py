"""Damaged files for every reader: `python -m qzo.bench.fuzz --cases 100000 --out FILE.jsonl`.

A case is a small whole file, or a few, with faults where the format has counts, sizes, types, names and values
(mutations.py). Its reader either takes it or ends in an error that a command tells in one line. Anything else is a
crash: another exception, a signal, an allocation that a header asks for and the file does not hold, a case that takes
seconds. Each reader has a process of its own; files of a crash are kept.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from .. import results
from ..timing import machine
from . import checkpoints, inputs

PARSERS = checkpoints.PARSERS | inputs.PARSERS
CLEAN = (ValueError, OSError)  # what a command tells in one line
HEADROOM = 256 << 20  # bytes of address space that a reader may take on top of what the process has
SECONDS = 10  # of the processor that a case may take
BATCH, WARM = 1000, 20  # cases of a process, and before they count
LONGEST = 1500  # characters of a message
SLOW = {"hqq": 0.25, "config.json": 0.25, "gguf tokenizer": 0.5}  # share of the cases that others have


class Slow(Exception):
    """A case has taken SECONDS."""


@contextlib.contextmanager
def little_memory():
    """Inside, the process may take HEADROOM bytes more: an absurd allocation, torch's too, is a MemoryError then."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def write(folder, files):
    """The files of a case, {name: bytes}, and no others, in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def refusal(read, folder):
    """None where a case is read, else the message it is refused with. AssertionError for one that is no line."""
    try:
        read(folder)
    except CLEAN as error:
        message = str(error)
        if not message.strip() or "\n" in message or len(message) > LONGEST:
            raise AssertionError(f"no line: {message!a:.300}") from error
        return message
    return None


def shape_of(message, folder):
    """A message without the names and numbers of its case: those of one line of code are alike."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|\[[^]]*\]", "#", message.replace(str(folder), ""))[:80]


def share(name, cases, names):
    """How many of so many cases are a reader's."""
    weights = {other: SLOW.get(other, 1.0) for other in names}
    return max(1, round(cases * weights[name] / sum(weights.values())))


def fuzz(name, count, seed, folder, kept):
    """What so many cases of a reader end in, in this process; the files of crashes go to `kept`."""
    make, read = PARSERS[name]
    draws = random.Random(seed)
    ends: Counter[str] = Counter()
    told: set[str] = set()
    crashes, slowest = [], 0.0
    warnings.simplefilter("ignore")
    for _ in range(WARM):  # imports and caches
        write(folder, make(draws))
        with contextlib.suppress(Exception):
            read(folder)
    begun = resource.getrusage(resource.RUSAGE_SELF)
    signal.signal(signal.SIGVTALRM, _slow)
    with little_memory():
        for number in range(count):
            write(folder, make(draws))
            started = time.process_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                message = refusal(read, folder)
                ends["loaded" if message is None else "refused"] += 1
                told.add(shape_of(message or "", folder))
            except (Exception, SystemExit) as error:
                crashes.append("".join(traceback.format_exception_only(error)).strip()[:300])
                keep(folder, kept / f"{seed}-{number}".replace(" ", "-"), traceback.format_exc())
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            slowest = max(slowest, time.process_time() - started)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **{end: ends[end] for end in ("loaded", "refused")},
        "crashes": crashes,
        "told": sorted(told),
        "peak": (ended.ru_maxrss - begun.ru_maxrss) << 10,
        "slowest": slowest,
        "cpu": ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime,
    }


def _slow(*_):
    raise Slow(f"a case has taken {SECONDS} seconds of the processor")


def keep(folder, where, text):
    """The files of a case that a reader has crashed on, and what was said."""
    shutil.copytree(folder, where, dirs_exist_ok=True)
    (where.parent / f"{where.name}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def forked(name, count, seed, root, kept):
    """`fuzz` in a fork; that it was ended by a signal is a crash too."""
    folder = root / "case"
    folder.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(reading)
            found = fuzz(name, count, seed, folder, kept)
            with open(writing, "w", encoding="utf-8") as pipe:
                json.dump(found, pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    status = os.waitpid(process, 0)[1]
    if status == 0:
        return json.loads(text)
    told = f"the process has ended with status {os.waitstatus_to_exitcode(status)}"
    keep(folder, kept / f"{seed}-ended".replace(" ", "-"), told)
    return {"loaded": 0, "refused": 0, "crashes": [told], "told": [], "peak": 0, "slowest": 0.0, "cpu": 0.0}


def row_of(name, count, seed, root, kept):
    """A row of a results file: so many cases of a reader, a batch of them in a process."""
    sizes = [BATCH] * (count // BATCH) + [count % BATCH] * (count % BATCH > 0)
    parts = [forked(name, size, f"{seed} {name} {number}", root, kept) for number, size in enumerate(sizes)]
    crashes = [crash for part in parts for crash in part["crashes"]]
    row = {
        "parser": name,
        "cases": count,
        "loaded": sum(part["loaded"] for part in parts),
        "refused": sum(part["refused"] for part in parts),
        "crashes": len(crashes),
        "kinds_of_refusal": len({message for part in parts for message in part["told"]}),
        "peak_mb": round(max(part["peak"] for part in parts) / 1e6, 1),
        "slowest_s": round(max(part["slowest"] for part in parts), 3),
        "cpu_s": round(sum(part["cpu"] for part in parts), 1),
    }
    return row | ({"first_crash": crashes[0]} if crashes else {})


def main(arguments=None):
    """Fuzz each reader, and print a row for it; append them to the file. Exit status 1 where one has crashed."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--parser", action="append", choices=PARSERS, help="one of them only; may be given again")
    parser.add_argument("--seed", type=int, help="of the cases (default: a random one, which the rows name)")
    parser.add_argument("--crashes", default="fuzz-crashes", help="the folder that files of crashes are kept in")
    parser.add_argument("--out", help="a JSONL file the rows are appended to")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    names = options.parser or list(PARSERS)
    kept, crashed = Path(options.crashes), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            row = row_of(name, share(name, options.cases, names), seed, Path(root), kept)
            crashed += row["crashes"]
            results.append(row | {"seed": seed, **machine("cpu"), "date": time.strftime("%Y-%m-%d")}, options.out)
    return 1 if crashed else 0
