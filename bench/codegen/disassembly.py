"""Machine code of compiled kernels in NVIDIA's own words: its tools come with Triton.

The disassembler takes half a second to start, and a few hundredths for a kernel: kernels are read many at a time.
"""

import bisect
import dataclasses
import itertools
import pathlib
import re
import struct
import subprocess
import tempfile

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);")


@dataclasses.dataclass(frozen=True)
class Instruction:
    at: int
    name: str
    operands: str

    @property
    def jump(self):
        """Where a branch leads, or None."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None


def _tool(name, content, *flags):
    """What a tool prints of a file with this content."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin):
    """The line of registers, stack and memory of a compiled file's kernel."""
    return _tool("cuobjdump", cubin, "-res-usage")


def machine_code(cubin):
    """The instructions of a compiled file as bytes: an ELF file's sections .text.*, of which a function has one."""
    [table] = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    texts = sections[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", texts + name)
    )


def disassembled(pieces, arch):
    """The instructions of each piece of machine code for `arch`. Their addresses, to which branches lead, go on from
    one piece to the next."""
    if not pieces:
        return []
    text = _tool("nvdisasm", b"".join(pieces), "--binary", arch.upper().replace("_", ""))
    every = [Instruction(int(at, 16), name, operands) for at, name, operands in INSTRUCTION.findall(text)]
    ends = itertools.accumulate(map(len, pieces))
    cuts = [0, *(bisect.bisect_left(every, end, key=lambda i: i.at) for end in ends)]
    return [every[first:last] for first, last in itertools.pairwise(cuts)]
