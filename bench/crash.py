"""Whether a run that is broken off ends in the bits of an unbroken one: `python -m qzo.bench.crash [--out FILE.jsonl]`.

Runs of a tiny Llama (random weights, 4 bits) with their journal, metrics and saved model, in forks of this process:

kills   SIGKILL at random moments, run after run in one folder, until one ends by itself; of runs of one process, and of
        two ranks over gloo, of which one is killed or the other or both, and what is left a moment later, as torchrun
        does it
cuts    the power fails at a random moment: of each file what was synced is kept, and of what was written after it a
        part of random length, or zeros in its place; a new name that was not synced is there or not
disks   a file system that is full after 1, 2, 3, ... pages, until one holds all

Each is gone on with, and journal, scales and saved weights are compared with those of the unbroken run.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import errno
import functools
import json
import os
import random
import signal
import subprocess
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from ..checkpoints.load import from_pretrained
from ..checkpoints.save import save_pretrained
from ..nn.layers import arena_of
from ..system import disk
from ..system.ranks import RankLost, Ranks
from ..training.data import Example
from ..training.loop import fit
from ..training.settings import Settings
from ..training.task import Task
from . import results
from .timing import machine

PAGE = 4096
FULL, LOST = 3, 4  # exit status of a fork that has told of a full disk, of a rank that no longer answers
MOMENT = 0.3  # seconds, at the most, that what is left of a run outlives the rank that was killed
KEPT = ("journal.qzo", "scales", "model/model.safetensors", "model/config.json")


@contextlib.contextmanager
def meeting():
    """In which ranks wait for each other: RankLost where another was killed before or behind its run."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error)) from None


class Runs:
    """Runs of one model into folders of `root`, each of so many ranks; `wanted` holds the files of the unbroken one."""

    def __init__(self, root, steps=12, ranks=1):
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        torch.manual_seed(0)
        config = LlamaConfig(**shape, num_hidden_layers=1, vocab_size=64)
        LlamaForCausalLM(config).save_pretrained(root / "base")
        self.model = from_pretrained(root / "base", device="cpu", group_size=32)
        self.examples = [Example(tuple(range(i, i + 6)), labels=tuple(range(i, i + 6))) for i in range(1, 40)]
        self.settings = Settings(max_steps=steps, batch_size=2, directions=2, learning_rate=0.02)
        self.root, self.random, self.ranks, self.started = root, random.Random(0), ranks, 0
        self.end(root / "whole")
        self.wanted = {name: (root / "whole" / name).read_bytes() for name in KEPT}

    def run(self, out):
        """Begin a run, or go on with the one that is there, to its end: in this process, or as its rank."""
        task = Task(copy.deepcopy(self.model), self.examples, 0)
        fit(task, self.settings, out, resume=(out / "journal.qzo").exists(), show=False)
        if Ranks().first:
            save_pretrained(task.model, out / "model")
            disk.write_whole(out / "scales", arena_of(task.model).data.numpy().tobytes())

    def run_as(self, rank, store, out):
        """`run` as one of the ranks, which find each other by the file `store`."""
        with meeting():
            dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=self.ranks)
        self.run(out)
        with meeting():
            dist.barrier()

    def start(self, out):
        """`run` in forks: the process of each rank."""
        if self.ranks == 1:
            return [self.fork(lambda: self.run(out))]
        self.started += 1
        store = self.root / f"store-{self.started}"
        return [self.fork(functools.partial(self.run_as, rank, store, out)) for rank in range(self.ranks)]

    def fork(self, work):
        """The process in which work() is called; its status is FULL where that has told of a full disk, LOST where of
        another rank."""
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            work()
            status = 0
        except RankLost:
            status = LOST
        except BaseException as error:
            status = FULL if disk.full(error) == errno.ENOSPC else 1
            if status != FULL:
                traceback.print_exc()
        finally:
            os._exit(status)

    def end(self, out):
        """A run to its end, in forks; returns its seconds."""
        begun = time.monotonic()
        statuses = statuses_of(self.start(out))
        assert not any(statuses), f"a run has failed: status {statuses}"
        return time.monotonic() - begun

    def same(self, out):
        """Whether a folder holds what the unbroken run has left."""
        return all((out / name).read_bytes() == data for name, data in self.wanted.items())

    def half_saved(self, out):
        """Whether a name of the saved model is there with another content than it will have."""
        names = [name for name in KEPT if name.startswith("model/") and (out / name).exists()]
        return any((out / name).read_bytes() != self.wanted[name] for name in names)


