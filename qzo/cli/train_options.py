"""What `qzo train` can be asked, some of it `qzo train-diffusion` too. Nothing here imports torch (options.py)."""

import argparse

from ..optim.defaults import CLIP, EPS, FLOOR, SYNC_SECONDS
from .options import CUDA_GRAPH, MAX_LENGTH, add_loading, add_model, add_overwrite, add_strict

NOISES = ("rademacher", "ih4", "gaussian")
SHARINGS = ("group", "row")
LARGE_ROWS = ("fused", "folded", "blas", "auto")
PACKINGS = ("off", "auto")
OFFLOADS = ("cpu", "disk", "auto")
CHAT_LOSSES = ("last", "all")
RECIPES = ("paper",)
KEEPS = ("last", "best")
LABEL_BIASES = ("fit", "none")
DEFAULTS = {  # of training/settings.py
    "max_steps": 200,
    "batch_size": 16,
    "directions": 8,
    "max_length": MAX_LENGTH,
    "max_cut": 0.5,
    "decay": 0.1,
    "check_every": 100,
    "staleness": 0,
    "floor": FLOOR,
    "eps": EPS,
    "clip": CLIP,
    "journal_fsync": SYNC_SECONDS,
}
RATE = 2e-2  # learning rate per direction


def _rate(text: str) -> float | str:
    """A learning rate, or "auto"."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


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
    files.add_argument(
        "--auto-resume",
        action="store_true",
        default=None,
        help="continue the journal in --output-dir if there is one, else begin: for a command that torchrun "
        "--max-restarts or a scheduler starts again",
    )
    files.add_argument(
        "--journal-fsync",
        type=float,
        metavar="SECONDS",
        help=f"seconds of the run that a power failure may cost (default {SYNC_SECONDS:g}; 0: each step is synced); a "
        "killed process costs nothing",
    )
    add_overwrite(files)
    _add_run(parser.add_argument_group("the run"))
    add_validation(parser.add_argument_group("validation, where the data have a valid split"))
    step = parser.add_argument_group("the perturbation and the update")
    add_perturbation(step)
    _add_directions(step)
    how = parser.add_argument_group("how a step is computed")
    add_launching(how)
    _add_text_launching(how)
    _add_ranks(parser.add_argument_group("several processes (torchrun --nproc-per-node N -m qzo train ...)"))
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


def add_validation(held_out: argparse._ArgumentGroup) -> None:
    """When a validation split is measured, and what follows from it."""
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


def add_perturbation(step: argparse._ArgumentGroup) -> None:
    """Of `Settings`: the estimator and the rates."""
    step.add_argument(
        "--learning-rate",
        type=_rate,
        help="at the first step, falling linearly to a part of it; auto (default): measured on the first batches where "
        f"label biases are fitted, else {RATE:g} per direction",
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
    step.add_argument("--noise", choices=NOISES, help="noise law (default rademacher)")
    step.add_argument(
        "--sharing", choices=SHARINGS, help="one z per scale (group, the default) or one per output row (row)"
    )


def _add_directions(step: argparse._ArgumentGroup) -> None:
    step.add_argument("--directions", type=int, help=f"directions a step (default {DEFAULTS['directions']})")
    step.add_argument(
        "--one-sided",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one evaluation of each direction, compared with the mean of the others (default: of three directions or "
        "more); without: two, +eps and -eps",
    )


def add_launching(how: argparse._ArgumentGroup) -> None:
    """How evaluations run."""
    how.add_argument(
        "--sequential",
        action="store_true",
        default=None,
        help="run the evaluations of a step one after another instead of stacked: activations of one, not of all",
    )
    how.add_argument(
        "--large-rows",
        choices=LARGE_ROWS,
        help="on a GPU, from 128 tokens per evaluation on: exact (fused), or perturbed weights rounded to 16 bits, in "
        "registers (folded) or in chunks for a library's matmul (blas); auto, the default: rounded if under 2 %% of "
        "the signal is lost by it",
    )
    how.add_argument("--cuda-graph", **CUDA_GRAPH)


def _add_text_launching(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--packing",
        choices=PACKINGS,
        help="auto: a batch of unequal lengths is one row without padding where that costs less and the model "
        "computes the same (default off)",
    )
    how.add_argument(
        "--offload",
        choices=OFFLOADS,
        help="for a model larger than the GPU: the blocks' codes stay in the host's memory (cpu) or in a file (disk), "
        "and stream to the device behind the compute; same bits. auto: the disk where memory does not suffice "
        "(default: off)",
    )
    how.add_argument("--offload-dir", metavar="DIR", help="where the file of --offload disk is (default: --output-dir)")
    how.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="what lies between the quantized layers goes through torch.compile: other roundings, and the first step "
        "of each shape waits (default: off)",
    )


def _add_ranks(ranks: argparse._ArgumentGroup) -> None:
    ranks.add_argument(
        "--parallel",
        metavar="WHAT",
        help="what a step divides among them: its examples (data, the default), its evaluations (directions), or both, "
        "as 2x4: 2 parts of the examples times 4 groups of the evaluations; or the layers, of a model that one device "
        "cannot hold (tensor). The first process writes and prints",
    )
    ranks.add_argument(
        "--check-every",
        type=int,
        metavar="STEPS",
        help="steps between two comparisons of all processes' scales, which end the run where they differ (default "
        f"{DEFAULTS['check_every']}; 0: never)",
    )
    ranks.add_argument(
        "--staleness",
        type=int,
        metavar="STEPS",
        help="evaluate each step on the scales as they were so many steps before, so that a process may be late by as "
        f"many before the others wait for it; without CUDA graphs (default {DEFAULTS['staleness']}: none)",
    )
