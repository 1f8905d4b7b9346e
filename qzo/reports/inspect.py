"""`qzo inspect`: what a checkpoint holds, what of it would train and what a step would take, without loading it.

A reader's tensors are looked at one at a time and let go; memory is predicted on a model without bytes
(memory.py). Only --signal loads the model: how much of L+ - L- survives the rounding of activations (signal.py).
"""

import collections
import math
import warnings

import torch

from ..checkpoints.empty import build_empty
from ..checkpoints.load import from_pretrained
from ..checkpoints.names import Names
from ..checkpoints.source import open_checkpoint
from ..checkpoints.tokenizer import load_tokenizer
from ..loss.head import has_encoder
from ..nn.choice import choose, group_for, sizes_of
from ..nn.experts import split_experts_
from ..nn.layers import layers
from ..nn.weights import PackedWeight, check_bits
from ..system.progress import tracked
from ..training.data import collate, tokenize
from ..training.loop import choose_layers, pad_id, trained_count
from ..training.records import read_data
from ..training.task import check_ids_and_lengths
from . import memory, models
from .models import form_of
from .signal import survival

NORMAL = 2.0**-14  # below it float16 has fewer than 11 bits
LOST = 0.5  # error of the derivatives over their size, from where on a run is in vain
EXAMPLES, LONGEST = 8, 256  # of --data that --signal reads, and their tokens
SENTENCES = (
    "The harbour was quiet when the first boats came in, and the gulls were already waiting on the wall.",
    "Water boils at a lower temperature on a mountain, because the air above it presses less.",
    "She read the letter twice, put it back into its envelope and asked for another cup of coffee.",
    "The committee agreed to repair the bridge before winter, although the money had not been found yet.",
)