def statuses_of(processes):
    """The exit status of each, the first rank's first; minus a signal's number where that has ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def broken_off(runs, out, seconds):
    """Begin a run or go on with it, and kill it within so many seconds. Which rank was killed, or "all"; None where the
    run has ended before."""
    processes = runs.start(out)
    victim = runs.random.choice([*range(runs.ranks), "all"]) if runs.ranks > 1 else "all"
    time.sleep(runs.random.uniform(0, seconds))
    if victim != "all":
        os.kill(processes[victim], signal.SIGKILL)
        time.sleep(runs.random.uniform(0, MOMENT))
    for process in processes:
        os.kill(process, signal.SIGKILL)
    statuses = statuses_of(processes)
    assert {*statuses} <= {0, -signal.SIGKILL, LOST}, f"a run has failed: status {statuses}"
    return victim if statuses[0] else None


def kills(runs, count):
    """So many SIGKILLs: a row of a results file."""
    victims: collections.Counter[str] = collections.Counter()
    seconds, folders, same, half = runs.end(runs.root / "timed"), 0, 0, 0
    while victims.total() < count:
        out, ended = runs.root / f"killed-{folders}", False
        while not ended and victims.total() < count:
            victim = broken_off(runs, out, seconds)
            ended = victim is None
            victims.update([] if ended else [str(victim)])
            half += runs.half_saved(out)
        if not ended:
            runs.end(out)
        folders += 1
        same += runs.same(out)
    return {
        "case": "SIGKILL at random moments",
        "ranks": runs.ranks,
        "times": victims.total(),
        "killed": dict(sorted(victims.items())),
        "runs": folders,
        "same_bits": same,
        "half_files": half,
    }


# ------------------------------------------------------------------------------------------------ power cuts


class Disk:
    """What of a folder's files a power cut would leave, followed through the syncs and renames of a run."""

    def __init__(self, folder):
        self.folder, self.moments = folder, []
        self.synced: dict[int, bytes] = {}  # inode -> content that is on the disk
        self.names: dict[Path, int] = {}  # name -> inode, on the disk

    def now(self):
        """{name: (inode, content)} as programs see it."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.folder): (path.stat().st_ino, path.read_bytes()) for path in files}

    def keep(self):
        """Remember this moment: (names on the disk, content on the disk, what programs see)."""
        self.moments.append((dict(self.names), dict(self.synced), self.now()))

    def sync(self, handle):
        """In place of os.fsync."""
        self.keep()
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path.is_dir():
            here = path.relative_to(self.folder)
            inside = {name: inode for name, (inode, _) in self.now().items() if name.parent == here}
            self.names = {name: inode for name, inode in self.names.items() if name.parent != here} | inside
        else:
            self.synced[os.fstat(handle).st_ino] = path.read_bytes()
        self.keep()

    @contextlib.contextmanager
    def followed(self):
        """Inside, syncs are counted and not made; moments are kept before and after each, and before each rename."""
        replace = os.replace

        def rename(*names):
            self.keep()
            replace(*names)
            self.keep()

        with mock.patch.object(os, "fsync", self.sync), mock.patch.object(os, "replace", rename):
            yield

    def leave(self, moment, out, chance):
        """Write what a power cut at that moment leaves into a new folder; chance: a random.Random."""
        names, synced, seen = moment
        content = dict(seen.values())
        now = {name: inode for name, (inode, _) in seen.items()}
        for name in sorted(names.keys() | now.keys()):
            inode = chance.choice([names.get(name), now.get(name)])
            if inode is None:
                continue
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(torn(synced.get(inode, b""), content.get(inode, b""), chance))


def torn(synced, written, chance):
    """What is left of a file of which `synced` is on the disk, and `written` was to be."""
    if not written.startswith(synced):
        return synced
    length = chance.randint(len(synced), len(written))
    zeros = chance.choice([0, len(written) - length])  # the length was on the disk, the content not
    return written[:length] + bytes(zeros)


def cuts(runs, count):
    """So many power cuts, half of them in a run that syncs each step: a row of a results file."""
    disks = []
    for seconds in (0.0, 2.0):
        out = runs.root / f"followed-{seconds:g}"
        out.mkdir()
        disks.append(Disk(out))
        with disks[-1].followed(), mock.patch.object(runs.settings, "journal_fsync", seconds):
            runs.run(out)
    same = 0
    for number in range(count):
        followed, out = disks[number % 2], runs.root / f"cut-{number}"
        out.mkdir()
        followed.leave(runs.random.choice(followed.moments), out, runs.random)
        runs.end(out)
        same += runs.same(out)
    return {"case": "a power cut at random moments", "times": count, "runs": count, "same_bits": same}


# ------------------------------------------------------------------------------------------------ full disks


def own_mounts():
    """Let this process, which has one thread, mount what no other one sees."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "no namespace of its own")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def on_small_disks(runs, folder, stride, told):
    """Runs on disks of 1, 1 + stride, ... pages, until one is large enough; a line for each to the file `told`."""
    own_mounts()
    pages, status = 1, FULL
    while status:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", folder], check=True)
        out = folder / "run"
        status = os.waitstatus_to_exitcode(os.waitpid(runs.fork(lambda out=out: runs.run(out)), 0)[1])
        half = runs.half_saved(out)
        subprocess.run(["mount", "-o", f"remount,size={16 << 20}", folder], check=True)
        runs.end(out)
        with open(told, "a", encoding="utf-8") as file:
            print(json.dumps({"pages": pages, "status": status, "same": runs.same(out), "half": half}), file=file)
        subprocess.run(["umount", folder], check=True)
        pages += stride


