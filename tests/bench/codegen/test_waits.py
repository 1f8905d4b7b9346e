"""What waits for what: reads and their uses in a loop, and the argument that assembly reads from."""

import pytest

from qzo.bench.codegen import disassembly, waits


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
    assert waits.read_ahead([disassembly.Instruction(16 * at, *each) for at, each in enumerate(instructions)]) == wanted


def test_the_argument_that_assembly_names_is_told_by_the_compiled_entry():
    """Constants are no parameters, and Triton's own parameters come last."""
    ptx = (
        ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0,\n\t.param .u32 k_param_1,\n"
        "\t.param .u64 .ptr .global .align 1 k_param_2\n)\n.reqntid 128\n{\n ld.param.u64 base, [k_param_%d];\n}"
    )
    signature = (("x_ptr", "*bf16"), ("C", "constexpr"), ("N", "i32"))
    assert [waits.base_argument(ptx % number, signature) for number in range(3)] == ["x_ptr", "N", "k_param_2"]
    assert waits.base_argument(ptx.replace("base", "other"), signature) == ""
