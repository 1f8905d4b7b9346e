"""Ranks of torch.distributed as forks of this process, over gloo: no import is paid for twice."""

import contextlib
import datetime
import json
import os
import socket
import sys
import traceback

import torch
import torch.distributed as dist

from qzo.cli.main import main

LIMIT = datetime.timedelta(seconds=60)  # that a rank waits for another


def run(folder, count, function, *arguments, left=None):
    """What function(*arguments) returns on each of `count` ranks: JSON, or "Kind: text" of what it raised. left: how
    many, the first, tell it; None: all."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    children = [_fork(folder, rank, count, function, arguments) for rank in range(count)]
    for child in children:
        os.waitpid(child, 0)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(left or count)]


def commands(folder, count, line, before=lambda rank: None):
    """(exit status, what it has printed, what it has said) of a command line of `qzo` on each of `count` ranks, which
    are told of each other as torchrun does it. before(rank): called on each, first."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    children = [_command(folder, rank, count, port, line, before) for rank in range(count)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [
        (status, *((folder / f"{rank}.{stream}").read_text() for stream in ("out", "err")))
        for rank, status in enumerate(statuses)
    ]


def _command(folder, rank, count, port, line, before):
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
        torch.set_num_threads(1)  # those of the parent are not here
        with (
            contextlib.redirect_stdout(open(folder / f"{rank}.out", "w")),
            contextlib.redirect_stderr(open(folder / f"{rank}.err", "w")),
        ):
            before(rank)
            status = main(line)
            sys.stdout.flush()
            sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _fork(folder, rank, count, function, arguments):
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # those of the parent are not here
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count, timeout=LIMIT)
        try:
            found = function(*arguments)
        except Exception as error:  # of any kind: the parent's test holds it against what it expects
            found = f"{type(error).__name__}: {error}"
        (folder / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
