"""The kernels' machine code for every supported chip, made and read without a GPU.

The compiler has a process of its own: under Triton's interpreter, where other tests live, nothing compiles.
"""

import json
import os
import subprocess
import sys

import pytest

from qzo.bench.codegen import budgets, sass, waits
from qzo.kernels import tiles
from qzo.kernels.constants import Constants
from tests.support.paths import ROOT

ARCHES = tuple(tiles.PROCESSORS)


@pytest.fixture(scope="session")
def compiled():
    """(records by printed launch, broken budgets) of the quick set; about three minutes on two cores."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "qzo.bench.codegen.sass", "--set", "quick", "--json"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *records, last = [json.loads(line) for line in done.stdout.splitlines()]
    return {record["launch"]: record for record in records}, last["over_budget"]


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_is_sound(compiled, arch):
    """No spill, no trap, shared memory that fits, tensor cores fed from registers."""
    records = {launch: record for launch, record in compiled[0].items() if launch.startswith(arch + " ")}
    assert records, f"nothing was compiled for {arch}"
    assert {launch: record["faults"] for launch, record in records.items() if record["faults"]} == {}


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_is_compiled(compiled, arch):
    """All kernels, and a tile for each bucket of rows of tiles.pick."""
    names = [launch.split()[1:3] for launch in compiled[0] if launch.startswith(arch + " ")]
    # float zero points, which the group sums are for, come with the pairs of flags
    paired = {"group_sums"} if arch in sass.PAIRED else set()
    every = {"qmm", "folded", "dequantize", "update", "update_rows", "perturb"}
    assert {kernel for kernel, _ in names} == every | paired
    wanted = {
        tiles.pick(tiles.Problem(rows, 4096, 4096, 128, sass.launches.torch.bfloat16, arch))
        for rows in (1, 16, 32, 64, 128, 512, 8192)
    }
    assert {f"{tile.rows}x{tile.outputs}" for tile in wanted} <= {tile for kernel, tile in names if kernel == "qmm"}


def test_instruction_budgets(compiled):
    assert compiled[1] == []


# -------------------------------------------------------------------------------- the reader itself

LOOP = [  # a loop of seven with two tensor-core instructions, then one of two with none
    ("LDG.E", "R1, [R2]"),
    ("ISETP", "P0"),
    ("BRA", "0x50"),
    ("IMAD", "R3"),
    ("LOP3.LUT", "R4"),
    ("HMMA.16816", "R5"),
    ("HMMA.16816", "R6"),
    ("BRA", "0x10"),
    ("FADD", "R7"),
    ("BRA", "0x80"),
    ("EXIT", ""),
]


@pytest.fixture
def code():
    return [sass.Instruction(16 * at, *instruction) for at, instruction in enumerate(LOOP)]


def test_main_loop_is_the_one_with_the_tensor_cores(code):
    assert [i.at // 16 for i in sass.main_loop(code, "HMMA")] == [1, 2, 3, 4, 5, 6, 7]


def test_without_a_loop_the_whole_code_counts(code):
    straight = [i for i in code if not i.jump]
    assert sass.main_loop(straight, "HMMA") == straight


def test_a_jump_back_from_behind_a_loop_is_no_loop():
    names = ["IADD"] * 6 + ["HMMA", "BRA", "EXIT", "BRA"]
    jumps = {8: "0x10", 10: "0x60"}
    code = [sass.Instruction(16 * at, name, jumps.get(at, "")) for at, name in enumerate(names, 1)]
    assert [i.at // 16 for i in sass.main_loop(code, "HMMA")] == list(range(1, 9))


def test_skip_is_the_block_under_a_forward_branch(code):
    assert sass._skip(sass.main_loop(code, "HMMA")) == 2


@pytest.mark.parametrize(
    ("instructions", "wanted"),
    [
        ([("LDG.E", "R4, desc[UR4][R2.64]"), ("FADD", "R2, R2, R3"), ("FMUL", "R5, R4, R2")], 2),
        ([("LDG.E", "R4, desc[UR4][R2.64]"), ("FADD", "R2, R2, UR4"), ("STG.E", "[R4], R2")], 2),
        ([("FMUL", "R5, R4, R2"), ("IADD3", "R2, R2, 0x4"), ("LDG.E.64", "R3, desc[UR4][R2.64]")], 1),  # R4 of R3, R4
        ([("LDG.E", "R4, desc[UR4][R2.64]"), ("IMAD.MOV", "R4, RZ, RZ, R2"), ("FMUL", "R5, R4, R2")], None),
        ([("LDGSTS.E.128", "[R4], desc[UR4][R2.64]"), ("FMUL", "R5, R4, R2"), ("LDGDEPBAR", "")], None),
    ],
)
def test_instructions_from_a_read_to_its_use(instructions, wanted):
    """A value that is used in the loop's next round, and one that another takes the place of."""
    assert waits.read_ahead([sass.Instruction(16 * at, *each) for at, each in enumerate(instructions)]) == wanted


