"""What the commands that make a model can be asked. Nothing here imports torch: `--help` and completion are quick.

What a module further down knows better (noise laws, formats, defaults) is written out here once more; a test keeps them
in sync.
"""

import argparse
from typing import Any

from ..optim.defaults import CLIP, EPS, FLOOR

DTYPES = ("float32", "float16", "bfloat16")
NOISES = ("rademacher", "ih4", "gaussian")
SHARINGS = ("group", "row")
LARGE_ROWS = ("fused", "folded", "blas", "auto")
PACKINGS = ("off", "auto")
CHAT_LOSSES = ("last", "all")
RECIPES = ("paper",)
KEEPS = ("last", "best")
LABEL_BIASES = ("fit", "none")
FORMATS = ("awq", "bitsandbytes", "compressed-tensors", "gptq")
TABLES = ("fp4", "nf4")
DEFAULTS = {  # of training/settings.py
    "max_steps": 200,
    "batch_size": 16,
    "directions": 2,
    "max_length": 1024,
    "max_cut": 0.5,
    "decay": 0.1,
    "floor": FLOOR,
    "eps": EPS,
    "clip": CLIP,
}
RATE, CLASSIFICATION_RATE = 4e-2, 8e-2  # learning rates per direction
A_MODEL = "a checkpoint: a folder, a .gguf file, or a Hub id"
CUDA_GRAPH: dict[str, Any] = dict(
    action=argparse.BooleanOptionalAction,
    help="run the steps of each shape of batch as one CUDA graph: bit-identical, faster (default: where the model is "
    "on a CUDA device)",
)
CALIBRATED = """calibrated quantization starts from better codes, with data and a GPU; qzo reads what these write:
  GPTQModel        m = GPTQModel.load(MODEL, QuantizeConfig(bits=4, group_size=128)); m.quantize(TEXTS); m.save(OUT)
  auto-round       auto-round --model MODEL --scheme W4A16 --format auto_round --output_dir OUT
  llm-compressor   oneshot(model=MODEL, dataset=DATA, recipe=GPTQModifier(targets="Linear", scheme="W4A16",
                   ignore=["lm_head"]), output_dir=OUT)"""


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL or --model: `model_of` takes either."""
    parser.add_argument("checkpoint", nargs="?", metavar="MODEL", help=A_MODEL)
    parser.add_argument("--model", help="the same, by name")


def model_of(options: argparse.Namespace) -> str | None:
    """The model that was given, None if none was. ValueError for two."""
    if options.checkpoint and options.model:
        raise ValueError(f"MODEL {options.checkpoint} and --model {options.model}: give one of the two")
    return options.checkpoint or options.model


def add_reading(parser: argparse._ActionsContainer, group_size: str) -> None:
    """How a checkpoint is read; group_size: what the command says of it."""
    parser.add_argument("--group-size", type=int, help=group_size)
    parser.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code from the checkpoint's folder"
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded."""
    model = parser.add_argument_group("the model")
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    model.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the activations (default: float32 on a CPU, float16 on a GPU)"
    )
    add_reading(model, "when a float checkpoint is quantized on the way in (default 128)")
    model.add_argument(
        "--weight-only",
        action="store_true",
        default=None,
        help="of checkpoints with quantized activations (W4A8): train the weights as if those were not quantized",
    )


def add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict",
        action="store_true",
        default=None,
        help="refuse a group size that does not divide the inputs of each layer (default: such a layer takes another, "
        "with a warning)",
    )


def add_overwrite(parser: argparse._ActionsContainer) -> None:
    """Leave to replace files that are there."""
    parser.add_argument(
        "--overwrite", action="store_true", default=None, help="replace existing files (default: refuse)"
    )


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    parser.add_argument(
        "--output-dir",
        help="where journal, metrics, curve and model go (default: a new folder qzo-demo, qzo-demo-2, ...)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the demo in --output-dir")
    add_overwrite(parser)
    parser.add_argument("--cuda-graph", **CUDA_GRAPH)


