"""`qzo eval`: loss and accuracy of a model, or of a run on it, on each split of the data."""

import argparse
import json
from pathlib import Path

from ..checkpoints.tokenizer import load_tokenizer
from ..training.loop import build_task
from ..training.records import read_data
from ..training.settings import Settings
from .common import load, replayed, say, scores_as_text
from .options import model_of


def execute(options: argparse.Namespace) -> int:
    """Evaluate, and show; exit status. ValueError for bad input."""
    model_name = model_of(options)
    if not model_name:
        raise ValueError("a model is missing: qzo eval MODEL --data FILE, a folder, a .gguf file or a Hub id")
    own = vars(options)
    settings = Settings(**({} if options.max_length is None else {"max_length": options.max_length}))
    records = read_data(options.data)
    if Path(options.data).is_file():
        records = {Path(options.data).stem: records["train"]}
    say(f"loading {model_name}")
    if options.journal:
        model, steps = replayed(model_name, options.journal, None, own)
    else:
        model, steps = load(model_name, own), 0
    tokenizer = load_tokenizer(model_name, bool(options.trust_remote_code))
    scores = {}
    for split, lines in records.items():
        task = build_task(model, lines, tokenizer, settings, None)
        say(f"{split}: {len(task.examples)} examples")
        scores[split] = task.evaluate()
    if options.json:
        print(json.dumps({"model": model_name, "steps": steps, "splits": scores, "device": str(task.device)}))
    else:
        print(scores_as_text(list(scores.items())))
    return 0
