"""The processes ("ranks") of torch.distributed that make one run: what they tell each other, and that they are alike.

A rank sends numbers and settings, never a tensor of the model's size, but where layers are cut in parts (nn/part.py);
whatever comes back is the same on each. Nothing here is a process group of its own: torchrun's, or whoever's called
`torch.distributed.init_process_group`, is used.

Terms (rank): docs/glossary.md.
"""

import collections
import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

TOLD = 512  # bytes of a rank's own complaint that others hear
BLOCK = 1 << 16  # numbers that are hashed at a time
PATIENCE = 1800.0  # seconds that ranks wait for each other to begin, as torch's groups do


class RanksDiffer(ValueError):
    """Ranks were started with other settings, data, model or code than the first one."""


class FirstFailed(ValueError):
    """What the first rank did for all has failed there."""


class RanksDiverged(RuntimeError):
    """The scales of some ranks have other bits than those of the others."""


class RankLost(RuntimeError):
    """Another rank has ended, or does not answer."""


class Ranks:
    """The processes of a run, this one among them.

    rank, count : which one this is, and how many there are; alone it is 0 of 1, and nothing is sent
    first : whether this is the one that writes and prints
    sent : bytes that this rank has given to collective calls so far
    """

    def __init__(self, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.first, self.sent = self.rank == 0, 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of each rank, of one shape and dtype on all -> [R, ...] in the order of the ranks, on the CPU."""
        return self.send(values)()

    def send(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin a `gather`, and go on: what comes back waits for the other ranks and gives what they sent."""
        if self.count == 1:
            return lambda: values.cpu()[None]
        values = values.to(_device()).contiguous()
        found = [torch.empty_like(values) for _ in range(self.count)]
        with _listening():
            work = dist.all_gather(found, values, async_op=True)
        self.sent += values.nbytes

        def wait() -> torch.Tensor:
            with _listening():
                work.wait()
            return torch.stack(found).cpu()

        return wait

    def exchange(self, values: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of each rank, of one shape [..., n] and dtype on all -> those of all ranks in their order, on its
        own device: parts of activations and of codes, which the process group's backend for that device sends."""
        if self.count == 1:
            return [values]
        data = values.contiguous().view(-1).view(torch.uint8)  # a backend may lack the dtype
        found = [torch.empty_like(data) for _ in range(self.count)]
        with _listening():
            dist.all_gather(found, data)
        self.sent += data.nbytes
        return [one.view(values.dtype).view(values.shape) for one in found]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What make(), called on the first rank alone, returned there: anything of JSON.

        What it raises there is raised there; the other ranks then raise FirstFailed with the same text.
        """
        if self.count == 1:
            return make()
        error: ValueError | OSError | None = None
        told = b""
        if self.first:
            try:
                told = json.dumps([make(), None]).encode()
            except (ValueError, OSError) as caught:
                error, told = caught, json.dumps([None, str(caught)]).encode()
        value, problem = json.loads(self._broadcast(told))
        if error is not None:
            raise error
        if problem is not None:
            raise FirstFailed(f"rank 0: {problem}")
        return value

    def _broadcast(self, data: bytes) -> bytes:
        """Bytes of the first rank, on all."""
        size = torch.tensor(len(data), device=_device())
        with _listening():
            dist.broadcast(size, 0)
            body = torch.empty(int(size), dtype=torch.uint8, device=size.device)
            if self.first:
                body.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(body, 0)
        self.sent += self.first * (size.nbytes + body.nbytes)
        return body.cpu().numpy().tobytes()

    def check_same(self, fields: Mapping[str, Any]) -> None:
        """RanksDiffer, on all ranks, unless they all have the same fields (JSON, as deep as it goes): it names the
        first rank that has others, the first field in which it does, and both values."""
        if self.count == 1:
            return
        mine = json.loads(json.dumps(fields))
        found = difference(json.loads(self._broadcast(json.dumps(mine).encode())), mine)
        said = b"" if found is None else f"{found[0]} is {_shown(found[2])}, rank 0's is {_shown(found[1])}".encode()
        said = said[:TOLD]
        padded = torch.frombuffer(bytearray(said.ljust(TOLD, b"\0")), dtype=torch.uint8)
        for rank, told in enumerate(self.gather(padded)):
            text = told.numpy().tobytes().rstrip(b"\0").decode(errors="replace")
            if text:
                raise RanksDiffer(
                    f"rank {rank}: its {text}: start all ranks with the same settings, data, model and versions"
                )

    def check_alike(self, scales: torch.Tensor, step: int, since: int) -> None:
        """RanksDiverged, on all ranks, unless they hold scales of the same bits after `step` steps; 8 bytes a rank.
        since: the steps after which they last did."""
        if self.count == 1:
            return
        found = self.gather(torch.tensor(digest(scales))).tolist()
        most, _ = collections.Counter(found).most_common(1)[0]
        others = [str(rank) for rank, one in enumerate(found) if one != most]
        if others:
            raise RanksDiverged(
                f"after step {step} the scales of rank{'s' * (len(others) > 1)} {', '.join(others)} of {self.count} "
                f"have other bits than those of the others; after step {since} all were the same. The run stops: the "
                "journal's coefficients up to there are sound, those after it come of losses of different models. "
                "Look for a faulty device, or ranks of different kinds of devices under noise that is not integer"
            )


def launched() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The Ranks that a launcher has started this process among, by torchrun's variables of the environment; each has
    its own GPU of its machine as the current one, if there are any. ValueError where a variable is missing."""
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank(0) % torch.cuda.device_count())
    store, rank, count = next(rendezvous("env://"))
    store = dist.PrefixStore(_start(store, rank, count), store)
    dist.init_process_group(store=store, rank=rank, world_size=count)  # gloo on a CPU, NCCL on a GPU
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def _start(store: dist.Store, rank: int, count: int) -> str:
    """A name that all ranks share, and that no earlier start of them had.

    torchrun keeps its store when it starts ranks anew, and in it the addresses of the dead, which those who come first
    would try (torch 2.13). So each rank leaves a new name; the first lists what is there until each has found its own.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + PATIENCE
    store.set(f"here/{rank}", mine)
    while time.monotonic() < until:
        if rank == 0:
            names = [store.get(f"here/{other}").decode() for other in range(1, count)]
            store.set("start", ",".join([mine, *names]))
            if all(store.check([f"found/{mine}/{name}"]) for name in names):
                return mine
        else:
            first, *names = store.get("start").decode().split(",")
            if mine in names:
                store.set(f"found/{first}/{mine}", "")
                return first
        time.sleep(0.02)
    raise RankLost(f"{count} ranks have not found each other within {PATIENCE:g} s")


def difference(wanted: Any, got: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, wanted, got) of the first entry in which two values of JSON differ, None where they do not."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        for key in sorted({*wanted, *got}):
            found = difference(wanted.get(key), got.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if wanted == got else (name, wanted, got)


def digest(scales: torch.Tensor) -> int:
    """64 bits of a hash of a float32 tensor's bytes; a block of it at a time comes to the host."""
    hashed = hashlib.blake2b(digest_size=8)
    for block in scales.detach().flatten().split(BLOCK):
        hashed.update(block.contiguous().cpu().numpy().data)
    return int.from_bytes(hashed.digest(), "little", signed=True)


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """What a collective call says of ranks that are no longer there becomes RankLost."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"another rank has ended or does not answer ({str(error).splitlines()[0]}): what it said itself tells why; "
            "steps in the journal are whole"
        ) from error


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _device() -> torch.device:
    """Where the process group takes tensors: the CPU if any of its backends does, else this process's GPU."""
    if "cpu" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
