"""`qzo memory`."""

import json

from ..kernels.codes import BITS
from ..nn.ops import LARGE_ROWS
from ..reports import models
from ..reports.codes import CODES
from ..reports.memory import Run, make_report, plot, table


def add_options(parser):
    what = parser.add_argument_group("the model")
    what.add_argument("--config", help="a config.json, or one that comes with qzo: " + ", ".join(models.shipped()))
    what.add_argument("--model", help="a checkpoint: it is loaded and measured as well")
    what.add_argument("--trust-remote-code", action="store_true", help="run code from the checkpoint's folder")
    what.add_argument("--group-size", type=int, help="(default: the largest of 128, 64, 32 that fits; of nf4 codes 64)")
    what.add_argument("--bits", type=int, choices=BITS, help="of a code (default 4)")
    what.add_argument(
        "--codes",
        choices=CODES,
        help="in place of --bits; nf4: codes of NF4's table; aqlm-2x8: two "
        "codebooks of 256 vectors, whose numbers count as dense (default int4)",
    )
    what.add_argument(
        "--zeros", choices=models.ZEROS, default="none", help="zero points that are stored (default none: symmetric)"
    )
    what.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of dense tensors and activations (default: float32 on a CPU, float16 on a GPU)",
    )
    run = parser.add_argument_group("the step")
    run.add_argument("--batch-size", type=int, default=Run.rows, help=f"rows a step (default {Run.rows})")
    run.add_argument(
        "--seq-len",
        type=int,
        help=f"tokens a row (default {Run.tokens}; text tokens of an image model: {models.TEXT_TOKENS})",
    )
    run.add_argument(
        "--labels",
        type=int,
        default=Run.labels,
        help=f"labelled positions a row (default {Run.labels}: a classification task)",
    )
    run.add_argument("--directions", type=int, default=Run.directions, help="directions a step (default 1)")
    run.add_argument("--sequential", action="store_true", help="evaluations one after another: half the activations")
    run.add_argument("--train-codebooks", action="store_true", help="as in qzo train: float32 copies that train")
    run.add_argument("--large-rows", choices=LARGE_ROWS, default=LARGE_ROWS[0], help="as in qzo train (default fused)")
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


def execute(options):
    """Predict, measure if asked, and show; exit status. ValueError for bad input."""
    report = make_report(options)
    if options.plot:
        plot(report, options.plot)
    print(json.dumps(report) if options.json else f"{report['subject']}\n{table(report)}")
    return 0
