"""Packaging. `kernels/` and `bench/` lie at the top level without __init__.py and are imported as qzo.kernels and
qzo.bench only: Hugging Face has a package called `kernels`, which a regular package of ours would shadow."""

from pathlib import Path

from setuptools import setup

setup(
    name="qzo",
    version=next(
        line.split('"')[1] for line in Path("qzo/version.py").read_text().splitlines() if line.startswith("__version__")
    ),
    description="Fine-tune 4-bit neural networks with forward passes only: fused Triton kernels for quantized "
    "zeroth-order optimization",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # explicit: three of them have no __init__.py
    packages=[
        "qzo",
        "qzo.system",
        "qzo.nn",
        "qzo.nn.streaming",
        "qzo.loss",
        "qzo.optim",
        "qzo.checkpoints",
        "qzo.checkpoints.formats",
        "qzo.training",
        "qzo.diffusion",
        "qzo.trainer",
        "qzo.reports",
        "qzo.cli",
        "qzo.kernels",
        "qzo.bench",
        "qzo.bench.codegen",
        "qzo.bench.fuzz",
        "qzo.bench.study",
    ],
    package_dir={"qzo": "qzo", "qzo.kernels": "kernels", "qzo.bench": "bench"},
    package_data={"qzo.reports": ["configs/*.json"], "qzo": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4",
        "transformers>=5.17",
        "safetensors>=0.8",
        "gguf>=0.17",
        "numpy",
        "tqdm",
        "pyyaml",
        "regex",
        "matplotlib",
        "jinja2",
        "psutil",
        "argcomplete",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "setuptools>=77",
            "diffusers",
            "compressed-tensors",
            "accelerate",
            "pyarrow",
            "scikit-learn",
            "trl",
        ],
        "data": ["pyarrow"],
        "trainer": ["accelerate>=1.1"],
        "trl": ["accelerate>=1.1", "trl>=1.16"],
        "diffusion": ["diffusers>=0.42"],
        "dev": ["ruff", "mypy", "types-PyYAML", "types-psutil", "pre-commit"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
    entry_points={"console_scripts": ["qzo = qzo.cli.main:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
