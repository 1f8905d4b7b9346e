"""Part "e2e" of gpu_check.py: the whole product on the device, from checkpoint to checkpoint.

Every fixture folder of the tests: logits beside the expected ones, files byte for byte after a step with lr 0, five
steps. A model with the products of many rows through BLAS, one under torch.compile, and transformers' Trainer with and
without CUDA graphs. Then the command line, as a user has it: the same run twice, without graphs, killed with SIGKILL
and resumed: the same journal and model, bit for bit; replayed; exported. What is untrue is a row whose note begins
with "failed".
"""

import concurrent.futures
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import qzo

from ..optim import journal
from .gpu_parts import failures

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ROOT / "tests" / "fixtures"
MODEL = "gptqmodel-gptq-sym-g128"  # what the command line trains
STEPS = 200
LEAST = 10  # seconds without which nothing is begun
# relative error of logits, root mean square, beside the expected ones, which are a float32 model's
ALLOWED = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4}


class Untrue(RuntimeError):
    """Something that must hold does not."""


def must(good, text):
    if not good:
        raise Untrue(text)


def e2e(check):
    """All of it; a row each."""
    folders = sorted(FOLDERS.iterdir()) if FOLDERS.is_dir() else ()
    todo = [
        (f"folder {folder.name}", "folder", folder) for folder in folders if (folder / "expected.safetensors").exists()
    ]
    todo += [
        ("large_rows=blas in a model", "blas", FOLDERS / MODEL),
        ("torch.compile of a model", "compiled", FOLDERS / MODEL),
        ("QZOTrainer with and without graphs", "trainer", FOLDERS / MODEL),
    ]
    with _pool() as pool:
        found = {
            case: pool.submit(in_own_process, kind, folder, check.device, check.left())
            for case, kind, folder in todo
            if check.left() > LEAST
        }
        for case, _, _ in todo:
            attempt(check, case, lambda case=case: found[case].result())
    if check.left() < LEAST:
        check.note("e2e", "the command line", note="no time left")
        return
    with tempfile.TemporaryDirectory() as folder:
        command_line(check, FOLDERS / MODEL, Path(folder))


def _pool():
    """As many at once as there are cores to start Python on."""
    return concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 2))


def attempt(check, case, function, *arguments):
    """A row with what the function says, or with what it breaks with."""
    if check.left() < LEAST:
        check.note("e2e", case, note="no time left")
        return
    try:
        note = function(*arguments)
    except failures() as error:
        note = _failed(error)
    check.note("e2e", case, note=note)


def _failed(error):
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ------------------------------------------------------------------------------------------------ in Python


def source_of(folder):
    """What is loaded: the folder, or the GGUF file in it."""
    return folder / "model.gguf" if (folder / "model.gguf").exists() else folder


def relative_error(got, want):
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm())


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained_and_saved(folder, device):
    """Load, compare, step with lr 0, save, step five times."""
    expected, said = load_file(folder / "expected.safetensors"), []
    ids = expected["input_ids"].to(device)
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32,):
        model = qzo.from_pretrained(str(source_of(folder)), dtype=dtype, device=device)
        error = relative_error(logits(model, ids), expected["logits"])
        must(error < ALLOWED[dtype], f"logits in {dtype} are off by {error:.2e}")
        said.append(f"{error:.1e}")
    batch = {"input_ids": ids, "labels": ids}
    qzo.QZO(model, lr=0.0).step(lambda: qzo.losses(model, batch, 2))
    with tempfile.TemporaryDirectory() as out:
        qzo.save_pretrained(model, out)
        shared = [path for path in Path(out).iterdir() if (folder / path.name).exists()]
        must(shared, "nothing that the folder has was saved")
        for path in shared:
            must(filecmp.cmp(path, folder / path.name, shallow=False), f"lr 0 changed {path.name}")
    optimizer = qzo.QZO(model, lr=1e-2, directions=2)

    def closure():
        return qzo.losses(model, batch, 4)

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    must(losses[-1] < losses[0], f"five steps with lr 1e-2 had the losses {losses}")
    return f"logits off by {', '.join(said)}; lr 0 gives the same files; loss {losses[0]:.3f} -> {losses[-1]:.3f}"


