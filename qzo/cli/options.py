"""What the commands that make a model can be asked. Nothing here imports torch: `--help` and completion are quick.

What a module further down knows better (noise laws, formats, defaults) is written out here once more; a test keeps them
in sync.
"""

import argparse
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("awq", "bitsandbytes", "compressed-tensors", "gptq")
TABLES = ("fp4", "nf4")
MAX_LENGTH = 1024  # of training/settings.py
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
        help="lines with options to fit the controls on (label biases, a linear probe), other than those that are "
        "scored (default: train.jsonl of the folder --data)",
    )
    parser.add_argument("--max-length", type=int, help=f"longest example in tokens (default {MAX_LENGTH})")
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
    _add_pictures(parser.add_argument_group("pictures, where MODEL is the folder of a diffusers pipeline"))
    add_loading(parser)


def _add_pictures(pictures: argparse._ArgumentGroup) -> None:
    pictures.add_argument("--output-dir", metavar="FOLDER", help="where seed-0.png and so on go")
    add_overwrite(pictures)
    pictures.add_argument("--images", type=int, default=1, metavar="N", help="of seeds from --seed on (default 1)")
    pictures.add_argument("--sampling-steps", type=int, metavar="N", help="of a picture (default 28)")
    pictures.add_argument("--guidance-scale", type=float, help="of the prompt, 1: none (default 4.5)")
    pictures.add_argument("--resolution", type=int, metavar="PIXELS", help="edge (default: the transformer's own)")
    pictures.add_argument("--transformer", metavar="FILE.gguf", help="in the place of the pipeline's own weights")


def add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the checkpoint the run started from")
    parser.add_argument("journal", help="journal.qzo of the run")
    parser.add_argument("--output-dir", required=True, help="where the tuned checkpoint goes")
    add_overwrite(parser)
    parser.add_argument("--until", type=int, help="stop before this step (default: all)")
    parser.add_argument("--transformer", metavar="FILE.gguf", help="of a run of qzo train-diffusion on one")
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