def test_the_argument_that_assembly_names_is_told_by_the_compiled_entry():
    """Constants are no parameters, and Triton's own parameters come last."""
    ptx = (
        ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0,\n\t.param .u32 k_param_1,\n"
        "\t.param .u64 .ptr .global .align 1 k_param_2\n)\n.reqntid 128\n{\n ld.param.u64 base, [k_param_%d];\n}"
    )
    signature = (("x_ptr", "*bf16"), ("C", "constexpr"), ("N", "i32"))
    assert [waits.base_argument(ptx % number, signature) for number in range(3)] == ["x_ptr", "N", "k_param_2"]
    assert waits.base_argument(ptx.replace("base", "other"), signature) == ""


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("STS", 4),
        ("STS.U16", 2),
        ("STS.U8", 1),
        ("STS.64", 8),
        ("STS.128", 16),
        ("STSM.16.M88.4", 16),
        ("LDS.128", 0),
    ],
)
def test_stored_bytes(name, stored):
    assert sass._stored_bytes([sass.Instruction(0, name, "[R1], R2")]) == stored


def launch(arch="sm_90", warps=8, kernel="qmm", **different):
    held = ((1, Constants(BM=128, BN=128)._replace(**different)),)
    signature = (("x_ptr", "*bf16"), ("C", "constexpr"))
    return sass.launches.Launch(kernel, arch, signature, held, (), warps=warps, stages=3, registers=None)


SOUND = {
    "spill": 0,
    "local": 0,
    "shared": 1 << 16,
    "tensor": 8,
    "trap": 0,
    "stored_bytes": 16,
    "wgmma": 8,
    "wgmma_registers": 8,
    "waits": 2,
    "idle": 1,
    "words": 3,
    "base": "entries_ptr",
    "copies_16": 3,  # three words of 128 outputs and 16 vectors, by 256 threads
}


def test_a_sound_kernel_has_no_faults():
    for sound in (launch(), launch(BOOKS=5, PASSES=3)):
        assert sass.faults(sound, SOUND) + sass.form_faults(sound, SOUND) == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"spill": 104}, "spills: 104 bytes"),
        ({"spill": 8, "local": 1}, "spills: 8 bytes"),
        ({"local": 2}, "2 accesses in the main loop"),
        ({"shared": 232449}, "232449 > 232448 bytes of sm_90"),
        ({"tensor": 0}, "no tensor-core instruction"),
        ({"trap": 1}, "1 traps"),
        ({"wgmma_registers": 6}, "2 of 8 wgmma"),
        ({"stored_bytes": 128}, "the weights are 128"),
    ],
)
def test_each_fault_is_named(wrong, text):
    (fault,) = sass.faults(launch(), SOUND | wrong) + sass.form_faults(launch(), SOUND | wrong)
    assert text in fault


def test_a_measured_tile_may_spill_what_was_measured():
    held = SOUND | {"spill": 256, "local": 43}
    assert sass.faults(launch(warps=4), held) == []
    assert sass.faults(launch(warps=4), held | {"spill": 264}) == [
        "spills: 264 bytes of stack, 43 accesses in the main loop"
    ]


@pytest.mark.parametrize(
    "other", [{"arch": "sm_80"}, {"BM": 64}, {"BITS": 2}, {"ZERO": 1}, {"TEXTS": ("sel",)}], ids=str
)
def test_what_was_not_measured_may_not_spill(other):
    assert sass.spill_allowed(launch(**{"warps": 4} | other)) == 0


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"copies_16": 6}, "6 copies of 16 bytes a thread, not those that read 6144 words once"),
        ({"words": 2}, "codebooks of 2 of 3 words are looked up"),
        ({"base": "scales_ptr"}, "assembly takes its codebooks from scales_ptr, they are entries_ptr"),
    ],
)
def test_each_fault_of_vectors_is_named(wrong, text):
    assert sass.form_faults(launch(BOOKS=5, PASSES=3), SOUND | wrong) == [text]


@pytest.mark.parametrize(("early", "text"), [(0, None), (2, "2 reads before"), (-1, "never")])
def test_a_launch_that_overlaps_waits_before_it_reads(early, text):
    wanted = [] if text is None else [f"the launch ahead is waited for: {text}"]
    assert sass.form_faults(launch(PDL=1), SOUND | {"early": early}) == wanted
    assert sass.form_faults(launch(PDL=0), SOUND | {"early": -1}) == []


def test_reads_before_the_wait_are_counted():
    read, ask = "ld.global.b32 %r1, [%rd1];\n", "ld.param.b64 %rd1, [p];\nprefetch.global.L2 [%rd1];\n"
    assert sass.early(ask + read) == -1
    assert sass.early(ask + "griddepcontrol.wait;\n" + read) == 0
    assert sass.early(ask + read + "@%p1 cp.async.cg.shared.global [a], [b];\ngriddepcontrol.wait;\n" + read) == 2