def through_blas(folder, device, tokens=1024):
    """A step whose products have `tokens` rows an evaluation, fused and through BLAS."""
    model = qzo.from_pretrained(str(folder), dtype=torch.float16 if device == "cuda" else torch.float32, device=device)
    ids = load_file(folder / "expected.safetensors")["input_ids"].to(device)
    ids = ids.repeat(-(-tokens // ids.numel()), 1)
    found = {}
    for form in ("fused", "blas"):
        optimizer = qzo.QZO(model, lr=0.0, large_rows=form)
        optimizer.step(lambda: qzo.losses(model, {"input_ids": ids, "labels": ids}, 2))
        if optimizer.last is None:
            raise Untrue("the optimizer keeps nothing of its step")
        found[form] = torch.tensor(optimizer.last.losses)
    error = relative_error(found["blas"], found["fused"])
    must(error < 2e-3, f"losses {found['blas'].tolist()}, fused {found['fused'].tolist()}")
    return f"losses of {ids.numel()} rows differ by {error:.1e}"


def compiled(folder, device, backend="inductor"):
    """Logits under a pair of evaluations, compiled around the operator and not."""
    model = qzo.from_pretrained(str(folder), dtype=torch.float16 if device == "cuda" else torch.float32, device=device)
    ids = load_file(folder / "expected.safetensors")["input_ids"].to(device)
    ids = torch.cat([ids, ids])
    with qzo.evaluating(model, qzo.Evaluations([7, 7], [1e-2, -1e-2])):
        want = logits(model, ids)
        fast = torch.compile(model, backend=backend)
        error = relative_error(logits(fast, ids), want)
    torch._dynamo.reset()
    must(error < ALLOWED[torch.float16], f"compiled logits differ by {error:.2e}")
    return f"logits differ by {error:.1e}"


IN_PYTHON = {"folder": trained_and_saved, "blas": through_blas, "compiled": compiled}


def in_own_process(kind, folder, device, seconds):
    """What one of IN_PYTHON says, or gpu_trainer.py, run by itself: what breaks the device breaks nothing here."""
    asked = ["qzo.bench.gpu_trainer"] if kind == "trainer" else ["qzo.bench.gpu_e2e", kind]
    command = [sys.executable, "-m", *asked, str(folder), device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, seconds))
    must(done.returncode == 0, f"exit status {done.returncode}: {done.stderr.strip()[-250:]}")
    return done.stdout.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------ the command line


def qzo_command(arguments, seconds):
    """(exit status, standard error) of `python -m qzo ...`."""
    done = subprocess.run(
        [sys.executable, "-m", "qzo", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=max(1, seconds)
    )
    return done.returncode, done.stderr


def train_arguments(model, folder, name, device):
    return [
        "train",
        "--model",
        str(model),
        "--data",
        str(folder / "data.jsonl"),
        "--output-dir",
        str(folder / name),
        "--max-steps",
        str(STEPS),
        "--batch-size",
        "4",
        "--directions",
        "2",
        "--device",
        device,
    ]


def command_line(check, model, folder):
    """Runs that do not wait for one another go at once; each is compared with the first."""
    lines = [{"prompt": "line " * (1 + 7 * (i % 5)), "completion": f"answer {i % 3}"} for i in range(48)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, killed = folder / "first", folder / "killed"

    def trained(name, *more):
        return [*train_arguments(model, folder, name, check.device), *more]

    after = ["--device", check.device, "--output-dir"]
    with _pool() as pool:

        def started(arguments):
            return pool.submit(qzo_command, arguments, check.left())

        runs = {
            name: started(trained(name, *more))
            for name, more in (
                ("first", []),
                ("again", []),
                ("eager", ["--no-cuda-graph"]),
                ("blas", ["--large-rows", "blas"]),
            )
        }
        steps = pool.submit(kill_half_way, trained("killed"), killed / "journal.qzo", check.left())
        attempt(check, "train", _trained, runs["first"], first)
        concurrent.futures.wait([steps])
        resumed = started(trained("killed", "--resume"))
        replayed = started(["replay", str(model), str(first / "journal.qzo"), *after, str(folder / "replayed")])
        exported = started(
            [
                "export",
                str(model),
                "--to",
                "compressed-tensors",
                "--journal",
                str(first / "journal.qzo"),
                *after,
                str(folder / "exported"),
            ]
        )
        attempt(check, "train again", _same_run, runs["again"], first, folder / "again")
        attempt(
            check, "train --no-cuda-graph, batches of many shapes", _same_run, runs["eager"], first, folder / "eager"
        )
        attempt(check, "train --large-rows blas", _trained, runs["blas"], folder / "blas")
        attempt(check, "train, killed and resumed", _resumed, steps, resumed, first, killed)
        attempt(check, "replay", _replayed, replayed, first / "model", folder / "replayed")
        attempt(check, "export", _exported, exported, first / "model", folder / "exported", check.device)


def kill_half_way(arguments, path, seconds):
    """SIGKILL for a run once its journal holds a third of the steps; how many it then holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qzo", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ends = time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < ends and _steps_of(path) < STEPS // 3:
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    return _steps_of(path)


def _steps_of(path):
    return len(_read_steps(path)) if path.exists() else 0


def _read_steps(path):
    found = journal.read(path)
    return found[1] if found else []


def _went(ended):
    status, said = ended.result()
    if status == 2 and "unrecognized arguments" in said:
        raise Untrue(f"this qzo does not know an option: {said.strip().splitlines()[-1]}")
    must(status == 0, f"exit status {status}: {said.strip()[-250:]}")
    return said


def _trained(ended, out):
    said = _went(ended)
    warned = [line for line in said.splitlines() if "warning" in line]
    return f"{_steps_of(out / 'journal.qzo')} steps" + (f"; {warned[0][:150]}" if warned else "")


def _same_steps(first, other):
    """The same records and the same model, bit for bit; headers may tell another option."""
    one, two = (_read_steps(out / "journal.qzo") for out in (first, other))
    differ = [step for step, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]]
    must(
        len(one) == len(two) and not differ,
        f"journals of {len(one)} and {len(two)} steps differ from step "
        f"{differ[0] if differ else min(len(one), len(two))} on",
    )
    _same_model(first / "model", other / "model")
    return "same journal, same model"


def _same_model(first, other):
    must(filecmp.cmp(first / "model.safetensors", other / "model.safetensors", shallow=False), "the models differ")


def _same_run(ended, first, other):
    _went(ended)
    return _same_steps(first, other)


def _resumed(steps, ended, first, killed):
    must(0 < steps.result() < STEPS, f"it was not killed half-way: {steps.result()} of {STEPS} steps")
    _went(ended)
    return f"killed after {steps.result()} of {STEPS} steps; {_same_steps(first, killed)}"


def _replayed(ended, model, replayed):
    _went(ended)
    _same_model(model, replayed)
    return "same model"


def _exported(ended, model, exported, device):
    _went(ended)
    dtype = torch.float16 if device == "cuda" else torch.float32
    ids = torch.arange(24, device=device).view(2, 12)
    want, got = (logits(qzo.from_pretrained(str(path), dtype=dtype, device=device), ids) for path in (model, exported))
    error = relative_error(got, want)
    must(error < 1e-3, f"logits differ by {error:.2e}")
    return f"logits differ by {error:.1e}"


if __name__ == "__main__":
    kind, folder, device = sys.argv[1:]
    try:
        print(IN_PYTHON[kind](Path(folder), device))
    except failures() as error:
        print(_failed(error))
