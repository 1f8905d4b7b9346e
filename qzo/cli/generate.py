"""`qzo generate`: what a model, or a run on it, writes behind a prompt or answers to a message; what a pipeline draws
(pictures.py).

The prompt becomes the tokens that training makes of it (encode.py). Text ends at the end-of-text tokens that the
checkpoint names (generation_config.json, config.json or the GGUF's metadata), at the tokenizer's, which training puts
behind completions, and at what the chat template, if there is one, puts behind an answer.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from ..checkpoints.source import locate
from ..checkpoints.tokenizer import load_tokenizer
from ..loss.head import has_encoder
from ..nn.generating import generating
from ..training.encode import Encoder
from ..training.loop import pad_id
from ..training.task import known_tokens
from . import pictures
from .common import check_until, replayed, say
from .options import model_of


def execute(options: argparse.Namespace) -> int:
    """Generate, and tell; exit status. ValueError for bad input."""
    model_name = model_of(options)
    if not model_name:
        raise ValueError("a model is missing: qzo generate MODEL --prompt TEXT, a folder, a .gguf file or a Hub id")
    if pictures.is_pipeline(model_name):
        return pictures.execute(options, model_name, given_text(options))
    check(options)
    text = given_text(options)
    tokenizer = load_tokenizer(model_name, bool(options.trust_remote_code))
    encoder = Encoder(tokenizer)
    messages = chat(options, text)
    if messages:
        check_template(encoder, model_name)
        text = encoder.asked(messages)
    model, steps = replayed(model_name, options.journal, options.until, vars(options))
    check_model(model)
    ids = encoder.rendered(text) if messages else encoder.source(text) if has_encoder(model) else encoder.prompt(text)
    ends = [tokenizer.eos_token_id, encoder.turn_end()]
    config = generation(model, options, places_left(model, ids), ends, pad_id(tokenizer))
    streamer = None if options.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    written = generate(model, ids, config, streamer)
    seconds = time.perf_counter() - started
    results = {
        "model": model_name,
        "steps": steps,
        "prompt": text,
        "text": tokenizer.decode(written, skip_special_tokens=True),
        "tokens": len(written),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(written) / seconds, 3),
    }
    if options.json:
        print(json.dumps(results))
    say(f"{len(ids)} tokens read, {len(written)} written in {seconds:.1f} s: {len(written) / seconds:.1f} tokens/s")
    return 0


def generate(model: Any, ids: list[int], config: GenerationConfig, streamer: TextStreamer | None = None) -> list[int]:
    """The ids of new tokens, a list, that a GenerationConfig lets the model write behind `ids`, a list."""
    prompt = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.inference_mode(), generating(model):
        [row] = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=streamer
        )
    return row[1 if has_encoder(model) else len(ids) :].tolist()  # a decoder behind an encoder begins with a token


def check(options: argparse.Namespace) -> None:
    """ValueError for options out of their range, or that need another."""
    check_until(options.until, options.journal)
    if vars(options).get("output_dir"):
        raise ValueError(
            f"--output-dir {options.output_dir} is for pictures of a diffusers pipeline; text goes to standard output"
        )
    if options.system is not None and options.chat is None:
        raise ValueError("--system is a message in front of --chat, and there is no --chat")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: expected a number >= 1")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature {options.temperature}: expected a finite number >= 0")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p {options.top_p}: expected a number > 0 and <= 1")
    if options.top_p is not None and not options.temperature:
        raise ValueError(f"--top-p {options.top_p} needs a --temperature above 0: without one nothing is drawn")
    if not -(1 << 63) <= options.seed < 1 << 64:
        raise ValueError(f"--seed {options.seed}: expected an int of 64 bits, from -2**63 to 2**64 - 1")


def given_text(options: argparse.Namespace) -> str:
    """The text of the prompt or message, without the line break that ends standard input. ValueError for none."""
    text = options.prompt if options.chat is None else options.chat
    name = "--prompt" if options.chat is None else "--chat"
    if text in (None, "-"):
        if sys.stdin.isatty():
            say("reading the prompt from this terminal; Ctrl-D on a line of its own ends it")
        text, name = sys.stdin.read().removesuffix("\n"), "standard input"
    if not text.strip():
        raise ValueError(f"the prompt of {name} is empty: give a text to go on from")
    return text


def chat(options: argparse.Namespace, text: str) -> list[dict[str, str]] | None:
    """The messages of --chat; None for --prompt."""
    if options.chat is None:
        return None
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": text}]


def check_template(encoder: Encoder, model_name: str) -> None:
    """ValueError where the checkpoint has no chat template, naming where it would be."""
    if encoder.chats:
        return
    path = locate(model_name)
    where = "no tokenizer.chat_template in its metadata" if path.is_file() else "no chat_template.jinja"
    raise ValueError(
        f"{path} has no chat template ({where}): give the text as the model was trained to read it with --prompt, or "
        f"{'convert the model again with its template' if path.is_file() else 'add the file of the original model'}"
    )


def check_model(model: Any) -> None:
    """ValueError for a model that writes no text, or reads something else."""
    name = type(model).__name__
    if not model.can_generate():
        raise ValueError(f"{name} writes no text: qzo generate needs a model with a language-model head")
    if model.main_input_name != "input_ids":
        raise ValueError(f"{name} reads {model.main_input_name}, not text: give them to model.generate, in Python")


def places_left(model: Any, ids: list[int]) -> float:
    """How many tokens may follow; infinity where the model does not say. ValueError for ids that it has no place or no
    row for: a GPU would end the process."""
    name, known = type(model).__name__, known_tokens(model)
    if max(ids) >= known:
        raise ValueError(f"the prompt has the token {max(ids)}, {name} knows {known}: the tokenizer is another model's")
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    read, left = len(ids), places - (1 if has_encoder(model) else len(ids))
    if read > places or left < 1:
        raise ValueError(f"the prompt has {read} tokens, {name} has {places} places for prompt and text: shorten it")
    return left


def generation(
    model: Any, options: argparse.Namespace, left: float, ends: Iterable[int | None], padding: int
) -> GenerationConfig:
    """The GenerationConfig of these options: the checkpoint's own, but for how tokens are chosen and where text ends.

    left: most tokens that may follow; ends: ids beside the checkpoint's own, or None; padding: any token's id
    """
    config = copy.deepcopy(model.generation_config)
    own = config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), *ends} - {None}
    if options.max_new_tokens > left:
        say(f"at most {left} tokens are written, not {options.max_new_tokens}: the model has no more places")
    drawn = options.temperature > 0
    config.update(
        max_length=None,
        max_new_tokens=min(options.max_new_tokens, left),
        do_sample=drawn,
        temperature=options.temperature if drawn else 1.0,
        top_p=1.0 if options.top_p is None else options.top_p,
        top_k=0 if drawn else 50,  # greedy: the values that transformers does not warn of
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
    )
    return config
