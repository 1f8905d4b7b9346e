"""Compile the kernels with no GPU, read their machine code, hold it to budgets.

    python -m qzo.bench.codegen.sass --check                            what the tests hold, every architecture
    python -m qzo.bench.codegen.sass --arch sm_90 --set every --check   all that the benchmark can launch (nightly)
    python -m qzo.bench.codegen.sass --arch sm_90 --only "128x128" --json

Triton itself checks neither spills nor the shared memory a chip has, and has compiled a kernel to a bare trap
without an error. Counts are static and per warp: `loop` is the main loop, one tile of 128 k; the noise of a quad
of scales sits in a block that is jumped over in all but one of `period` rounds, so a `step` is
loop - skip * (1 - 1 / period). Nothing here tells speed or that results are right.
"""

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys

import triton

from ...kernels import tiles
from . import launches
from .budgets import BUDGETS, MEASURED_SPILLS, PARKED, over_budget
from .disassembly import disassembled, machine_code, usage
from .waits import base_argument, read_ahead

TENSOR_CORE = {
    "sm_80": r"HMMA",
    "sm_86": r"HMMA",
    "sm_89": r"HMMA",
    "sm_90": r"HGMMA",
    "sm_100": r"UTC\w*MMA",
    "sm_120": r"HMMA",
}
CLASSES = (  # the first pattern that an instruction's name begins with, for the mix that is printed
    ("mma", r"HG?MMA|UTC\w*MMA"),
    ("ldgsts", r"LDGSTS"),
    ("ldg", r"LDG"),
    ("ldsm", r"LDSM"),
    ("lds", r"LDS"),
    ("sts", r"STS|STSM"),
    ("tmem", r"STTM|LDTM"),
    ("local", r"LDL|STL"),
    ("shfl", r"SHFL"),
    ("barrier", r"BAR|WARPSYNC|SYNCS|DEPBAR|WARPGROUP|LDGDEPBAR"),
    ("convert", r"I2F|F2F|F2I"),
    ("logic", r"LOP3|PLOP"),
    ("shift", r"SHF|SHL|SHR|USHF"),
    ("prmt", r"PRMT"),
    ("integer", r"U?IMAD|U?IADD|LEA|VIADD"),
    ("half2", r"HFMA2|HADD2|HMUL2"),
    ("fp32", r"FFMA|FMUL|FADD"),
    ("mufu", r"MUFU"),
    ("move", r"U?MOV|R2UR|CS2R"),
    ("branch", r"BRA|BSSY|BSYNC|CALL|RET"),
)


# -------------------------------------------------------------------------------- compile and measure


def compile_launch(launch):
    """Triton's compiled kernel for a Launch."""
    source = triton.compiler.ASTSource(
        launches.KERNELS[launch.kernel],
        dict(launch.signature),
        {(i,): value for i, value in launch.constants},
        {(i,): [list(pair) for pair in pairs] for i, pairs in launch.attributes},
    )
    limit = {"maxnreg": launch.registers} if launch.registers else {}
    return triton.compile(
        source,
        target=launches.target(launch.arch),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False, **limit},
    )


def main_loop(code, tensor_core):
    """The loop with the most tensor-core instructions, the shortest of those; without a loop all code.

    A jump back into the middle of another loop, from behind it, is no loop: there ptxas puts the waiting of sm_100.
    """
    back = [(i.jump, i.at) for i in code if (i.jump or i.at) < i.at]
    loops = [(to, at) for to, at in back if not any(first < to < last < at for first, last in back)]
    bodies = [[i for i in code if to <= i.at <= at] for to, at in loops]
    most = max(bodies, key=lambda body: (sum(_is(i, tensor_core) for i in body), -len(body)), default=code)
    return [i for i in most if i.name != "NOP"]


def _is(instruction, pattern):
    return re.match(pattern, instruction.name) is not None


def _skip(body):
    """Instructions in the largest block of a loop that a forward branch within the loop jumps over."""
    inside = [i for i in body if i.jump and i.at < i.jump <= body[-1].at]
    return max((sum(branch.at < i.at < branch.jump for i in body) for branch in inside), default=0)