def add_train(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data",
        help="a file (JSONL, JSON array, CSV, TSV, Parquet), or a folder with train.jsonl (or another of these) and "
        "perhaps valid.jsonl, test.jsonl, or written by save_to_disk of Hugging Face's datasets; "
        "records are prompt+completion, messages, text, prompt+options+label, conversations (ShareGPT), or "
        "instruction+input+output (Alpaca)",
    )
    files.add_argument("--output-dir", help="where journal, metrics, curve and model go")
    files.add_argument("--config", help="a YAML file with any of these options; options on the command line win")
    files.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="continue the journal in --output-dir: the result has the bits of an unbroken run",
    )
    add_overwrite(files)
    _add_run(parser.add_argument_group("the run"))
    _add_validation(parser.add_argument_group("validation, where the data have a valid split"))
    _add_perturbation(parser.add_argument_group("the perturbation and the update"))
    _add_launching(parser.add_argument_group("how a step is computed"))
    add_loading(parser)
    add_strict(parser)


def _add_run(run: argparse._ArgumentGroup) -> None:
    run.add_argument(
        "--max-steps",
        type=int,
        help=f"steps (default {DEFAULTS['max_steps']}); more of them with --resume extend a run at its last rate",
    )
    run.add_argument("--batch-size", type=int, help=f"examples a step (default {DEFAULTS['batch_size']})")
    run.add_argument("--max-length", type=int, help=f"longest example in tokens (default {DEFAULTS['max_length']})")
    run.add_argument(
        "--max-cut",
        type=float,
        metavar="SHARE",
        help=f"share of the examples that may be cut to that length (default {DEFAULTS['max_cut']:g})",
    )
    run.add_argument(
        "--text-eos",
        action=argparse.BooleanOptionalAction,
        help="put the end-of-text token behind each text, as behind a completion (default); without: for pieces of "
        "longer texts, and to resume a run on texts that was begun before this option was there",
    )
    run.add_argument(
        "--chat-loss",
        choices=CHAT_LOSSES,
        help="learn the last message of the assistant in each conversation (default), or all of them",
    )
    run.add_argument(
        "--label-bias",
        choices=LABEL_BIASES,
        help="of a classification (options of one token, the same in all lines): learn what a bias per option cannot "
        "do, and fit these on training lines when the run has ended (fit, the default); or learn it all (none)",
    )
    run.add_argument("--seed", type=int, help="seed of noise and data order (default 0)")
    run.add_argument(
        "--train-layers",
        type=int,
        metavar="K",
        help="train the top K blocks only; the blocks below run once per example and their output is kept (default: "
        "the whole model trains)",
    )
    run.add_argument(
        "--train-codebooks",
        action="store_true",
        default=None,
        help="train the codebooks of AQLM layers too (default: the scales alone)",
    )
    run.add_argument(
        "--recipe",
        choices=RECIPES,
        help="the paper's setting: absolute eps 1e-3, clip 100, lr 1e-7, Gaussian noise, one direction, batch 16, "
        "floor 0; single options still win",
    )


def _add_validation(held_out: argparse._ArgumentGroup) -> None:
    held_out.add_argument(
        "--eval-every",
        type=int,
        metavar="STEPS",
        help="steps between two measurements of it (default: a tenth of the run)",
    )
    held_out.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="end the run after N measurements in a row without a lower loss (default: make all steps)",
    )
    held_out.add_argument(
        "--keep",
        choices=KEEPS,
        help="what OUT/model is: the last step (the default), or the one with the lowest validation loss, rebuilt from "
        "the base and the journal (best)",
    )


def _add_perturbation(step: argparse._ArgumentGroup) -> None:
    step.add_argument(
        "--learning-rate",
        type=float,
        help=f"at the first step, falling linearly to a part of it (default {RATE:g} per direction, "
        f"{CLASSIFICATION_RATE:g} where label biases are fitted)",
    )
    step.add_argument(
        "--decay", type=float, help=f"the part that it falls to, 1: constant (default {DEFAULTS['decay']})"
    )
    step.add_argument("--eps", type=float, help=f"perturbation, relative to a scale (default {EPS:g})")
    step.add_argument(
        "--relative",
        action=argparse.BooleanOptionalAction,
        help="eps and learning rate are parts of a scale (default); without: in the units of the scales",
    )
    step.add_argument("--clip", type=float, help=f"bound on the directional derivative (default {CLIP:g})")
    step.add_argument("--floor", type=float, help=f"least magnitude of a scale (default {FLOOR:g}, 2**-24)")
    step.add_argument(
        "--directions", type=int, help=f"directions a step, two evaluations each (default {DEFAULTS['directions']})"
    )
    step.add_argument("--noise", choices=NOISES, help="noise law (default rademacher)")
    step.add_argument(
        "--sharing", choices=SHARINGS, help="one z per scale (group, the default) or one per output row (row)"
    )


