"""Out of memory is one line: asked, free, what lowers it."""

import pytest
import torch

from qzo.system import memory

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 10.31 GiB "
    "is free. Including non-PyTorch memory, this process has 129.49 GiB memory in use."
)


def test_what_a_gpu_says():
    said = memory.explain(torch.OutOfMemoryError(CUDA), "take less")
    assert said == "out of memory: 21.47 GB more were asked for, 11.07 GB free; take less"


def test_what_a_cpu_says():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert memory.is_out_of_memory(caught.value)
    said = memory.explain(caught.value, "take less")
    assert "4503599.63 GB more were asked for" in said
    assert "GB of this machine's memory free; take less" in said


def test_other_errors_are_not_taken_for_it():
    assert not memory.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert memory.is_out_of_memory(MemoryError())
    assert memory.explain(RuntimeError("something\n else"), "x").startswith("out of memory: something else, ")
