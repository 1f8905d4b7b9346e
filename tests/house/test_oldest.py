"""The oldest versions that are promised are those that are tested."""

import re

from tests.support.paths import ROOT

PIN = re.compile(r"^([\w-]+)==([\d.]+)$", re.M)
BOUND = re.compile(r'"([\w-]+)>=([\d.]+)"')


def version(text):
    """As a tuple without zeros at its end: 2.8.0 is 2.8."""
    parts = [int(part) for part in text.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def bounds():
    """{package: lower bound} of what qzo needs to be installed."""
    text = (ROOT / "setup.py").read_text()
    needed = text[text.index("install_requires=[") : text.index("extras_require=")]
    return {name: version(least) for name, least in BOUND.findall(needed)}


def test_the_pins_are_the_lower_bounds():
    pinned = {name: version(exact) for name, exact in PIN.findall((ROOT / ".ci/oldest.txt").read_text())}
    assert pinned == bounds()
    assert {"torch", "triton", "transformers", "safetensors"} <= pinned.keys()


def test_a_job_runs_them_with_the_oldest_python():
    [workflow] = (ROOT / ".github/workflows").iterdir()
    job = workflow.read_text().split("  oldest:\n")[1]
    assert "- run: .ci/oldest" in job
    [python] = re.findall(r'python-version: "([\d.]+)"', job)
    assert f'python_requires=">={python}"' in (ROOT / "setup.py").read_text()