def _stored_bytes(body):
    """Bytes a thread stores to shared memory in a round of the loop (STS.128: 16; STSM counts as 16)."""
    widths = [re.search(r"\.(?:U)?(8|16|64|128)\b", i.name) for i in body if _is(i, "STS(?!M)")]
    return sum(int(w[1]) // 8 if w else 4 for w in widths) + 16 * sum(_is(i, "STSM") for i in body)


def _match(pattern, text):
    """Of what a compiler always prints."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern!r} is not in what the compiler printed: {text[:200]!r}")
    return found


def resources(launch, compiled):
    """What a compiled Launch holds of its chip, as a dict of numbers."""
    if launch.arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        read = {key: int(_match(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {
            "registers": read["vgpr_count"],
            "spill": read["vgpr_spill_count"],
            "shared": compiled.metadata.shared,
            "tensor": len(re.findall(r"v_mfma", text)),
        }
    found = _match(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage(compiled.asm["cubin"]))
    return {"registers": int(found[1]), "spill": int(found[2]) + int(found[3]), "shared": compiled.metadata.shared}


def measure(launch, code, ptx):
    """Figures of a Launch's instructions, and of its PTX, as a dict of numbers (and "mix", a dict)."""
    tensor_core = TENSOR_CORE[launch.arch]
    body = main_loop(code, tensor_core)
    mix = collections.Counter(next((name for name, pattern in CLASSES if _is(i, pattern)), "other") for i in body)
    wgmma = [i for i in body if _is(i, "HGMMA")]
    period = 1
    if launch.kernel == "folded" or (launch.kernel == "qmm" and not launch.constant("WHOLE_ROW")):
        period = 4 * launch.constant("GROUP") // 128
    skip = _skip(body)
    return {
        "tensor": sum(_is(i, tensor_core) for i in body),
        "trap": sum(_is(i, "BPT") for i in code),
        "loop": len(body),
        "skip": skip,
        "step": int(len(body) - skip * (1 - 1 / period)),  # halves down, all alike: round() takes them to even
        "local": sum(_is(i, "LDL|STL") for i in body),
        "stored_bytes": _stored_bytes(body),
        # how many words of vectors are looked up, each in codebooks of its own: by the steps to their address
        "words": len({text.count("add.u64 base") for text in ptx.split("ld.param.u64 base")[1:]}),
        "base": base_argument(ptx, launch.signature),
        "copies_16": sum(_is(i, r"LDGSTS\S*\.128") for i in body),
        # weights in registers: "HGMMA.. R24, R120, gdesc[UR8], .."; in memory: "R24, gdesc[..]"
        "wgmma": len(wgmma),
        "wgmma_registers": sum(bool(re.match(r"R\d+,\s*R\d+,", i.operands)) for i in wgmma),
        "waits": sum(i.name.startswith("WARPGROUP.DEPBAR") for i in body),
        "idle": sum(i.name.startswith("WARPGROUP.DEPBAR") and "0x0" in i.operands for i in body),  # wait for all
        "early": early(ptx),
        "read_ahead": read_ahead(body),
        "mix": dict(mix),
    }


def early(ptx):
    """Reads before a kernel has waited for the launch ahead of it, whose results they may be; -1: it never waits."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return len(re.findall(r"\b(?:ld\.global|cp\.async|atom\.)", before)) if wait else -1


# -------------------------------------------------------------------------------- what must hold


def faults(launch, figures):
    """What is wrong with a compiled launch, whatever its form: one-line texts, none when all is well."""
    bad = []
    allowed = spill_allowed(launch)
    parked = PARKED if figures.get("local") == 0 and launch.kernel == "qmm" else 0
    if figures["spill"] > max(allowed, parked) or (figures.get("local") and not allowed):
        bad.append(f"spills: {figures['spill']} bytes of stack, {figures.get('local', 0)} accesses in the main loop")
    if figures["shared"] > tiles.SHARED_BYTES[launch.arch]:
        bad.append(f"shared memory {figures['shared']} > {tiles.SHARED_BYTES[launch.arch]} bytes of {launch.arch}")
    if launch.kernel not in ("qmm", "folded") or not _is_half(launch):  # float32 runs on plain multiply-adds
        return bad
    if not figures["tensor"]:
        bad.append(
            "no tensor-core instruction in the main loop"
            + (f", {figures['trap']} traps" if figures.get("trap") else "")
        )
    # on sm_100 the allocation of tensor memory is guarded by traps
    if figures.get("trap") and figures["tensor"] and launch.arch != "sm_100":
        bad.append(f"{figures['trap']} traps")
    return bad


def spill_allowed(launch):
    """Bytes of stack that a launch may have: those of MEASURED_SPILLS, else none."""
    if launch.kernel != "qmm" or launch.constant("BITS") != 4 or launch.constant("ZERO"):
        return 0
    if launch.looks_up:
        return 0
    return MEASURED_SPILLS.get((launch.arch, launch.constant("BM"), launch.constant("BN"), launch.warps), 0)


def form_faults(launch, figures):
    """Where weights leave the way from packed words through registers to tensor cores; as faults()."""
    if launch.kernel not in ("qmm", "folded") or not _is_half(launch) or launch.arch.startswith("gfx"):
        return []
    bad = []
    if figures["wgmma_registers"] != figures["wgmma"]:
        bad.append(
            f"{figures['wgmma'] - figures['wgmma_registers']} of {figures['wgmma']} wgmma read their weights "
            "from shared memory"
        )
    if launch.kernel == "folded" and figures["idle"]:
        bad.append(f"{figures['idle']} of {figures['waits']} waits leave the tensor cores nothing to do")
    if launch.kernel == "qmm" and launch.constant("BOOKS"):  # x in pieces of 4 bytes: those of 16 are words of codes
        words = launch.constant("BN") * 16 * launch.constant("PASSES")
        if figures["copies_16"] * 8 * 32 * launch.warps != words:
            bad.append(f"{figures['copies_16']} copies of 16 bytes a thread, not those that read {words} words once")
        if figures["words"] != launch.constant("PASSES"):
            bad.append(f"codebooks of {figures['words']} of {launch.constant('PASSES')} words are looked up")
        if figures["base"] != "entries_ptr":
            bad.append(f"assembly takes its codebooks from {figures['base']}, they are entries_ptr")
    if launch.kernel == "qmm" and launch.constant("PDL") and figures["early"]:
        reads = f"{figures['early']} reads before" if figures["early"] > 0 else "never"
        bad.append(f"the launch ahead is waited for: {reads}")
    if launch.arch == "sm_100" and (launch.constant("BITS") == 2 or launch.looks_up):
        return bad  # not all of them find a way into tensor memory
    # one number per output, a scale or a zero point, may pass through shared memory; unpacked weights not. Of the
    # folded form that is a word for each group, which sm_120 stores 16 bytes at a time
    weights = launch.constant("BN") * 128 * 2 // (32 * launch.warps)
    if figures["stored_bytes"] > weights // (2 if launch.kernel == "folded" else 4):
        bad.append(
            f"{figures['stored_bytes']} bytes a thread stored to shared memory in a step, where the weights "
            f"are {weights}"
        )
    return bad


def _is_half(launch):
    return dict(launch.signature)["x_ptr"] in ("*bf16", "*fp16")


# -------------------------------------------------------------------------------- sets and the command


FAMILIES = ("sm_90", "sm_80", "sm_100", "gfx942")  # a chip of each family of tensor cores


def launch_set(name, archs):
    """Distinct launches of a set, all with those of the budgets.

    "tiles": every tile, usual flags, and of what large_rows="blas" makes every two flags on one of the chips; "quick":
    those, the kernels that update, and of matmuls every two flags on one of FAMILIES, of which each has every flag;
    "every": the whole product, thousands for each chip.
    """
    matmuls = [budget.case for budget in BUDGETS if budget.case.arch in archs]
    chunks, updates, plain = [], [], []
    if name in ("tiles", "quick"):
        plain += [case for arch in archs for case in launches.plain(arch)]
        chunks += launches.spread(archs, launches.CHUNKS)
    if name == "quick":
        updates += launches.spread(archs, launches.UPDATES)
        families, held = [arch for arch in FAMILIES if arch in archs], [*matmuls, *plain]
        matmuls += [case for axes in launches.MATMULS for case in launches.spread(families, axes, held)]
    for arch in archs if name == "every" else ():
        matmuls += launches.every(arch)
        chunks += launches.product(arch, launches.CHUNKS)
        updates += launches.product(arch, launches.UPDATES)
    found = launches.few_splits(launch for case in plain for launch in launches.matmul(case))
    for made, cases in (launches.matmul, matmuls), (launches.chunk, chunks), (launches.update_scales, updates):
        found += [launch for case in cases for launch in made(case)]
    return launches.distinct(found)


SETS = ("budgets", "tiles", "quick", "every")


TOGETHER = 8  # launches that one process compiles and has disassembled together


def _records(wanted):
    """Figures of launches for one chip, and their faults; a launch that does not compile, or cannot be read, is
    one fault."""
    figures, read, failed = {}, {}, {}
    for launch in wanted:
        try:
            compiled = compile_launch(launch)
            figures[launch] = resources(launch, compiled)
        except (RuntimeError, triton.CompilationError, subprocess.CalledProcessError) as error:
            failed[launch] = _fault("does not compile", error)
            continue
        if launch.kernel in ("qmm", "folded") and not launch.arch.startswith("gfx"):  # no rule reads others' code
            read[launch] = compiled.asm
    try:
        codes = disassembled([machine_code(asm["cubin"]) for asm in read.values()], wanted[0].arch)
        for (launch, asm), code in zip(read.items(), codes, strict=True):
            figures[launch] |= measure(launch, code, asm["ptx"])
    except (RuntimeError, subprocess.CalledProcessError) as error:
        failed |= dict.fromkeys(read, _fault("cannot be read, or one beside it", error))
        figures = {launch: found for launch, found in figures.items() if launch not in read}
    made = {
        launch: found | {"faults": faults(launch, found), "form": form_faults(launch, found)}
        for launch, found in figures.items()
    }
    return [(failed | made)[launch] for launch in wanted]


def _fault(what, error):
    return {"form": [], "faults": [f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]}


def records(wanted, jobs):
    """(launch, record) of each, chip by chip, compiled by `jobs` processes."""
    alike: dict[str, list[launches.Launch]] = {}
    for launch in wanted:
        alike.setdefault(launch.arch, []).append(launch)
    parts = [same[at : at + TOGETHER] for same in alike.values() for at in range(0, len(same), TOGETHER)]
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part, found in zip(parts, pool.map(_records, parts), strict=True):
            yield from zip(part, found, strict=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m qzo.bench.codegen.sass",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", action="append", choices=launches.ARCHES, help="default: all; may be repeated")
    parser.add_argument("--set", choices=SETS, default="quick", help="which launches (default: quick)")
    parser.add_argument("--only", default="", help="launches whose printed name contains this text")
    parser.add_argument("--check", action="store_true", help="exit 1 when a rule or a budget is broken")
    parser.add_argument(
        "--sound-only",
        action="store_true",
        help="for another Triton than the budgets were set with: only that kernels compile to tensor "
        "cores with no trap and no spill, neither the form of the code nor its instruction count",
    )
    parser.add_argument("--json", action="store_true", help="one JSON line per launch, then one of broken budgets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiling processes")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one process is needed")
    archs = tuple(options.arch or launches.ARCHES)
    wanted = [launch for launch in launch_set(options.set, archs) if options.only in str(launch)]
    if not wanted:
        parser.error(f"no launch of the set {options.set} has {options.only!r} in its name")
    held, broken = {}, 0
    for launch, record in records(wanted, options.jobs):
        held[launch] = record
        if not options.sound_only:
            record["faults"] += record["form"]
        del record["form"]
        broken += bool(record["faults"])
        print(
            json.dumps({"launch": str(launch)} | record) if options.json else _line(launch, record),
            flush=True,
        )
    over = []
    if not options.sound_only and not options.only and {budget.case.arch for budget in BUDGETS} <= set(archs):
        over = over_budget(lambda launch: held[launch])
    print(
        json.dumps({"over_budget": over})
        if options.json
        else "\n".join(
            [
                *(f"OVER BUDGET {text}" for text in over),
                f"{len(held)} kernels with Triton {triton.__version__}: {broken} broken, {len(over)} over budget",
            ]
        )
    )
    return int(options.check and bool(broken or over))


def _line(launch, record):
    """One launch for a person to read."""
    told = {key: value for key, value in record.items() if key not in ("mix", "faults") and value}
    text = " ".join(f"{key} {value}" for key, value in told.items())
    mix = " ".join(f"{key} {record['mix'][key]}" for key, _ in CLASSES if key in record.get("mix", {}))
    return f"{launch} | {text} | {mix}" + "".join(f"\n    BROKEN {fault}" for fault in record["faults"])


if __name__ == "__main__":
    sys.exit(main())
