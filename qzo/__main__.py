"""The command line: `qzo COMMAND`, or `python -m qzo COMMAND`.

Exit status 0; 2 for wrong usage or bad input, with one line that says what to do; 1 for a run that failed or was
stopped. Progress goes to standard error, results to standard output.
"""
import argparse
import dataclasses
import itertools
import json
import sys
import time
import warnings
from pathlib import Path

from . import __version__, disk, train
from .data import read_data
from .kernels.noise import SHARINGS, VERSIONS
from .oom import explain, is_out_of_memory
from .ops import LARGE_ROWS
from .packing import PACKINGS
from .train import LEARNING_RATE_PER_DIRECTION, PAPER, Settings

BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
LESS_MEMORY = ("--sequential holds one evaluation's activations at a time, a smaller --batch-size, --directions, "
               "--max-length or --seq-len less of them; qzo memory tells what is needed")
CHOICES = {"noise": tuple(VERSIONS), "sharing": SHARINGS, "large_rows": LARGE_ROWS, "packing": PACKINGS,
           "recipe": ("paper",), "dtype": ("float32", "float16", "bfloat16")}
CUDA_GRAPH = dict(action=argparse.BooleanOptionalAction, help="run the steps of each shape of batch as one CUDA graph: "
                  "the same bits, sooner (default: where the model is on a CUDA device)")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments=None):
    """Run one command; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"qzo: warning: {message}", file=sys.stderr)
    try:
        return options.run(options) or 0
    except train.Interrupted as stop:
        print(f"qzo: stopped after {stop.steps} steps, all of them saved; go on with the same command, its "
              "--output-dir and --resume", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qzo: stopped outside the training steps; a journal that was begun is whole, so the same command with "
              "--resume goes on", file=sys.stderr)
        return 1
    except BAD_INPUT as error:
        print(f"qzo {options.command}: {_line(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        out = vars(options).get("output_dir")
        text = disk.explain(error, options.command, out) if disk.full(error) else _line(error)
        print(f"qzo {options.command}: {text}", file=sys.stderr)
        return 2 if disk.unusable(error) else 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"qzo {options.command}: {explain(error, LESS_MEMORY)}", file=sys.stderr)
        return 1


def _line(error):
    return disk.unusable(error) or " ".join(str(error).split())


def build_parser():
    parser = _Parser(
        prog="qzo", epilog="example: qzo demo",
        description="Fine-tune 4-bit models with forward passes only, by perturbing their quantization scales.")
    parser.add_argument("--version", action="version", version=f"qzo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", run_demo, "tune SmolLM2-135M on BBC headlines, on a CPU in about two minutes",
                    "qzo demo --seed 1 --output-dir out")
    demo.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    demo.add_argument("--output-dir", help="where journal, metrics, curve and model go "
                      "(default: a new folder qzo-demo, qzo-demo-2, ...)")
    demo.add_argument("--resume", action="store_true", help="continue the demo in --output-dir")
    demo.add_argument("--cuda-graph", **CUDA_GRAPH)

    training = _command(commands, "train", run_train, "fine-tune a model on JSON lines",
                        "qzo train --model model.gguf --data data/ --output-dir out --max-steps 500 --train-layers 6")
    _add_train_options(training)

    replay = _command(commands, "replay", run_replay, "rebuild a tuned model from its base and a journal",
                      "qzo replay model.gguf out/journal.qzo --output-dir tuned")
    replay.add_argument("base", help="the checkpoint the run started from")
    replay.add_argument("journal", help="journal.qzo of the run")
    replay.add_argument("--output-dir", required=True, help="where the tuned checkpoint goes")
    replay.add_argument("--until", type=int, help="stop before this step (default: all)")
    _add_model_options(replay)

    export = _command(commands, "export", run_export, "write a quantized model in another format, weight for weight",
                      "qzo export model-awq --to gptq --output-dir model-gptq --journal out/journal.qzo")
    export.add_argument("model", help="a checkpoint: a folder, a .gguf file, or a hub id")
    export.add_argument("--to", required=True, metavar="FORMAT", help="awq, bitsandbytes, compressed-tensors, gptq, or "
                        "(from a GGUF file) gguf; refused with the reason where it cannot hold the model exactly")
    export.add_argument("--output-dir", required=True, help="where the new checkpoint goes")
    export.add_argument("--journal", help="the journal.qzo of a run on this model, which is replayed first")
    _add_model_options(export)

    bench = commands.add_parser("bench", help="time qzo beside its rivals", description="Time qzo beside its rivals.",
                                epilog="example: qzo bench run --filter 4096x11008 --rows 1 16 --out results.jsonl")
    bench.set_defaults(run=run_bench)
    _bench_command().add_commands(bench)

    memory = _command(commands, "memory", run_memory, "what a fine-tune holds in memory, foretold or measured",
                      "qzo memory --config llama-2-13b --batch-size 16 --seq-len 512")
    _memory_command().add_options(memory)

    inspect = _command(commands, "inspect", run_inspect, "what a checkpoint holds and what would train, without "
                       "loading it", "qzo inspect model.gguf --train-layers 6 --signal --eps 1e-3")
    _inspect_command().add_options(inspect)

    quantize = _command(commands, "quantize", run_quantize, "quantize a float checkpoint, a layer at a time, without "
                        "data", "qzo quantize llama-3.2-1b --output-dir llama-w4 --bits 4 --group-size 64")
    _quantize_command().add_options(quantize)
    return parser


def _bench_command():
    from .bench import __main__ as command
    return command


def run_bench(options):
    return _bench_command().execute(options)


def _memory_command():
    from .bench import memory
    return memory


def run_memory(options):
    return _memory_command().execute(options)


def _inspect_command():
    from . import inspect
    return inspect


def run_inspect(options):
    return _inspect_command().execute(options)


def _quantize_command():
    from . import quantize_folder
    return quantize_folder


def run_quantize(options):
    return _quantize_command().execute(options)


def _command(commands, name, run, text, example):
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                  epilog=f"example: {example}")
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="results as JSON on standard output")
    return command


def _add_train_options(parser):
    files = parser.add_argument_group("files")
    files.add_argument("--model", help="a checkpoint: a folder, a .gguf file, or a hub id that is in the local cache")
    files.add_argument("--data", help="a JSONL file, or a folder with train.jsonl and perhaps valid.jsonl, test.jsonl; "
                       "lines are prompt+completion, messages, text, or prompt+options+label")
    files.add_argument("--output-dir", help="where journal, metrics, curve and model go")
    files.add_argument("--config", help="a YAML file with any of these options; options on the command line win")
    files.add_argument("--resume", action="store_true", default=None,
                       help="continue the journal in --output-dir: the result has the bits of an unbroken run")
    run = parser.add_argument_group("the run")
    run.add_argument("--max-steps", type=int, help=f"steps (default {Settings.max_steps})")
    run.add_argument("--batch-size", type=int, help=f"examples a step (default {Settings.batch_size})")
    run.add_argument("--learning-rate", type=float, help="at the first step, falling linearly to a tenth "
                     f"(default {LEARNING_RATE_PER_DIRECTION:g} per direction)")
    run.add_argument("--eps", type=float, help=f"perturbation, relative to a scale (default {Settings.eps:g})")
    run.add_argument("--clip", type=float, help=f"bound on the directional derivative (default {Settings.clip:g})")
    run.add_argument("--directions", type=int,
                     help=f"directions a step, two evaluations each (default {Settings.directions})")
    run.add_argument("--noise", choices=CHOICES["noise"], help="noise law (default rademacher)")
    run.add_argument("--sharing", choices=SHARINGS,
                     help="one z per scale (group, the default) or one per output row (row)")
    run.add_argument("--large-rows", choices=LARGE_ROWS, help="on a GPU, from 128 tokens per evaluation on: exact "
                     "(fused), or perturbed weights rounded to 16 bits, in registers (folded) or in chunks for a "
                     "library's matmul (blas); auto, the default: rounded if under 2 %% of the signal is lost by it")
    run.add_argument("--sequential", action="store_true", default=None, help="run the evaluations of a step one after "
                     "another instead of stacked: activations of one, not of all 2 x directions")
    run.add_argument("--cuda-graph", **CUDA_GRAPH)
    run.add_argument("--compile", action="store_true", default=None, help="what lies between the quantized layers goes "
                     "through torch.compile: other roundings, and the first step of each shape waits (default: off)")
    run.add_argument("--packing", choices=PACKINGS, help="auto: a batch of unequal lengths is one row without "
                     "padding where that costs less and the model computes the same (default off)")
    run.add_argument("--seed", type=int, help="seed of noise and data order (default 0)")
    run.add_argument("--train-layers", type=int, metavar="K", help="train the top K blocks only; the blocks below run "
                     "once per example and their output is kept (default: the whole model trains)")
    run.add_argument("--train-codebooks", action="store_true", default=None,
                     help="train the codebooks of AQLM layers too (default: the scales alone)")
    run.add_argument("--recipe", choices=CHOICES["recipe"], help="the paper's setting: absolute eps 1e-3, clip 100, "
                     "lr 1e-7, Gaussian noise, one direction, batch 16, floor 0; single options still win")
    run.add_argument("--max-length", type=int, help=f"longest example in tokens (default {Settings.max_length})")
    _add_model_options(parser)


def _add_model_options(parser):
    model = parser.add_argument_group("the model")
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    model.add_argument("--dtype", choices=CHOICES["dtype"],
                       help="of activations (default: float32 on a CPU, float16 on a GPU)")
    model.add_argument("--group-size", type=int,
                       help="when a float checkpoint is quantized on the way in (default 128)")
    model.add_argument("--trust-remote-code", action="store_true", default=None,
                       help="run code from the checkpoint's folder")


# ---------------------------------------------------------------------------------------------- train

OWN_OPTIONS = ("model", "data", "output_dir", "resume", "recipe", "device", "dtype", "group_size", "trust_remote_code")


def merge_options(options):
    """Command line over YAML over recipe; returns (Settings, the other options). ValueError for an unknown key."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    from_file = {}
    if options.config:
        import yaml
        with open(options.config, encoding="utf-8") as file:
            try:
                from_file = yaml.safe_load(file) or {}
            except yaml.YAMLError as error:
                raise ValueError(f"{options.config} is not YAML: {error}") from None
        if not isinstance(from_file, dict):
            raise ValueError(f"{options.config} must hold keys and values, got {type(from_file).__name__}")
        from_file = {str(key).replace("-", "_"): value for key, value in from_file.items()}
    names = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(map(str, set(from_file) - names - set(OWN_OPTIONS)))
    if unknown:
        raise ValueError(f"{options.config}: unknown keys {', '.join(unknown)}; known are "
                         f"{', '.join(sorted(names | set(OWN_OPTIONS)))}")
    merged = {**from_file, **given}
    missing = [f"--{name.replace('_', '-')}" for name in ("model", "data", "output_dir") if not merged.get(name)]
    if missing:
        raise ValueError(f"missing {', '.join(missing)} (on the command line or in --config)")
    for key, wanted in CHOICES.items():
        if merged.get(key) not in (None, *wanted):
            raise ValueError(f"{key}: {merged[key]!r} in {options.config}; known are {', '.join(wanted)}")
    base = PAPER if merged.get("recipe") == "paper" else {}
    settings = Settings(**{**base, **{key: value for key, value in merged.items() if key in names}})
    return settings, {key: merged.get(key) for key in OWN_OPTIONS}