def test_a_folded_kernel_that_waits_for_every_product_is_named():
    folded = launch(kernel="folded")
    assert sass.faults(folded, SOUND) == []
    assert sass.form_faults(folded, SOUND) == ["1 of 2 waits leave the tensor cores nothing to do"]
    assert sass.form_faults(folded, SOUND | {"idle": 0, "stored_bytes": 64}) == []
    (fault,) = sass.form_faults(folded, SOUND | {"idle": 0, "stored_bytes": 65})
    assert "the weights are 128" in fault
    (fault,) = sass.faults(folded, SOUND | {"tensor": 0})
    assert "no tensor-core instruction" in fault


def test_a_bare_trap_is_a_fault_where_traps_are_usual():
    (fault,) = sass.faults(launch("sm_100"), SOUND | {"tensor": 0, "trap": 2})
    assert fault == "no tensor-core instruction in the main loop, 2 traps"


def steps_under(monkeypatch, steps, registers=168, read_ahead=120, fewer=0):
    """over_budget, with `steps` instructions for each (two accumulators or ratio, law), 150 for picked tiles; fewer:
    registers that several weights take less than one."""
    monkeypatch.setattr(budgets.launches, "matmul", lambda case: [case])

    def figures(case):
        several = (case.members,) if case.members > 1 else ()
        form = (case.rows, case.codes, *several) if case.tile is None else "ratio" if case.tile.ratio else "two"
        held = registers - fewer * (case.members > 1)
        return {"step": steps.get((form, case.law), 150), "registers": held, "read_ahead": read_ahead}

    return budgets.over_budget(figures)


KEPT = {
    ("two", "none"): 330,
    ("two", "rademacher"): 330,
    ("two", "ih4"): 330,
    ("ratio", "none"): 350,
    ("ratio", "rademacher"): 350,
    ("ratio", "ih4"): 350,
}


def test_a_table_too_dear(monkeypatch):
    assert steps_under(monkeypatch, KEPT | {((8, "nf4"), "rademacher"): 270}) == []
    over = steps_under(monkeypatch, KEPT | {((8, "nf4"), "rademacher"): 271})
    assert over == [
        f"{arch} 8 rows nf4: 271 instructions a step, 1.8 times the 150 of int4 at the most"
        for arch in ("sm_80", "sm_90")
    ]


def test_vectors_too_dear(monkeypatch):
    said = "sm_90 16 rows aqlm-2x8 one scale: {} instructions a step, 1.6 times the 150 of int4 at the most"
    for steps in (240, 241):
        over = steps_under(monkeypatch, KEPT | {((16, "aqlm-2x8"), "rademacher"): steps})
        assert (said.format(steps) in over) == (steps > 240)


def test_several_weights_in_a_launch_too_dear(monkeypatch):
    assert steps_under(monkeypatch, KEPT | {((128, "int4", 3), "rademacher"): 153}) == []
    over = steps_under(monkeypatch, KEPT | {((128, "int4", 3), "rademacher"): 154})
    assert over == ["sm_90 128 rows, 3 members: 154 instructions a step, 1.02 times the 150 of one at the most"]
    assert steps_under(monkeypatch, KEPT | {((128, "int4", 3), "rademacher"): 154}, fewer=1) == []


def test_budgets_that_are_kept(monkeypatch):
    assert steps_under(monkeypatch, KEPT) == []


def test_a_step_too_long(monkeypatch):
    over = steps_under(monkeypatch, KEPT | {("ratio", "none"): 351, ((128, "int4"), "rademacher"): 286})
    assert over == [
        "sm_90 ratio none: 351 instructions a step, at most 350 wanted",
        "sm_90 128 rows: 286 instructions a step, at most 285 wanted",
    ]


def test_too_many_registers_for_three_programs(monkeypatch):
    named = [f"sm_90 {rows}{members}" for rows in ("8 rows", "16 rows") for members in ("", ", 3 members")]
    over = steps_under(monkeypatch, KEPT, registers=169)
    assert sorted(over) == sorted(f"{name}: 169 registers a thread, at most 168 wanted" for name in named)


def test_a_scale_used_as_soon_as_it_is_read(monkeypatch):
    over = steps_under(monkeypatch, KEPT, read_ahead=119)
    assert "sm_80 16 rows: what is read is used 119 instructions later, at least 120 wanted" in over
    assert len(over) == sum(budget.ahead == 120 for budget in budgets.BUDGETS) > 30
    assert steps_under(monkeypatch, KEPT, read_ahead=None) == []


@pytest.mark.parametrize(
    ("form", "name", "arches"),
    [("two", "two accumulators", ("sm_90", "sm_80")), ("ratio", "ratio", ("sm_90",))],
)
def test_noise_too_dear(monkeypatch, form, name, arches):
    noisy = KEPT[form, "rademacher"]
    assert steps_under(monkeypatch, KEPT | {(form, "none"): noisy - 26}) == []
    over = steps_under(monkeypatch, KEPT | {(form, "none"): noisy - 27})
    assert over == [
        f"{arch} {name} rademacher: the noise adds 27 instructions a step, at most 26 wanted" for arch in arches
    ]
