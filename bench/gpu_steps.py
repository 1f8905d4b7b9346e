"""Part "steps" of gpu_check.py: what a whole step of a model costs, call by call and as a CUDA graph, in wall time.

A step is what a user waits for: two forwards with the loss of a classification batch, and the update. Beside qzo's:

    dense, two forwards    the float16 model's own, with the same losses: what no zeroth-order step can avoid
    official               the published QZO loop (providers.py) over dequantize-and-multiply
    mezo                   the same over every parameter of the dense model
    qlora                  forward, backward and AdamW of rank-16 adapters on an NF4 model, activations kept; call by
                           call only, and where peft and bitsandbytes are installed

Weights are random. The coefficient of the official loop's and MeZO's update is a constant, so that theirs, too, are one
graph: they are not charged with reading the losses back, which qzo's step does. ratio: their time over qzo's of the
same mode.
"""

import importlib.util
import time
import warnings

import torch

from ..nn.choice import quantizable
from ..nn.layers import layers
from ..optim.optimizer import QZO
from ..reports import memory, models
from . import timing
from .providers import dequantized_product, four_alike, in_place_pair
from .results import NOT_THERE
from .run import add_ratios

CONFIG = "meta-llama-2-7b"
SIZES = ((1, 64), (16, 64))  # rows, tokens
TURNS = 8


def steps(check):
    """Every provider over every size, in both modes; a model at a time."""
    for name, build, prepare, wanted in PROVIDERS:
        lacking = [package for package in wanted if importlib.util.find_spec(package) is None]
        model = None
        for rows, tokens in SIZES:
            for mode in ("eager",) if wanted else timing.MODES:
                row = {
                    "kind": "whole step",
                    "case": f"whole step {CONFIG} {rows} x {tokens}",
                    "provider": name,
                    "mode": mode,
                    "rows": rows,
                }
                if lacking:
                    check.note(**row, note=f"{NOT_THERE[0]}: {' and '.join(lacking)} not installed")
                    continue
                if check.left() < 10:
                    check.note(**row, note="no time left")
                    continue
                model = build(check) if model is None else model
                batch = batch_of(model, rows, tokens, check.device)
                run, generators = prepare(model, batch, mode)
                times, note = _timed(run, generators, mode, check)
                ms, p20, p80 = times or (None, None, None)
                row |= {"ms": ms, "p20": p20, "p80": p80, "ratio": None}
                add_ratios([*(r for r in check.rows if r["kind"] == "whole step"), row])
                check.note(**row, note=note)
        del model
        if check.device == "cuda":
            torch.cuda.empty_cache()


def batch_of(model, rows, tokens, device):
    """A classification batch: one of two next tokens."""
    batch = models.example_batch(model, rows, tokens, 1, device)
    del batch["labels"]
    return batch | {
        "option_ids": torch.tensor([[5, 9]] * rows, device=device),
        "label": torch.zeros(rows, dtype=torch.int64, device=device),
    }


def _timed(run, generators, mode, check):
    """((median, p20, p80) in ms of wall time or None, note)."""
    wait = torch.cuda.synchronize if check.device == "cuda" else lambda: None
    if mode == "graph" and generators is not None:
        try:
            run = timing.capture(run, generators)
        except (timing.NotCaptured, AssertionError, RuntimeError) as error:
            return None, f"no graph could be captured ({' '.join(str(error).split())[:150]})"
    times = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for turn in range(TURNS + 2):
            wait()
            begun = time.perf_counter()
            run()
            wait()
            if turn > 1:
                times.append(1e3 * (time.perf_counter() - begun))
    fell_back = [str(w.message) for w in said if mode == "graph" and "graph" in str(w.message)]
    return (None, "; ".join(fell_back)) if fell_back else (timing.percentiles(times), "")


# ------------------------------------------------ build(check) -> model; prepare(model, batch, mode) -> run, generators


def _qzo_model(check):
    return memory.random_model(CONFIG, None, "none", check.device, check.dtype)[0]()


def _qzo(model, batch, mode):
    """Captures by itself: generators None."""
    optimizer = QZO(model, lr=0.0, cuda_graph=mode == "graph")

    def closure():
        return models.batch_losses(model, batch, 2)

    return lambda: optimizer.step(closure), None


def _dense_model(check):
    model = models.empty_model(models.read_config(CONFIG), check.dtype)
    return models.fill_parameters(model, check.device, torch.Generator(check.device).manual_seed(0))


def _two_forwards(model, batch, mode):
    return lambda: [models.batch_losses(model, batch, 1) for _ in range(2)], ()


def _in_place(model, parameters, batch):
    generators = four_alike(parameters[0].device)

    @torch.no_grad()
    def run():
        in_place_pair(parameters, lambda rows: [models.batch_losses(model, batch, 1)], 1, True, generators)

    return run, generators


class _Dequantizing(torch.nn.Module):
    """A layer as the official loop runs it: float16 scales, the weight made before each product."""

    def __init__(self, layer):
        super().__init__()
        self.packed, self.bias = layer.packed(), layer.bias
        self.scales = self.packed.scales.half()

    def forward(self, x):
        y = dequantized_product(x, self.packed, self.scales)
        return y if self.bias is None else y + self.bias


def _official_model(check):
    model = _qzo_model(check)
    for name, layer in layers(model).items():
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, _Dequantizing(layer))
    return model


def _official(model, batch, mode):
    return _in_place(model, [m.scales for m in model.modules() if isinstance(m, _Dequantizing)], batch)


def _mezo(model, batch, mode):
    return _in_place(model, list(model.parameters()), batch)


def _qlora_model(check):
    bitsandbytes, peft = importlib.import_module("bitsandbytes"), importlib.import_module("peft")
    model = _dense_model(check)
    for name, linear in quantizable(model).items():
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            quant_type="nf4",
            compute_dtype=check.dtype,
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, packed.to(check.device))
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def _qlora(model, batch, mode):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    last = torch.full_like(batch["input_ids"], -100)
    last[:, -1] = batch["input_ids"][:, -1]

    def run():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=last).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run, None


PROVIDERS = (
    ("qzo", _qzo_model, _qzo, ()),
    ("dense, two forwards", _dense_model, _two_forwards, ()),
    ("official", _official_model, _official, ()),
    ("mezo", _dense_model, _mezo, ()),
    ("qlora", _qlora_model, _qlora, ("peft", "bitsandbytes")),
)