def run_train(options):
    from .hf import load_tokenizer
    settings, own = merge_options(options)
    options.output_dir = own["output_dir"]
    records = read_data(own["data"])
    started = time.perf_counter()
    model, tokenizer = load(own["model"], own), load_tokenizer(own["model"], bool(own["trust_remote_code"]))
    prefix = train.choose_layers(model, settings.train_layers, settings.train_codebooks)
    task = train.build_task(model, records["train"], tokenizer, settings, prefix)
    held_out = {split: train.build_task(model, records[split], tokenizer, settings, prefix)
                for split in ("valid", "test") if split in records}
    _say(f"{train.trained_text(model)} train; {len(task.examples)} examples, {settings.max_steps} steps of "
         f"{settings.batch_size} rows under {2 * settings.directions} evaluations")
    before = {split: held.evaluate() for split, held in held_out.items()}
    already = train.fit(task, settings, own["output_dir"], resume=bool(own["resume"]))
    after = {split: held.evaluate() for split, held in held_out.items()}
    model_dir = save(model, own["output_dir"])
    split = "valid" if "valid" in after else "test"
    results = {"before": before.get(split), "tuned": after.get(split), "splits": {
        name: {"before": before[name], "tuned": after[name]} for name in after}, "steps": settings.max_steps,
        "resumed_from": already, "seconds": round(time.perf_counter() - started, 1), "seed": settings.seed,
        "device": str(task.device), "model": str(model_dir), "source": own["model"]}
    train.write_results(own["output_dir"], settings, results)
    if options.json:
        print(json.dumps(results))
    else:
        rows = [(f"{name}, {when}", scores)
                for name, both in results["splits"].items() for when, scores in both.items()]
        if rows:
            print(table(rows))
        print(f"tuned model: {model_dir}")
    return 0


