"""`qzo quantize`."""

import argparse
import json

from ..checkpoints.formats import TARGETS
from ..checkpoints.quantize_folder import quantize_folder
from ..kernels.table import NAMED

CALIBRATED = """calibrated quantization starts from better codes, with data and a GPU; qzo reads what these write:
  GPTQModel        m = GPTQModel.load(MODEL, QuantizeConfig(bits=4, group_size=128)); m.quantize(TEXTS); m.save(OUT)
  auto-round       auto-round --model MODEL --scheme W4A16 --format auto_round --output_dir OUT
  llm-compressor   oneshot(model=MODEL, dataset=DATA, recipe=GPTQModifier(targets="Linear", scheme="W4A16",
                   ignore=["lm_head"]), output_dir=OUT)"""


def add_options(parser):
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the epilog's lines
    parser.epilog += f"\n\n{CALIBRATED}"
    parser.add_argument("model", help="a float checkpoint: a folder, or a hub id that is in the local cache")
    parser.add_argument("--output-dir", required=True, help="where the new checkpoint goes")
    parser.add_argument("--bits", type=int, default=4, help="2, 4 or 8 (default 4)")
    parser.add_argument(
        "--group-size",
        type=int,
        help="32, 64, 128, or -1 for the whole row (default: the largest of 128, 64, 32 that divides every layer)",
    )
    parser.add_argument("--asymmetric", action="store_true", help="with zero points (default: without)")
    parser.add_argument(
        "--format",
        choices=sorted(TARGETS),
        help="of the new checkpoint (default compressed-tensors; bitsandbytes with a table)",
    )
    parser.add_argument(
        "--table",
        choices=sorted(NAMED),
        help="4-bit codes that stand for its entries, in groups of "
        "64, as bitsandbytes has them (default: codes are integers)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the checkpoint's folder")


def execute(options):
    """Quantize, and tell; exit status. ValueError for bad input."""
    found = quantize_folder(
        options.model,
        options.output_dir,
        bits=options.bits,
        group_size=options.group_size,
        symmetric=not options.asymmetric,
        format=options.format,
        table=options.table,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        print(json.dumps({**found, "output_dir": options.output_dir}))
    else:
        error = "" if found["error"] is None else f"; the weights are off by {found['error']:.3f} of their size"
        bits = found["table"] or f"{found['bits']} bits"
        groups = "groups of a whole row" if found["group_size"] == -1 else f"groups of {found['group_size']}"
        print(f"{found['layers']} layers of {bits} in {groups} are in {options.output_dir} as {found['format']}{error}")
    return 0
