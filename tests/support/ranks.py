"""Ranks of torch.distributed as forks of this process, over gloo: no import is paid for twice."""

import datetime
import json
import os
import sys
import traceback

import torch
import torch.distributed as dist

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