def load(path, own):
    """The model at `path`, as the options of "the model" say."""
    import torch

    from .hf import from_pretrained
    try:
        torch.empty(0, device=own["device"])
    except (RuntimeError, AssertionError) as error:      # torch raises either for a device it was not built for
        raise ValueError(f"--device {own['device']} cannot be used: {str(error).splitlines()[0]}") from None
    chosen = {"device": own["device"], "group_size": own["group_size"],
              "dtype": getattr(torch, own["dtype"]) if own["dtype"] else None,
              "trust_remote_code": bool(own["trust_remote_code"])}
    return from_pretrained(path, **{key: value for key, value in chosen.items() if value is not None})


def save(model, out):
    """Write the tuned checkpoint to OUT/model and return that path."""
    from .save import save_pretrained
    target = Path(out) / "model"
    save_pretrained(model, target)
    return target


# ---------------------------------------------------------------------------------------------- demo, replay

def run_demo(options):
    from .demo import run
    if options.resume and not options.output_dir:
        raise ValueError("--resume needs the --output-dir of the demo that was stopped")
    out = options.output_dir = options.output_dir or _new_folder("qzo-demo")
    results = run(options.seed, out, resume=options.resume, say=_say, cuda_graph=options.cuda_graph)
    if options.json:
        print(json.dumps(results))
        return 0
    print(table([("zero-shot", results["zero_shot"]), ("control: label biases only", results["control"]),
                 ("tuned", results["tuned"])]))
    print(f"300 held-out headlines, {results['steps']} steps, seed {results['seed']}, {results['seconds']:.0f} s on "
          f"{results['device']}; everything is in {out}")
    return 0


