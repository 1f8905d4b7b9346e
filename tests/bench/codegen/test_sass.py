"""The reader of machine code: which loop is the main one, what it counts, and the faults that it names."""

import types
from typing import NamedTuple

import pytest

from qzo.bench.codegen import disassembly, sass
from qzo.kernels.constants import Constants

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
    return [disassembly.Instruction(16 * at, *instruction) for at, instruction in enumerate(LOOP)]


def test_main_loop_is_the_one_with_the_tensor_cores(code):
    assert [i.at // 16 for i in sass.main_loop(code, "HMMA")] == [1, 2, 3, 4, 5, 6, 7]


def test_without_a_loop_the_whole_code_counts(code):
    straight = [i for i in code if not i.jump]
    assert sass.main_loop(straight, "HMMA") == straight


def test_a_jump_back_from_behind_a_loop_is_no_loop():
    names = ["IADD"] * 6 + ["HMMA", "BRA", "EXIT", "BRA"]
    jumps = {8: "0x10", 10: "0x60"}
    code = [disassembly.Instruction(16 * at, name, jumps.get(at, "")) for at, name in enumerate(names, 1)]
    assert [i.at // 16 for i in sass.main_loop(code, "HMMA")] == list(range(1, 9))


def test_skip_is_the_block_under_a_forward_branch(code):
    assert sass._skip(sass.main_loop(code, "HMMA")) == 2


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
    assert sass._stored_bytes([disassembly.Instruction(0, name, "[R1], R2")]) == stored


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


class Launch(NamedTuple):
    """As much of one as decides how it is read."""

    kernel: str
    arch: str


@pytest.mark.parametrize("broken", ["compile_launch", "disassembled"])
def test_what_cannot_be_compiled_or_read_is_a_fault_of_its_launch(monkeypatch, broken):
    launch = Launch("qmm", "sm_80")
    compiled = types.SimpleNamespace(asm={"cubin": b"", "ptx": ""})
    monkeypatch.setattr(sass, "compile_launch", lambda launch: compiled)
    monkeypatch.setattr(sass, "resources", lambda launch, compiled: {})
    monkeypatch.setattr(sass, "machine_code", lambda cubin: cubin)

    def fails(*_):
        raise RuntimeError("no such  tool")

    monkeypatch.setattr(sass, broken, fails)
    [record] = sass._records([launch])
    assert record["form"] == []
    assert [fault.partition(": ")[2] for fault in record["faults"]] == ["RuntimeError: no such tool"]
