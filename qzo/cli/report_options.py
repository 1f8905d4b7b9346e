"""What the commands that report on a model or a journal, and the benchmark, can be asked; like options.py, without
torch."""

import argparse

from .options import DTYPES, add_model, add_overwrite, add_reading
from .train_options import LARGE_ROWS, OFFLOADS

BITS = (2, 4, 8)
CODES = ("int4", "int2", "int8", "nf4", "aqlm-1x16", "aqlm-2x8")
ZEROS = ("none", "integer", "float")
CONFIGS = (
    "facebook-opt-6.7b",
    "meta-llama-2-13b",
    "meta-llama-2-7b",
    "meta-llama-3.1-8b",
    "smollm2-135m",
    "stabilityai-sd3.5-large",
)
KINDS = ("linear", "step", "update", "noise", "journal", "overhead")
TOKENS, TEXT_TOKENS = 64, 333  # of a row, of a prompt of an image model
SIGNAL_EXAMPLES = 8
CPU_SECONDS = 600  # of the set that a CPU measures when it is not told which
BENCH_EXAMPLE = "example: qzo bench run --filter 4096x11008 --rows 1 16 --seconds 300 --out results.jsonl"


def add_inspect(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--train-layers", type=int, metavar="K", help="as in qzo train: what trains then")
    parser.add_argument("--bits", type=int, default=4, help="when a float checkpoint is quantized (default 4)")
    add_reading(parser, "the same (default: the largest of 128, 64, 32 that fits every layer)")
    parser.add_argument(
        "--weight-only",
        action="store_true",
        default=None,
        help="as in qzo train: inputs that are quantized are ignored",
    )
    step = parser.add_argument_group("the step whose memory is predicted")
    step.add_argument("--batch-size", type=int, default=1, help="rows (default 1)")
    step.add_argument("--seq-len", type=int, default=TOKENS, help=f"tokens a row (default {TOKENS})")
    step.add_argument("--directions", type=int, default=1, help="directions, two evaluations each (default 1)")
    step.add_argument("--device", choices=("cpu", "cuda"), help="whose memory (default: cuda if there is one)")
    lost = parser.add_argument_group("how much of the signal the activations' dtype leaves")
    lost.add_argument("--signal", action="store_true", help="load the model in float32 and measure it")
    lost.add_argument("--eps", type=float, default=1e-2, help="relative perturbation (default 0.01)")
    lost.add_argument(
        "--data",
        help=f"JSON lines as in qzo train, of which the first {SIGNAL_EXAMPLES} are read (default: a few sentences)",
    )
    lost.add_argument("--signal-directions", type=int, default=16, metavar="J", help="directions (default 16)")


def add_memory(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    what = parser.add_argument_group("the model")
    what.add_argument(
        "--config",
        help="instead of a model, which is loaded and measured: a config.json, or one that comes with qzo: "
        + ", ".join(CONFIGS),
    )
    add_reading(what, "(default: the largest of 128, 64, 32 that fits; of nf4 codes 64)")
    what.add_argument("--bits", type=int, choices=BITS, help="of a code (default 4)")
    what.add_argument(
        "--codes",
        choices=CODES,
        help="in place of --bits; nf4: codes of NF4's table; aqlm-2x8: two codebooks of 256 vectors, whose numbers "
        "count as dense (default int4)",
    )
    what.add_argument(
        "--zeros", choices=ZEROS, default="none", help="zero points that are stored (default none: symmetric)"
    )
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of dense tensors and activations (default: float32 on a CPU, float16 on a GPU)",
    )
    _add_step(parser.add_argument_group("the step"))
    where = parser.add_argument_group("where")
    where.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="whose memory (default: cuda; cpu where a run is measured and there is no GPU)",
    )
    where.add_argument("--chip", help="whose tiles (default: this GPU's, else sm_90)")
    where.add_argument("--measure", action="store_true", help="run the config with random weights and measure that")
    where.add_argument("--plot", metavar="FILE.png", help="stacked bars")
    where.add_argument("--snapshot", metavar="FILE", help="the CUDA allocator's history, for pytorch.org/memory_viz")
    add_overwrite(where)


