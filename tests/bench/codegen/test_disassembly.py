"""Machine code is found in a compiled file, and many kernels that are read at once are told apart."""

import dataclasses
import subprocess

import pytest
import triton

from qzo.bench.codegen import disassembly

SOURCE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 to, .param .u32 times) {
  .reg .pred %p; .reg .b32 %r<4>; .reg .b64 %rd<2>;
  ld.param.u64 %rd1, [to];
  ld.param.u32 %r1, [times];
  mov.u32 %r2, 0;
LOOP:
  FILL
  st.volatile.global.u32 [%rd1], %r2;
  add.u32 %r2, %r2, 1;
  setp.lt.u32 %p, %r2, %r1;
  @%p bra LOOP;
  ret;
}
"""


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """Two compiled kernels of one loop each, the first's the longer."""
    found = []
    for stores in (9, 1):
        ptx, cubin = (tmp_path_factory.mktemp("code") / name for name in ("a.ptx", "a.cubin"))
        ptx.write_text(SOURCE.replace("FILL", "st.volatile.global.u32 [%rd1], %r1;\n" * stores))
        subprocess.run([triton.knobs.nvidia.ptxas.path, "--gpu-name=sm_80", ptx, "-o", cubin], check=True)
        found.append(cubin.read_bytes())
    return found


def moved(code, by):
    """The instructions as they would be `by` bytes further on."""
    return [
        dataclasses.replace(i, at=i.at + by, operands=i.operands if i.jump is None else hex(i.jump + by)) for i in code
    ]


def test_each_piece_has_its_own_instructions(cubins):
    """cuobjdump, which knows the file's form, reads the same of each."""
    long, short = (disassembly.machine_code(cubin) for cubin in cubins)
    codes = disassembly.disassembled([long, short], "sm_80")
    for cubin, code, start in zip(cubins, codes, (0, len(long)), strict=True):
        text = disassembly._tool("cuobjdump", cubin, "-sass")
        alone = [disassembly.Instruction(int(at, 16), *rest) for at, *rest in disassembly.INSTRUCTION.findall(text)]
        assert moved(code, -start) == moved(alone, 0)
        assert [i.jump for i in code if i.jump is not None and i.jump < i.at]  # its loop


def test_nothing_is_read_of_nothing():
    assert disassembly.disassembled([], "sm_80") == []


def test_what_a_kernel_takes(cubins):
    assert "STACK:0 SHARED:0 LOCAL:0" in disassembly.usage(cubins[0])