def disks(runs, stride):
    """A row of a results file; None where no file system can be mounted."""
    folder, told = runs.root / "small", runs.root / "told"
    folder.mkdir()
    told.touch()
    os.waitpid(runs.fork(lambda: on_small_disks(runs, folder, stride, told)), 0)
    found = [json.loads(line) for line in told.read_text().splitlines()]
    if not found:
        return None
    return {
        "case": "a disk that is full",
        "times": sum(one["status"] == FULL for one in found),
        "runs": len(found),
        "same_bits": sum(one["same"] for one in found),
        "half_files": sum(one["half"] for one in found),
        "pages": [found[0]["pages"], found[-1]["pages"]],
        "other_errors": sum(one["status"] not in (0, FULL) for one in found),
    }


def main(arguments=None):
    """Break runs off, and print a row for each way; append them to the file. Exit status 1 if one ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m qzo.bench.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of one process, and as many of two ranks")
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--stride", type=int, default=1, help="pages by which a disk is larger than the one before")
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--out", help="a JSONL file the rows are appended to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        runs, pairs = (Runs(Path(folder) / str(ranks), options.steps, ranks) for ranks in (1, 2))
        model = "Llama, random weights, 1 block of 32, 4 bits in groups of 32"
        rows = [lambda: kills(runs, options.kills), lambda: kills(pairs, options.kills)]
        rows += [lambda: cuts(runs, options.cuts), lambda: disks(runs, options.stride)]
        for make in rows:
            row = make()
            if row is None:
                continue
            good &= row["same_bits"] == row["runs"] and not row.get("half_files") and not row.get("other_errors")
            row |= {"model": model, "steps": options.steps, **machine("cpu"), "date": time.strftime("%Y-%m-%d")}
            results.append(row, options.out)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