def _add_step(run: argparse._ArgumentGroup) -> None:
    run.add_argument("--batch-size", type=int, default=1, help="rows a step (default 1)")
    run.add_argument(
        "--seq-len",
        type=int,
        help=f"tokens a row (default {TOKENS}; text tokens of an image model: {TEXT_TOKENS})",
    )
    run.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="edge of the pictures of an image model, eight for one of a latent (default: the config's own)",
    )
    run.add_argument(
        "--labels", type=int, default=1, help="labelled positions a row (default 1: a classification task)"
    )
    run.add_argument("--directions", type=int, default=1, help="directions a step (default 1)")
    run.add_argument("--sequential", action="store_true", help="evaluations one after another: half the activations")
    run.add_argument("--train-codebooks", action="store_true", help="as in qzo train: float32 copies that train")
    run.add_argument("--large-rows", choices=LARGE_ROWS, default=LARGE_ROWS[0], help="as in qzo train (default fused)")
    run.add_argument("--offload", choices=OFFLOADS[:2], help="as in qzo train: predicted for the device and beside it")


def add_bench(parser: argparse.ArgumentParser) -> None:
    """`run`, `compare`, `table` and `plot`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_bench_run(commands)
    both = commands.add_parser(
        "compare",
        help="two results files; exit status 1 if something got slower",
        epilog="example: qzo bench compare old.jsonl new.jsonl --threshold 0.05",
    )
    both.add_argument("old")
    both.add_argument("new")
    both.add_argument("--threshold", type=float, default=0.05, help="slower by more than this part (default 0.05)")
    both.add_argument("--json", action="store_true")
    shown = commands.add_parser("table", help="a results file as markdown", epilog="example: qzo bench table a.jsonl")
    shown.add_argument("file")
    drawn = commands.add_parser(
        "plot", help="roofline and ratios as a PNG", epilog="example: qzo bench plot a.jsonl --out a.png"
    )
    drawn.add_argument("file")
    drawn.add_argument("--out", required=True)
    add_overwrite(drawn)


def _add_bench_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser(
        "run",
        help="measure",
        epilog=BENCH_EXAMPLE,
        description=f"Time products, whole steps, updates, noise and the journal: kinds {', '.join(KINDS)}. A "
        "provider is timed only after its output agreed with float64. Says first how long it will take; on a CPU, "
        "without --filter, a set that ends within ten minutes.",
    )
    run.add_argument("--filter", metavar="SUBSTRING", help="cases with this in their name, in any case")
    run.add_argument("--rows", type=int, nargs="+", help="only cases with these rows per evaluation")
    run.add_argument("--providers", metavar="A,B", help="only these, separated by commas")
    run.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="for all cases together; those that do not fit are rows that say so (default: "
        f"{CPU_SECONDS} for a CPU without --filter, else no limit)",
    )
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    run.add_argument("--out", metavar="FILE", help="also write the rows there, as JSON lines")
    add_overwrite(run)
    run.add_argument("--json", action="store_true", help="JSON lines on standard output instead of a table")
    run.add_argument("--list", action="store_true", help="name the cases and stop")


def add_journal(parser: argparse.ArgumentParser) -> None:
    """`show`, `verify`, `diff`, `cut` and `concat`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: qzo journal {example}"
        )
        added.add_argument("--json", action="store_true", help="results as JSON on standard output")
        return added

    shown = action("show", "what a journal holds: settings, base, steps, losses", "show out/journal.qzo --steps")
    shown.add_argument("file")
    shown.add_argument("--steps", action="store_true", help="also a line for each direction of each step")
    checked = action("verify", "check every checksum; exit status 2 for damage", "verify out/journal.qzo")
    checked.add_argument("file")
    both = action("diff", "compare two journals; exit status 1 if they differ", "diff a/journal.qzo b/journal.qzo")
    both.add_argument("first")
    both.add_argument("second")
    part = action(
        "cut",
        "write a part of a journal, also the steps before damage, to a new file",
        "cut out/journal.qzo --until 100 --output first.qzo",
    )
    part.add_argument("file")
    part.add_argument(
        "--from",
        dest="start",
        type=int,
        metavar="M",
        help="begin with step M: a piece, for concat (default: the first)",
    )
    part.add_argument("--until", type=int, metavar="N", help="stop before step N (default: after the last)")
    joined = action("concat", "join pieces of one journal, in order", "concat first.qzo rest.qzo --output whole.qzo")
    joined.add_argument("files", nargs="+", metavar="file")
    for writes in (part, joined):
        writes.add_argument("--output", required=True, help="the new file; none is overwritten")
