"""What is measured: one registry of cases, with the bytes and the products that each cannot do without.

A product is that of a pair of evaluations, +eps and -eps, of `rows` rows each, by one linear layer of a model. Bytes
count every operand once, as a device without a cache would move them: codes, float32 scales, x and y.
"""

import dataclasses
import functools

import torch

from ..reports.codes import CODES

LAYERS = {  # in_features, out_features of the linears of each model
    "llama-2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-2-13b": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "llama-3.1-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "opt-6.7b": ((4096, 4096), (4096, 16384), (16384, 4096)),
    "sd3.5-large": ((2432, 2432), (2432, 9728), (9728, 2432), (2432, 14592)),
    "smollm2-135m": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
}
BLOCKS = {  # the linears of one block, in order, and how many blocks the model has
    "llama-2-7b": ([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)], 32),
    "llama-2-13b": ([(5120, 5120)] * 4 + [(5120, 13824)] * 2 + [(13824, 5120)], 40),
    "smollm2-135m": ([(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)], 30),
}
ROWS = (1, 4, 16, 64, 128, 512, 2048, 8192)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LAWS = ("rademacher", "ih4", "gaussian")
KINDS = ("linear", "step", "update", "noise", "journal", "overhead")


# codes -> model -> rows that are timed beside int4 in the same groups
BESIDE_INT4: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "cuda": {
        "nf4": {"llama-2-7b": (1, 16, 64, 512), "sd3.5-large": (512,)},
        "aqlm-1x16": {"llama-2-7b": (1, 16, 512)},
        "aqlm-2x8": {"llama-2-7b": (1, 16, 64, 512)},
    },
    "cpu": {"nf4": {"smollm2-135m": (16,)}, "aqlm-2x8": {"smollm2-135m": (16,)}},
}
ARENA = 1 << 23  # scales of the update and noise cases: 32 MB
CPU_ROWS = (1, 16, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """kind "linear": the product. "step": all linears of `blocks` blocks under a pair, their losses and the update.
    "update", "noise", "journal": one update of `n` scales, n noise values, one journal record; rows and k are 0.
    "overhead": what Python costs a linear, no kernel launched (overhead.py); n and k are 0.
    codes: a name of CODES."""

    kind: str
    model: str
    k: int
    n: int
    rows: int
    group: int = 128
    dtype: str = "bfloat16"
    noise: str = "rademacher"
    blocks: int = 0
    codes: str = "int4"

    @property
    def form(self):
        """What stands in memory."""
        return CODES[self.codes]

    @property
    def name(self):
        if self.kind in ("linear", "step"):
            what = f"{self.k}x{self.n}" if self.kind == "linear" else f"{self.blocks} blocks"
            return (
                f"{self.kind} {self.model} {what} rows {self.rows} g{self.group} {self.dtype} {self.noise}"
                f"{self.form.suffix}"
            )
        small = {"journal": "journal append", "overhead": f"overhead of a linear, rows {self.rows}"}
        return small.get(self.kind, f"{self.kind} {self.noise} {self.n}")

    @property
    def shapes(self):
        """(in, out) of every layer that runs."""
        if self.kind == "linear":
            return ((self.k, self.n),)
        return tuple(BLOCKS[self.model][0] * self.blocks) if self.kind == "step" else ()

    @property
    def bytes(self):
        """Bytes that have to be moved: codes, codebooks and scales once, x and y of both evaluations; the update's read
        and write of every scale."""
        if self.kind == "update":
            return 8 * self.n
        if self.kind == "noise":
            return 4 * self.n
        if self.kind == "journal":
            return 32
        item = DTYPES[self.dtype].itemsize
        scales = [4 * (k // self.group) * n for k, n in self.shapes]
        weights = sum(k * n * self.form.weight_bits // 8 + self.form.book_entries * item for k, n in self.shapes)
        product = weights + sum(2 * self.rows * (k + n) * item for k, n in self.shapes) + sum(scales)
        return product + (2 * sum(scales) if self.kind == "step" else 0)

    @property
    def written(self):
        """Of `bytes` those that are written."""
        if self.kind == "update":
            return 4 * self.n
        if not self.shapes:
            return self.bytes
        outputs = sum(2 * self.rows * n for _, n in self.shapes) * DTYPES[self.dtype].itemsize
        scales = sum(4 * (k // self.group) * n for k, n in self.shapes)
        return outputs + (scales if self.kind == "step" else 0)

    @property
    def flops(self):
        """Two per multiply-add, both evaluations."""
        return sum(4 * self.rows * k * n for k, n in self.shapes)


def group_of(model):
    """The largest group size that divides every in_features of a model."""
    return next(g for g in (128, 64, 32) if all(k % g == 0 for k, _ in LAYERS[model]))


def linears(models, rows, dtypes, laws=("rademacher",), groups=None, codes="int4"):
    """Every linear of `models`; groups: None for the codes' own, or the model's."""
    for model in models:
        for k, n in LAYERS[model]:
            own = k if CODES[codes].group == -1 else CODES[codes].group or group_of(model)
            for group in groups or (own,):
                for dtype in dtypes:
                    for r in rows:
                        for law in laws:
                            if k % group == 0:
                                yield Case("linear", model, k, n, r, group, dtype, law, codes=codes)


def _small(device):
    """The cases without a layer."""
    for law in LAWS:
        yield Case("update", "", 0, ARENA if device == "cuda" else ARENA // 8, 0, noise=law)
        if device == "cpu":  # no kernel writes noise: on a GPU there is nothing to time
            yield Case("noise", "", 0, ARENA // 8, 0, noise=law)
    for rows in (16, 512):  # per evaluation: with splits, and without
        yield Case("overhead", "", 0, 0, rows)
    yield Case("journal", "", 0, 0, 0)


@functools.cache
def every(device):
    """All cases of a device, in order: what --filter chooses from."""
    dtypes = ("float32",) if device == "cpu" else ("float16", "bfloat16")
    found = list(linears(LAYERS, ROWS if device == "cuda" else (*CPU_ROWS, 1024), dtypes))
    small = ("llama-2-7b",) if device == "cuda" else ("smollm2-135m",)
    found += linears(small, (16, 512) if device == "cuda" else (16,), dtypes, LAWS[1:])  # the other laws
    found += [
        c
        for c in linears(small, (16, 512) if device == "cuda" else (16,), dtypes, groups=(32, 64, 128))
        if c not in found
    ]
    for codes in ("int2", "int8"):
        found += linears(small, (16, 512) if device == "cuda" else (16,), dtypes, codes=codes)
    for codes, models in BESIDE_INT4[device].items():
        for model, several in models.items():
            for case in linears((model,), several, dtypes, codes=codes):
                found += [c for c in (dataclasses.replace(case, codes="int4"), case) if c not in found]
    for model, (_, blocks) in BLOCKS.items():
        for rows in (1, 16, 128, 512, 2048) if device == "cuda" else CPU_ROWS:
            run = blocks if device == "cuda" else min(blocks, 6 if model == "smollm2-135m" else 1)
            found.append(Case("step", model, 0, 0, rows, group_of(model), dtypes[0], "rademacher", run))
    return (*found, *_small(device))


def default(device):
    """What `run` measures when it is not told: all on a GPU; on a CPU what ends in minutes."""
    if device == "cuda":
        return every(device)
    return tuple(
        c
        for c in every(device)
        if c.kind not in ("linear", "step")
        or (
            c.rows <= 256
            and (
                (c.model == "smollm2-135m" and (c.kind == "step" or c.n == 1536 or _usual(c)))
                or (c.model == "llama-2-7b" and c.n == c.k == 4096 and _usual(c))
            )
        )
    )


def _usual(case):
    """Few rows, the default law and group: what every shape is measured with."""
    return case.rows <= 16 and case.noise == "rademacher" and case.group == group_of(case.model)


def choose(device, text=None):
    """The cases whose name holds `text`, in any case; ValueError, with names that there are, if none does."""
    if text is None:
        return default(device)
    found = tuple(c for c in every(device) if text.lower() in c.name.lower())
    if not found:
        names = [c.name for c in every(device)]
        shown = ", ".join(names[:: max(1, len(names) // 8)])
        raise ValueError(
            f"no case of {device} has {text!r} in its name; there are {len(names)}, such as: {shown} "
            "(qzo bench run --list names all)"
        )
    return found
