"""What `qzo train-diffusion` and `qzo generate` of a pipeline can be asked; like options.py, without torch."""

import argparse

from .options import DTYPES, TABLES, add_overwrite
from .train_options import DEFAULTS, add_launching, add_perturbation, add_validation

DENSITIES = ("logit-normal", "mode", "uniform")
WEIGHTINGS = ("none", "cosmap")
STEPS, GUIDANCE = 28, 4.5  # of a picture: diffusers' own of Stable Diffusion 3.5
DIRECTIONS = 2  # a step: pairs, whose rows' differences give the derivative's standard error
CACHE = "cache"  # in OUT, unless --cache names another place
A_PIPELINE = "a folder of a diffusers pipeline, with model_index.json"


def add_train_diffusion(parser: argparse.ArgumentParser) -> None:
    """All of `qzo train-diffusion`."""
    parser.add_argument("pipeline", metavar="PIPELINE", help=A_PIPELINE)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data",
        help="a folder of pictures, each with a text file of its name or all with a metadata.jsonl of lines file_name "
        "and text; a folder with such folders train and valid; or a dataset of pictures and captions that save_to_disk "
        "of Hugging Face's datasets has written, or its Parquet files",
    )
    files.add_argument("--output-dir", help="where cache, journal, metrics, curve and the tuned pipeline go")
    files.add_argument(
        "--cache", metavar="FOLDER", help=f"latents and encoded prompts, made once (default: {CACHE} in --output-dir)"
    )
    files.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="continue the journal in --output-dir: the result has the bits of an unbroken run",
    )
    files.add_argument("--config", help="a YAML file with any of these options; options on the command line win")
    add_overwrite(files)
    _add_run(parser.add_argument_group("the run"))
    _add_rows(parser.add_argument_group("the rows of a step"))
    add_validation(parser.add_argument_group("validation, where the data have a valid split"))
    _add_samples(parser.add_argument_group("pictures that are drawn while it trains, into OUT/samples"))
    step = parser.add_argument_group("the perturbation and the update")
    add_perturbation(step)
    step.add_argument("--directions", type=int, help=f"directions a step, two evaluations each (default {DIRECTIONS})")
    add_launching(parser.add_argument_group("how a step is computed"))
    add_transformer(parser.add_argument_group("the transformer"))


def _add_run(run: argparse._ArgumentGroup) -> None:
    run.add_argument(
        "--max-steps",
        type=int,
        help=f"steps (default {DEFAULTS['max_steps']}); more of them with --resume extend a run at its last rate",
    )
    run.add_argument("--batch-size", type=int, help=f"pictures a step (default {DEFAULTS['batch_size']})")
    run.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="edge of the square pictures (default: the transformer's own)"
    )
    run.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="of a prompt, beside CLIP's (default: the pipeline's own)"
    )
    run.add_argument("--seed", type=int, help="seed of noise, times and data order (default 0)")


def _add_rows(rows: argparse._ArgumentGroup) -> None:
    rows.add_argument(
        "--times",
        choices=DENSITIES,
        default=DENSITIES[0],
        help=f"density of the times, before the shift (default {DENSITIES[0]})",
    )
    rows.add_argument(
        "--shift", type=float, help="of the times, a u / (1 + (a - 1) u) (default: the pipeline's scheduler's)"
    )
    rows.add_argument("--logit-mean", type=float, default=0.0, help="of the logit-normal density (default 0)")
    rows.add_argument("--logit-std", type=float, default=1.0, help="of the logit-normal density (default 1)")
    rows.add_argument(
        "--draws",
        type=int,
        default=1,
        metavar="K",
        help="rows of each picture in a step, noise and time of their own (default 1; more where pictures are few)",
    )
    rows.add_argument(
        "--stratified",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="spread the times of a step over equally likely intervals (default)",
    )
    rows.add_argument(
        "--weighting",
        default=WEIGHTINGS[0],
        help=f"of a row's loss by its time: {', '.join(WEIGHTINGS)} (default {WEIGHTINGS[0]})",
    )
    rows.add_argument(
        "--caption-dropout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the rows that learn the empty prompt, which guidance needs (default 0)",
    )


def _add_samples(samples: argparse._ArgumentGroup) -> None:
    samples.add_argument(
        "--sample-every", type=int, metavar="N", help="draw after every N steps, and before the first (default: never)"
    )
    samples.add_argument(
        "--samples",
        type=int,
        default=4,
        metavar="K",
        help="pictures, of the first captions of valid (else of train), with the seeds 0, 1, ... (default 4)",
    )
    samples.add_argument(
        "--sampling-steps", type=int, metavar="N", help=f"evaluations of the transformer for each (default {STEPS})"
    )
    samples.add_argument(
        "--guidance-scale", type=float, default=GUIDANCE, help=f"of the captions, 1: none (default {GUIDANCE:g})"
    )


def add_transformer(model: argparse._ArgumentGroup) -> None:
    """What is loaded, and how."""
    model.add_argument(
        "--transformer",
        metavar="FILE.gguf",
        help="a GGUF file of Stable Diffusion 3 or 3.5 in the place of the "
        "pipeline's own weights; OUT/model is such a file then",
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    model.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the activations (default: float32 on a CPU, float16 on a GPU)"
    )
    model.add_argument(
        "--group-size", type=int, help="when float weights are quantized on the way in: 32, 64, 128 (default 64)"
    )
    model.add_argument("--table", choices=TABLES, default="nf4", help="the same: what codes stand for (default nf4)")