def _add_launching(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--sequential",
        action="store_true",
        default=None,
        help="run the evaluations of a step one after another instead of stacked: activations of one, not of all "
        "2 x directions",
    )
    how.add_argument(
        "--packing",
        choices=PACKINGS,
        help="auto: a batch of unequal lengths is one row without padding where that costs less and the model "
        "computes the same (default off)",
    )
    how.add_argument(
        "--large-rows",
        choices=LARGE_ROWS,
        help="on a GPU, from 128 tokens per evaluation on: exact (fused), or perturbed weights rounded to 16 bits, in "
        "registers (folded) or in chunks for a library's matmul (blas); auto, the default: rounded if under 2 %% of "
        "the signal is lost by it",
    )
    how.add_argument("--cuda-graph", **CUDA_GRAPH)
    how.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="what lies between the quantized layers goes through torch.compile: other roundings, and the first step "
        "of each shape waits (default: off)",
    )


def _add_journal(parser: argparse.ArgumentParser) -> None:
    """A run on the model, or the beginning of one: common.py has `check_until` and `replayed` for them."""
    parser.add_argument("--journal", help="the journal.qzo of a run on this model, which is replayed first")
    parser.add_argument("--until", type=int, metavar="N", help="the run's first N steps only (default: all)")


def add_eval(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--data", required=True, help="a JSONL file, or a folder with valid.jsonl, test.jsonl, train.jsonl"
    )
    _add_journal(parser)
    parser.add_argument(
        "--control-data",
        metavar="FILE",
        help="lines with options to fit the control's label biases on, other than those that are scored (default: "
        "train.jsonl of the folder --data)",
    )
    parser.add_argument("--max-length", type=int, help=f"longest example in tokens (default {DEFAULTS['max_length']})")
    add_loading(parser)


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_argument_group("the prompt (default: standard input, as --prompt)")
    asked = prompt.add_mutually_exclusive_group()
    asked.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads standard input")
    asked.add_argument(
        "--chat", metavar="TEXT", help="a message to answer, through the model's chat template; - reads standard input"
    )
    prompt.add_argument("--system", metavar="TEXT", help="a system message in front of --chat")
    _add_journal(parser)
    text = parser.add_argument_group("the text")
    text.add_argument("--max-new-tokens", type=int, default=256, help="most tokens that are written (default 256)")
    text.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="above 0: tokens are drawn, the more evenly the higher it is (default 0: the likeliest is taken)",
    )
    text.add_argument(
        "--top-p",
        type=float,
        help="draw from the likeliest tokens that have this probability together (default 1: from all)",
    )
    text.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    add_loading(parser)


def add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the checkpoint the run started from")
    parser.add_argument("journal", help="journal.qzo of the run")
    parser.add_argument("--output-dir", required=True, help="where the tuned checkpoint goes")
    add_overwrite(parser)
    parser.add_argument("--until", type=int, help="stop before this step (default: all)")
    add_loading(parser)


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=A_MODEL)
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="awq, bitsandbytes, compressed-tensors, gptq, or (from a GGUF file) gguf; refused with the reason where "
        "it cannot hold the model exactly",
    )
    parser.add_argument("--output-dir", required=True, help="where the new checkpoint goes")
    add_overwrite(parser)
    parser.add_argument("--journal", help="the journal.qzo of a run on this model, which is replayed first")
    parser.add_argument(
        "--round-zeros",
        action="store_true",
        help="of a GGUF Q4_1 or HQQ model: zero points are rounded to the integers that the format holds and scales "
        "refitted; how far that moves the weights is told (default: refuse)",
    )
    add_loading(parser)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the epilog's lines
    parser.epilog = f"{parser.epilog}\n\n{CALIBRATED}"
    parser.add_argument("model", help="a float checkpoint: a folder, or a Hub id")
    parser.add_argument("--output-dir", required=True, help="where the new checkpoint goes")
    add_overwrite(parser)
    parser.add_argument("--bits", type=int, default=4, help="2, 4 or 8 (default 4)")
    add_reading(
        parser, "32, 64, 128, or -1 for the whole row (default: the largest of 128, 64, 32 that divides every layer)"
    )
    add_strict(parser)
    parser.add_argument("--asymmetric", action="store_true", help="with zero points (default: without)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of the new checkpoint (default compressed-tensors; bitsandbytes with a table)",
    )
    parser.add_argument(
        "--table",
        choices=TABLES,
        help="4-bit codes that stand for its entries, in groups of 64, as bitsandbytes has them (default: codes are "
        "integers)",
    )