class ScaleSurvey:
    """The distribution of scales that are seen a layer at a time.

    Magnitudes are counted by the upper 18 bits of their float32, 10 of them of the mantissa: the median is exact for
    scales that a file holds in 16 bits and within 2^-10 for others, however many there are.
    """

    def __init__(self):
        self.bins = torch.zeros(1 << 18, dtype=torch.int64)
        self.count = self.negative = self.zero = self.small = 0
        self.smallest, self.largest = math.inf, 0.0

    def add(self, scales):
        """Count float32 scales of any shape."""
        magnitude = scales[scales != 0].abs()
        self.count += scales.numel()
        self.zero += scales.numel() - magnitude.numel()
        self.negative += int((scales < 0).sum())
        self.small += int((magnitude < NORMAL).sum())
        if magnitude.numel():
            self.smallest = min(self.smallest, float(magnitude.min()))
            self.largest = max(self.largest, float(magnitude.max()))
            self.bins += torch.bincount(magnitude.view(torch.int32) >> 13, minlength=len(self.bins))

    def report(self):
        """{"count", "smallest", "median", "largest", "negative", "zero", "below_float16_normal"}, magnitudes of the
        scales that are not zero; None where there are none."""
        nonzero, median = self.count - self.zero, None
        if nonzero:
            at = int(torch.searchsorted(self.bins.cumsum(0), (nonzero - 1) // 2, right=True))
            median = float(torch.tensor(at << 13, dtype=torch.int32).view(torch.float32))
        return {
            "count": self.count,
            "smallest": self.smallest if nonzero else None,
            "median": median,
            "largest": self.largest if nonzero else None,
            "negative": self.negative,
            "zero": self.zero,
            "below_float16_normal": self.small,
        }


# ---------------------------------------------------------------------------------------------- what it holds


def survey(entries, types):
    """({name of a weight: Form}, ScaleSurvey, {type: [tensors, bytes] of dense tensors}, bytes of codes, codebooks,
    scales and zeros)."""
    wanted, scales, held = {}, ScaleSurvey(), {"codes": 0, "codebooks": 0, "scales": 0, "zeros": 0}
    dense: collections.defaultdict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, value, _ in tracked(entries, "reading", "tensors"):
        if isinstance(value, PackedWeight):
            wanted[name] = form_of(value)
            scales.add(value.scales)
            for part in held:
                tensor = getattr(value, part)
                held[part] += 0 if tensor is None else tensor.nbytes
        else:
            kind, nbytes = types.get(name, (str(value.dtype).removeprefix("torch."), value.nbytes))
            dense[kind][0] += 1
            dense[kind][1] += nbytes
    return wanted, scales, dense, held


def would_be(model, bits, group_size, stored):
    """({layer: Form} of what from_pretrained would quantize, {type: [tensors, bytes]} of what stays dense).

    stored: dtype of the checkpoint's tensors
    """
    check_bits(bits)
    chosen = choose(model, group_for(model, group_size))
    taken = {id(layer.module.weight) for layer in chosen.values()}
    rest = [p.numel() * stored.itemsize for p in model.parameters() if id(p) not in taken]
    forms = {name: models.Form(layer.group_size, bits=bits) for name, layer in chosen.items()}
    return forms, {str(stored).removeprefix("torch."): [len(rest), sum(rest)]}


def report(options):
    """The dict that --json prints. ValueError for a checkpoint that from_pretrained would refuse too."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(options.model, bool(options.trust_remote_code), bool(options.weight_only))
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = build_empty(checkpoint.config, dtype, trust_remote_code=checkpoint.trust_remote_code).eval()
    wanted, dense, told = _holds(checkpoint, model, options)
    found = {
        "model": options.model,
        "format": checkpoint.format.method,
        "quantized": checkpoint.quantized,
        **told,
        "class": type(model).__name__,
    }
    models.find_homes(model, wanted, options.model)
    linears = sum(sizes_of(module) is not None for module in model.modules())
    models.quantize_empty(model, wanted, cpu=device == "cpu")
    prefix = choose_layers(model, options.train_layers)
    found |= {
        "layers": _kinds(model),
        "act_order": sum(form.ordered for form in wanted.values()),
        "dense": {name: {"tensors": count, "bytes": nbytes} for name, (count, nbytes) in sorted(dense.items())},
        "dense_linears": linears - len(wanted),
        "trains": {
            "layers": len(layers(model)),
            "scales": trained_count(model),
            "blocks": options.train_layers if prefix else None,
        },
    }
    found["step"] = {
        "device": device,
        "rows": options.batch_size,
        "tokens": options.seq_len,
        "directions": options.directions,
    }
    found |= _memory(model, options, device)
    found["signal"] = signal(options, wanted) if options.signal else None
    return found


def _holds(checkpoint, model, options):
    """({layer: Form}, {type: [tensors, bytes]} of what stays dense, {"scales", "bytes"} as they are reported), of what
    the checkpoint holds or of what would be quantized of it."""
    if not checkpoint.quantized:
        split_experts_(model)
        return *would_be(model, options.bits, options.group_size, checkpoint.dtype), {"scales": None, "bytes": None}
    weights, scales, dense, held = survey(checkpoint.read(None), checkpoint.stored_types())
    names = Names(model)
    wanted = {names(name).removesuffix(".weight"): form for name, form in weights.items()}
    held["dense"] = sum(nbytes for _, nbytes in dense.values())
    return wanted, dense, {"scales": scales.report(), "bytes": held}


def _memory(model, options, device):
    """{"memory", "memory_unknown"}: bytes of a step, or why they cannot be predicted."""
    run = memory.Run(options.batch_size, options.seq_len, directions=options.directions)
    try:
        predicted = memory.predict(model, run, device, memory.this_chip())
    except (ValueError, RuntimeError) as error:  # no language model, or one whose code needs values, not only shapes
        return {"memory": None, "memory_unknown": str(error).splitlines()[0]}
    return {"memory": {part: predicted[part] for part in (*memory.PARTS, "total")}, "memory_unknown": None}


def _kinds(model):
    """[{"bits", "group_size", "zeros", "table", "codebooks", "layers", "scales", "weights"}] of layers alike, most
    weights first."""
    alike: dict[tuple[object, ...], dict[str, int]] = {}
    for layer in layers(model, trainable=None).values():
        zeros = "none" if layer.zeros is None else "float" if layer.zeros.is_floating_point() else "integer"
        size = "row" if layer.group_size == layer.in_features else layer.group_size
        key = layer.bits, size, zeros, layer.table is not None, 0 if layer.codebooks is None else len(layer.codebooks)
        kind = alike.setdefault(key, {"layers": 0, "scales": 0, "weights": 0})
        kind["layers"] += 1
        kind["scales"] += layer.in_features // layer.group_size * layer.out_features
        kind["weights"] += layer.in_features * layer.out_features
    named = [
        {**dict(zip(("bits", "group_size", "zeros", "table", "codebooks"), key, strict=True)), **kind}
        for key, kind in alike.items()
    ]
    return sorted(named, key=lambda kind: -kind["weights"])


# ---------------------------------------------------------------------------------------------- how much survives


def signal(options, wanted):
    """{"eps", "directions", activations: {"error", "cosine"}} of a batch of text, with a warning where the signal is
    lost. Loads the model, in float32; one of float weights is quantized as `wanted` has it."""
    records = read_data(options.data)["train"] if options.data else [{"text": text} for text in SENTENCES]
    tokenizer = load_tokenizer(options.model, bool(options.trust_remote_code))
    model = from_pretrained(
        options.model,
        dtype=torch.float32,
        bits=options.bits,
        group_size=next(iter(wanted.values())).group_size,
        trust_remote_code=bool(options.trust_remote_code),
        weight_only=bool(options.weight_only),
    )
    choose_layers(model, options.train_layers)
    examples = tokenize(records[:EXAMPLES], tokenizer, LONGEST, "all that --signal reads of a line", has_encoder(model))
    check_ids_and_lengths(model, examples)
    batch = collate(examples, pad_id(tokenizer), next(model.parameters()).device)
    seeds = range(options.signal_directions)
    survived = survival(model, batch, options.eps, seeds, activations=("float16", "bfloat16"))
    for name, found in survived.items():
        if not found["error"] < LOST:
            enough = _enough(options.eps, found["error"])
            warnings.warn(
                f"with eps {options.eps:g} {name} activations eat the signal: the error of the derivatives "
                f"is {found['error']:.2f} of their size; raise --eps to {enough}, or train with --dtype "
                f"{'float16 or ' if name == 'bfloat16' else ''}float32",
                stacklevel=2,
            )
    return {"eps": options.eps, "directions": options.signal_directions, **survived}


def _enough(eps, error):
    """An eps that brings the error to a quarter: it falls as 1 / eps."""
    return f"about {eps * error / 0.25:.0e}" if math.isfinite(error) else "1e-2"


# ---------------------------------------------------------------------------------------------- shown


def as_text(found):
    """The report as text."""
    count = sum(kind["layers"] for kind in found["layers"])
    lines = [
        f"{found['model']}: {found['format']}, {found['class']}"
        + ("" if found["quantized"] else "; what would be quantized on the way in:"),
        "",
    ]
    for kind in found["layers"]:
        size = "one group a row" if kind["group_size"] == "row" else f"groups of {kind['group_size']}"
        form = (
            f"{kind['codebooks']} codebooks of {kind['bits']} bits, one scale a row"
            if kind["codebooks"]
            else f"{kind['bits']} bits, {size}, "
            + ("a table of values" if kind["table"] else f"zero points {kind['zeros']}")
        )
        lines.append(f"layers      {kind['layers']} of {form}: {kind['weights']:,} weights, {kind['scales']:,} scales")
    lines.append("act-order   " + (f"{found['act_order']} of {count} layers" if found["act_order"] else "no"))
    if found["scales"]:
        s = found["scales"]
        lines += [
            f"scales      smallest {_number(s['smallest'])}, median {_number(s['median'])}, "
            f"largest {_number(s['largest'])} in magnitude",
            f"            {s['negative']:,} negative, {s['zero']:,} zero, {s['below_float16_normal']:,} below "
            f"float16's normal range (of {s['count']:,})",
        ]
    for name, of in found["dense"].items():
        lines.append(f"dense       {name}: {of['tensors']:,} frozen tensors, {_mb(of['bytes'])}")
    if found["dense_linears"]:
        lines.append(
            f"            {found['dense_linears']} of {found['dense_linears'] + count} linear layers among them"
        )
    if found["bytes"]:
        lines.append("held        " + ", ".join(f"{part} {_mb(n)}" for part, n in found["bytes"].items()))
    blocks = f" of the top {found['trains']['blocks']} blocks" if found["trains"]["blocks"] else ""
    lines.append(
        f"trains      {found['trains']['layers']} of {count} layers{blocks}: {found['trains']['scales']:,} scales"
    )
    step = found["step"]
    total = (
        f"{_mb(found['memory']['total'])}; qzo memory tells more"
        if found["memory"]
        else (f"cannot be predicted: {found['memory_unknown']}")
    )
    lines.append(
        f"a step      on {step['device']}, {step['rows']} x {step['tokens']} tokens, {2 * step['directions']} "
        f"evaluations at once: {total}"
    )
    return "\n".join([*lines, *_signal_lines(found["signal"])])


def _signal_lines(signal):
    """What is shown of `signal`'s report; nothing where it was not asked for."""
    if not signal:
        return []
    return [
        "",
        f"eps {signal['eps']:g}, {signal['directions']} directions: what rounding the activations does to the "
        "derivatives",
        f"            {'error':>8}{'cosine':>8}",
        *(f"{name:12}{of['error']:8.3f}{of['cosine']:8.3f}" for name, of in signal.items() if isinstance(of, dict)),
    ]


def _number(value):
    return "-" if value is None else f"{value:.3g}"


def _mb(nbytes):
    return f"{nbytes / 1e6:,.1f} MB"