def _new_folder(name):
    """`name`, or the first of name-2, name-3, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in names if not Path(path).exists())


def run_replay(options):
    from .save import save_pretrained
    if options.until is not None and options.until < 0:
        raise ValueError(f"--until {options.until}: a step number >= 0 is wanted")
    model, steps = replayed(options.base, options.journal, options.until, vars(options))
    save_pretrained(model, options.output_dir)
    if options.json:
        print(json.dumps({"steps": steps, "output_dir": options.output_dir}))
    else:
        print(f"{steps} steps applied; the tuned model is in {options.output_dir}")
    return 0


def run_export(options):
    from .save import check_format, export
    check_format(options.to)
    if options.journal:
        model, steps = replayed(options.model, options.journal, None, vars(options))
    else:
        model, steps = load(options.model, vars(options)), 0
    export(model, options.output_dir, options.to)
    if options.json:
        print(json.dumps({"format": options.to, "steps": steps, "output_dir": options.output_dir}))
    else:
        after = f" after {steps} steps" if options.journal else ""
        print(f"the model{after} is in {options.output_dir} as {options.to}")
    return 0


def replayed(base, journal, until, own):
    """(the model at `base` with the steps of a journal, how many these are); options of the model as for `load`."""
    from .journal import read
    from .layers import train_slots
    from .optim import replay
    found = read(journal)
    if found is None:
        raise ValueError(f"{journal} has no whole header: the run ended before its first step")
    model = load(base, own)
    train_slots(model, set(found[0]["arena"]))
    return model, replay(model, journal, until)


def table(rows):
    """(name, {"loss", "accuracy"}) rows as aligned text."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  accuracy    loss"]
    for name, scores in rows:
        accuracy = "       -" if scores["accuracy"] is None else f"{100 * scores['accuracy']:6.1f} %"
        lines.append(f"{name:{width}}  {accuracy}  {scores['loss']:6.3f}")
    return "\n".join(lines)


def _say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
