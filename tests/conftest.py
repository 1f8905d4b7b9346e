"""Kernels run in Triton's interpreter, one thread, unwritten memory holds NaN, GPU tests are counted aloud.

Triton decides when `@triton.jit` runs whether a kernel is interpreted or compiled, so one process has one of
the two. Here it is the interpreter, unless `pytest -m gpu` asks for the GPU tests; tests that compile start a
clean process.
"""

import os

import pytest
import torch

skipped_gpu_tests: list[str] = []


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device; run with -m gpu")
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    if "TRITON_INTERPRET" in os.environ or not torch.cuda.is_available():
        skipped_gpu_tests.append(item.nodeid)
        pytest.skip("needs a GPU and `pytest -m gpu`")


def pytest_terminal_summary(terminalreporter):
    if skipped_gpu_tests:
        terminalreporter.write_line(
            f"{len(skipped_gpu_tests)} GPU tests did NOT run: they need a GPU and `pytest -m gpu`", yellow=True
        )


@pytest.fixture(autouse=True)
def _seeded():
    """Random data without a generator of its own is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def nan_poison():
    """torch.empty gives NaN (the largest integer for integers), so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # torch has it by a hook
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """How many weights each launch is for."""
    from qzo.kernels import plan  # not before pytest_configure has said how kernels run

    found, run = [], plan.Plan.__call__
    monkeypatch.setattr(
        plan.Plan,
        "__call__",
        lambda self, x, seeds, coefs, *y: (found.append(len(y)), run(self, x, seeds, coefs, *y))[1],
    )
    return found
