"""Faults planted in a copy of the package: a check of a few seconds has to see each of them.

What it proves is that the oracle, the data and the tolerances of the other tests can tell right from wrong.
"""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qzo

PACKAGE = Path(qzo.__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Fault:
    """In kernels/<file>, `old` (which stands there exactly once) becomes `new`; what is about `first`, or the file,
    is checked first."""

    file: str
    old: str
    new: str
    first: str = ""


FAULTS = {
    "kernel: sign of the relative coefficient": Fault("scales.py", "tl.fma(k, coef, 1.0)", "tl.fma(k, -coef, 1.0)"),
    "kernel: sign of the absolute coefficient": Fault(
        "scales.py", "tl.fma(k, coef, s)", "tl.fma(k, -coef, s)", "absolute"
    ),
    "kernel: everyone has the first seed": Fault("qmm.py", "tl.load(seeds_ptr + e)", "tl.load(seeds_ptr)"),
    "kernel: everyone has the first coefficient": Fault("qmm.py", "tl.load(coefs_ptr + e)", "tl.load(coefs_ptr)"),
    "kernel: a pair has one coefficient": Fault("qmm.py", "coefs_ptr + e + C.EACH - 1", "coefs_ptr + e", "pair"),
    "kernel: a pair's rows change places": Fault("qmm.py", "tl.where(minus, R, 0)", "tl.where(minus, 0, R)", "pair"),
    "kernel: a pair's second half": Fault(
        "scales.py", "tl.join(p, perturb(s, k, coef1, C.RELATIVE))", "tl.join(p, p)", "pair"
    ),
    "kernel: a pair's lanes": Fault("scales.py", "% 2 == 1, coef1, coef)", "% 2 == 0, coef1, coef)", "pair"),
    "kernel: a pair's order": Fault(
        "scales.py", "(4, 2, 16, 2)), (1, 0, 2, 3)", "(2, 4, 16, 2)), (0, 1, 2, 3)", "folded"
    ),
    "kernel: order of lanes": Fault("scales.py", "(4, 2, 16)), (1, 0, 2)", "(2, 4, 16)), (0, 1, 2)", "folded"),
    "kernel: outputs of lanes": Fault("scales.py", "return i // (C.LANES // C.BN)", "return i % C.BN", "pair"),
    "kernel: factor of a row": Fault(
        "qmm.py", "_choose(minus, factor(k0, coef),", "_choose(minus, factor(k0, -coef),", "shared"
    ),
    "reference: factor of a row": Fault("qmm_torch.py", "raw[0, :, 0]", "raw[0, :, 1]", "shared"),
    "update: noise of a row": Fault("update.py", "first + i % outputs", "first + i", "rows"),
    "update reference: noise of a row": Fault("update.py", "move[:, 0]", "move[:, 1]", "rows"),
    "update: every step is the first": Fault(
        "update.py", "(step * pairs, (step + 1) * pairs):\n            k0", "(pairs):\n            k0", "steps"
    ),
    "update: every step is the first, noise of a row": Fault(
        "update.py", "(step * pairs, (step + 1) * pairs):\n                k,", "(pairs):\n                k,", "rows"
    ),
    "update reference: a step's directions": Fault(
        "update.py", "islice(every, seeds.shape[1])", "islice(every, 1)", "steps"
    ),
    "kernel: rows of the first evaluation": Fault("qmm.py", "row = e * R + tl.", "row = 0 * R + tl."),
    "kernel: groups of the next tile": Fault("scales.py", "C.PER_TILE + tl.where(t %", "2 * C.PER_TILE + tl.where(t %"),
    "kernel: groups of the next quad": Fault("scales.py", "4 * next_quad(N, C) - 4, 0)", "4 * next_quad(N, C), 0)"),
    "kernel: third group of a tile": Fault("scales.py", "load_pair(sp + 2)", "load_pair(sp)"),
    "kernel: noise of the next tile": Fault("noise.py", "bits = held[0] << count", "bits = held[0] << 1", "ratio"),
    "kernel: noise of the next tile, other laws": Fault(
        "noise.py", "return held[2], held[3],", "return held[1], held[3],", "folded"
    ),
    "kernel: second of four bits": Fault("noise.py", "w1 >> 1 & 0x40000000", "w1 >> 2 & 0x40000000", "absolute"),
    "kernel: second value of a tile": Fault(
        "noise.py", "_raw_integer(held[0] << i,", "_raw_integer(held[0],", "absolute"
    ),
    "kernel: next quad of noise": Fault(
        "scales.py", "seed, base4 + quad.to(tl.int64) * next_quad(N, C)", "seed, base4 + quad.to(tl.int64)"
    ),
    "kernel: integer zero point": Fault("qmm.py", ".to(tl.int32) - C.MIDDLE)", ".to(tl.int32) - C.MIDDLE + 1)"),
    "kernel: zero points of the next group": Fault(
        "qmm.py", "t * PER_TILE + i, G - 1", "t * PER_TILE + i // 3 + i % 3, G - 1"
    ),
    "kernel: float zero point": Fault(
        "qmm.py", "C.MIDDLE - tl.load(zeros_ptr + n)", "7.0 - tl.load(zeros_ptr + n)", "row"
    ),
    "kernel: padding groups": Fault("qmm.py", "tl.where(group < G,", "tl.where(group < G + 9,", "absolute"),
    "kernel: float zero point in every split": Fault("qmm.py", "if first == 0:", "if first >= 0:", "row"),
    "kernel: ratio upside down": Fault("qmm.py", "prev * inverse, C.BN", "inverse / prev, C.BN", "ratio"),
    "kernel: a split lost": Fault("qmm.py", "range(1, C.SPLITS)", "range(1, C.SPLITS - 1)", "row"),
    "kernel: a split twice": Fault("qmm.py", "at + split * size", "at + split % 1 * size", "row"),
    "kernel: no program is the last": Fault("qmm.py", "== C.SPLITS - 1:", "== C.SPLITS:", "row"),
    "kernel: bias": Fault("qmm.py", "bias_ptr + n).to", "bias_ptr + n * 0).to"),
    "kernel: nibble order": Fault(
        "codes.py", "_plain(q, 0, 4, DT), _plain(q, 4, 4, DT)", "_plain(q, 4, 4, DT), _plain(q, 0, 4, DT)", "integer"
    ),
    "kernel: order of 2-bit codes": Fault(
        "codes.py",
        "(_plain(q, 0, 2, DT), _plain(q, 8, 2, DT), _plain(q, 2, 2, DT)",
        "(_plain(q, 0, 2, DT), _plain(q, 2, 2, DT), _plain(q, 8, 2, DT)",
    ),
    "kernel: order of bytes": Fault(
        "codes.py", "_plain(q, 0, 8, DT), _plain(q, 8, 8, DT)", "_plain(q, 8, 8, DT), _plain(q, 0, 8, DT)", "bytes"
    ),
    "kernel: second words of 8 bits": Fault("codes.py", "tl.load(cp + 32)", "tl.load(cp + 31)", "bytes"),
    "kernel: third code of a table's word": Fault("table.py", "(q >> 8) & 15", "(q >> 4) & 15"),
    "reference: order of a byte's entries": Fault(
        "table.py", "[entries[every & 15], entries[every >> 4]]", "[entries[every >> 4], entries[every & 15]]"
    ),
    "kernel: words of a tile": Fault("qmm.py", "cp += N * C.WORDS", "cp += N * 32", "codes.py"),
    "kernel: what an exact table leaves": Fault("forms.py", "entries_ptr + 16 * turn", "entries_ptr + 0 * turn"),
    "reference: what an exact table leaves": Fault("table.py", "device).sum(0)", "device)[0]", "exact"),
    "kernel: order of inputs": Fault("vectors.py", "2 * (i // 16) + i % 2", "2 * (i // 16) + 1 - i % 2"),
    "kernel: inputs of the next dot": Fault("plan.py", "depth // 8 if vectors", "depth // 4 if vectors"),
    "kernel: second of two vectors": Fault("vectors.py", "r // 4 - i", "r // 8 - i"),
    "kernel: second codebook": Fault("vectors.py", "((q >> 8) + (1 << BITS)) * 8", "(q >> 8) * 8"),
    "kernel: codebooks of the second word": Fault("vectors.py", "(2 * w if BITS <= 8", "(w if BITS <= 8"),
    "words: order of codes": Fault("vectors.py", "[wide & 0xFF, wide >> 8], 3", "[wide >> 8, wide & 0xFF], 3"),
    "planes: order of codes": Fault(
        "codes.py", "(words >> bits * j + 8 * s)", "(words >> 16 - bits - bits * j - 8 * s)", "integer"
    ),
    "rows: order of codes": Fault("codes.py", "[(body >> bits * j)", "[(body >> 8 - bits - bits * j)"),
    "noise: words in another order": Fault(
        "noise.py", "_raw_integer(w0, LAW), _raw_integer(w1,", "_raw_integer(w1, LAW), _raw_integer(w0,"
    ),
    "noise: words of the reference in another order": Fault("noise.py", "enumerate(words)", "enumerate(words[::-1])"),
    "noise: a round less, in all alike": Fault("noise.py", "ROUNDS = 7 ", "ROUNDS = 6 "),
    "noise: second counter word": Fault(
        "noise.py", "(quad >> 32).to(tl.uint32)", "(quad >> 33).to(tl.uint32)", "ratio"
    ),
    "noise: sign bit": Fault("noise.py", "w & 0x80000000", "w & 0", "absolute"),
    "noise: a byte of ih4": Fault("noise.py", "((w >> 8) & 0x00FF00FF)\n", "((w >> 8) & 0x00FF007F)\n"),
    "reference: sign of the coefficient": Fault("qmm_torch.py", "k * coef", "k * -coef"),
    "reference: noise of the evaluation before": Fault("qmm_torch.py", "setdefault(seed, [])", "setdefault(0, [])"),
    "reference: everyone has the first coefficient": Fault("qmm_torch.py", "raw, self.coefs[e]", "raw, self.coefs[0]"),
    "reference: zero points": Fault("qmm_torch.py", "units -= ", "units += "),
    "reference: base of the layer": Fault(
        "qmm_torch.py", "wanted = weight.base4 + ", "wanted = 0 * weight.base4 + ", "ratio"
    ),
    "few rows: zero points": Fault("few_rows.py", "alpha=-1", "alpha=1"),
    "few rows: scales of quads": Fault("few_rows.py", ".transpose(1, 2).reshape(", ".reshape("),
    "few rows: whole rows of several bags": Fault("few_rows.py", "sums.sum(1, keepdim=True)", "sums[:, :1]"),
    "update: sign of the floor": Fault("update.py", "tl.where(negative, size * -1.0, size)", "size"),
    "update: no floor": Fault(
        "update.py", "tl.maximum(tl.where(negative, -new, new), floor)", "tl.where(negative, -new, new)"
    ),
    "update: a zero scale moves": Fault("update.py", "(s == 0.0) |", "(s == 9.0) |", "zero"),
    "update: words joined in another order": Fault("update.py", "tl.join(k0, k2)", "tl.join(k2, k0)"),
    "update: quads of the base": Fault("update.py", "base4 + i, LAW", "i, LAW"),
    "update reference: sign of the floor": Fault("update.py", "torch.where(negative, -size, size)", "size"),
    "update reference: floor": Fault("update.py", ".clamp_(min=floor)", ".clamp_(min=0)"),
}


def copy_with(fault, to):
    """A copy of the package under `to`, with one fault or none."""
    shutil.copytree(PACKAGE, to / "qzo", ignore=shutil.ignore_patterns("__pycache__", "bench"))
    if fault is not None:
        path = to / "qzo" / "kernels" / fault.file
        source = path.read_text()
        count = source.count(fault.old)
        assert count == 1, f"{fault.old!r} stands {count} times in {fault.file}"
        path.write_text(source.replace(fault.old, fault.new))
    return to


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Name of each fault, and None for the true package -> what the quick check says."""
    root = tmp_path_factory.mktemp("mutants")
    names = [None, *FAULTS]
    copies = [copy_with(None if name is None else FAULTS[name], root / str(i)) for i, name in enumerate(names)]
    first = ["", *(fault.first or fault.file for fault in FAULTS.values())]
    wanted = [f"{copy}:{word}" for copy, word in zip(copies, first, strict=True)]
    script = Path(__file__).with_name("quick_check.py")
    done = subprocess.run(
        [sys.executable, str(script), *wanted], capture_output=True, text=True, timeout=1800, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def test_the_true_package_is_green(verdicts):
    assert verdicts[None] == "green"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(verdicts, name):
    assert verdicts[name] not in ("green", "CRASH")
