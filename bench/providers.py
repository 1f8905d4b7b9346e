"""Who is timed: qzo and what it is made to beat; peers.py has the libraries.

A provider builds its own weights for a Problem, more than a cache holds, and gives a run that passes over them, an
output and the float64 truth it has to agree with. One that cannot run a case, or is not installed, says so.
The official QZO loop perturbs float16 scales in place with noise that is materialized by torch.normal: +eps, forward,
-2 eps, forward, +eps, update (arXiv 2505.13430 and its published trainer). MeZO (arXiv 2305.17333) does the same to
dense weights. Both are written here from their description, with one difference: where they seed one generator anew
before each sweep, four generators of one seed stand here, a sweep each (`four_alike`). Nothing may be seeded in a CUDA
graph: each replay, too, draws the same noise four times, and other noise than the last one.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import torch
from torch.nn.functional import linear as dense_linear

from ..kernels.codes import centred_codes, middle
from ..kernels.noise import kernel_coefs, law_number, noise
from ..kernels.table import table_entries
from ..kernels.vectors import LENGTH, vector_rows
from ..nn import ops
from ..nn.evaluations import Evaluations
from ..nn.layers import arena_of, evaluating, layers
from ..nn.linear import QZOLinear
from ..nn.weights import PackedWeight
from .cases import CODES, DTYPES

EPS, LR, SEED = 1e-2, 1e-6, 7
EVERY = slice(None)
SAMPLE = 64  # rows of each sign, and outputs, that are compared with the truth
# relative RMS error allowed: products of exact operands in each type
EXACT = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclasses.dataclass
class Built:
    """run(part): the case's work once with each set of weights of `part`, a slice of `passes`; with all if not given.
    output(): y [2 rows, N] of the first layer, to be near `want` (float64, for the sampled rows and outputs) within
    `allowed`; None where nothing is computed. generators: all that the run draws from. host: what is timed is Python's
    own time on the CPU, on every device."""

    run: Callable[..., object]
    passes: int = 1
    output: Callable[[], torch.Tensor] | None = None
    want: torch.Tensor | None = None
    allowed: float = 0.0
    generators: tuple = ()
    host: bool = False


class Problem:
    """The random quantized layers and inputs of a case. Weights are random: what is timed does not depend on them, and
    sets of them are copies of one."""

    def __init__(self, case, device, least_bytes):
        self.case, self.device, self.least_bytes = case, device, least_bytes
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(SEED)
        self.x = {
            k: torch.randn(2 * case.rows, k, generator=generator, device=device).to(self.dtype) for k, _ in case.shapes
        }
        self.generator, self.first = generator, {}

    def copies(self, bytes_of_one):
        """How many sets of weights exceed the cache; a whole step is large enough, or the model is small."""
        return max(2, -(-self.least_bytes // bytes_of_one)) if self.case.kind == "linear" else 1

    def shapes(self, bytes_per_weight):
        """(in, out) of every layer a provider builds that keeps this many bytes for a weight, and the passes."""
        one = sum(k * n for k, n in self.case.shapes) * bytes_per_weight
        copies = self.copies(max(1, int(one)))
        return self.case.shapes * copies, copies

    def taken(self, layers, part):
        """Of a provider's layers those that the passes `part` run: a product's have one each, a step is all of them."""
        return layers[part] if self.case.kind == "linear" else layers

    def packed(self, k, n):
        """A PackedWeight of its own; those of one shape hold the same numbers."""
        if (k, n) not in self.first:
            self.first[k, n] = self._packed(k, n)
        first = self.first[k, n]
        books = first.codebooks if first.codebooks is None else first.codebooks.clone()
        return dataclasses.replace(first, codes=first.codes.clone(), scales=first.scales.clone(), codebooks=books)

    def _packed(self, k, n):
        form, given = self.case.form, dict(generator=self.generator, device=self.device)
        scales = torch.rand(k // self.case.group, n, **given) * 0.02 + 0.01
        scales = scales.half().float()  # the same number in every format that is compared
        if form.books:
            codes = torch.randint(0, 1 << form.bits, (n, k // LENGTH, form.books), dtype=torch.int32, **given)
            books = torch.randn(form.books, 1 << form.bits, LENGTH, **given)
            return PackedWeight.from_vectors(codes, scales[0], books.to(self.dtype))
        codes = torch.randint(0, 1 << form.bits, (n, k), dtype=torch.uint8, **given)
        return PackedWeight.from_codes(codes, scales, bits=form.bits, table=form.table)

    def model(self):
        """(ModuleList of QZOLinear with one arena, passes)."""
        shapes, passes = self.shapes(self.case.form.weight_bits / 8)
        model = torch.nn.ModuleList(QZOLinear.from_packed(self.packed(k, n), dtype=self.dtype) for k, n in shapes)
        arena_of(model, exact=True)
        for layer in layers(model).values():  # all are given one x, which in a model they are not: no launch is shared
            layer.siblings = None
        return model, passes

    def dense(self):
        """(dense weights [N, K], passes)."""
        shapes, passes = self.shapes(self.dtype.itemsize)
        first = {(k, n): self.packed(k, n).dequantize().to(self.dtype) for k, n in self.case.shapes}
        return [first[shape].clone() for shape in shapes], passes

    def sample(self, y):
        """The rows of either sign and the outputs that are compared."""
        some = min(SAMPLE, self.case.rows)
        return torch.cat([y[:some], y[self.case.rows : self.case.rows + some]])[:, :SAMPLE].double()

    def truth(self, weight, plus, minus):
        """float64 products of the sampled rows by what the codes of `weight` (a PackedWeight or QZOLinear) stand for,
        under the scales [G, N] of either sign."""
        some = min(SAMPLE, self.case.rows)
        x = self.x[weight.in_features].double()
        form, codes = self.case.form, packed_of(weight).unpacked()[:SAMPLE]
        if form.books:
            units = sum(book.double()[codes[:, :, c].long()] for c, book in enumerate(packed_of(weight).codebooks))
            units = units.flatten(1)
        elif form.table is not None:
            units = torch.tensor(form.table, dtype=torch.float64, device=x.device)[codes.long()]
        else:
            units = codes.double() - middle(form.bits)
        signs = []
        for rows, scales in ((x[:some], plus), (x[self.case.rows : self.case.rows + some], minus)):
            spread = scales[:, :SAMPLE].double().repeat_interleave(self.case.group, 0)
            signs.append(rows @ (units.T * spread))
        return torch.cat(signs)


def packed_of(weight):
    """A PackedWeight, or that of a QZOLinear."""
    return weight if isinstance(weight, PackedWeight) else weight.packed()


def error_of(built, problem):
    """Relative RMS error of an output, or inf where it has another shape or is not finite; 0 where there is none."""
    if built.output is None:
        return 0.0
    y = problem.sample(built.output())
    if y.shape != built.want.shape or not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y - built.want).square().mean().sqrt() / built.want.square().mean().sqrt())


# ------------------------------------------------------------------------------------------------ ours


def _qzo(problem, sharing="group", perturbed=True, large_rows="fused"):
    case = problem.case
    model, passes = problem.model()
    evaluations = Evaluations([SEED, SEED], [EPS, -EPS], case.noise, sharing=sharing).to(problem.device)
    arena, first = arena_of(model), model[0]
    applied = kernel_coefs([LR], law_number(case.noise)).to(problem.device)

    def forward(layers):
        return [layer(problem.x[layer.in_features]) for layer in layers]

    @torch.no_grad()
    def run(part=EVERY):
        layers = problem.taken(model, part)
        if not perturbed:
            return forward(layers)
        with ops.backend(large_rows=large_rows), evaluating(layers, evaluations):
            outputs = forward(layers)
        if case.kind == "step":
            torch.stack([y.float().square().mean() for y in outputs[-1].chunk(2)])
            ops.update_op(
                arena.data,
                evaluations.seeds[:1],
                applied,
                0,
                law_number(case.noise),
                True,
                2.0**-24,
                arena.layers() if sharing == "row" else None,
            )
        return outputs

    def output():
        if not perturbed:
            return first(problem.x[first.in_features])
        with ops.backend(large_rows=large_rows), evaluating(model, evaluations):
            return first(problem.x[first.in_features])

    scales, swing = first.read_scales(), 0.0
    if perturbed:
        index = arena.index(first.arena_name)
        z = noise(case.noise, SEED, index if sharing == "group" else index[:1].expand_as(index))
        swing = EPS * z.double() * scales.double()
    want = problem.truth(first, scales + swing, scales - swing)
    return Built(run, passes, output, want, EXACT[case.dtype] * (1 if large_rows == "fused" else 4))


# ------------------------------------------------------------------------------------------------ the baselines


def _dense(problem):
    weights, passes = problem.dense()
    first = weights[0]

    def run(part=EVERY):
        return [dense_linear(problem.x[w.shape[1]], w) for w in problem.taken(weights, part)]

    want = problem.sample(problem.x[first.shape[1]].double() @ first[:SAMPLE].double().T)
    return Built(run, passes, lambda: dense_linear(problem.x[first.shape[1]], first), want, EXACT[problem.case.dtype])


def _float16_scales(problem):
    """[(PackedWeight, its scales in float16 [G, N])], passes."""
    shapes, passes = problem.shapes(problem.case.form.weight_bits / 8)
    packed = [problem.packed(k, n) for k, n in shapes]
    return [(p, p.scales.half()) for p in packed], passes


def dequantized_product(x, packed, scales):
    """x [..., K] by the weight of packed codes under scales [G, N], which is made, in x's dtype, and multiplied."""
    k, (groups, n) = packed.in_features, scales.shape
    if packed.books:
        w = vector_rows(packed.codes, k, 0, n, packed.codebooks.float(), x.dtype)
    elif packed.table is not None:
        w = table_entries(packed.codes, k, 0, n, packed.table, x.dtype)
    else:
        w = centred_codes(packed.codes, k, 0, n, packed.bits)
    w = w.to(x.dtype).view(n, groups, -1)
    return dense_linear(x, w.mul_(scales.to(x.dtype).T.unsqueeze(2)).view(n, k))


def _dequantize(problem):
    layers, passes = _float16_scales(problem)
    first, scales = layers[0]

    def run(part=EVERY):
        return [dequantized_product(problem.x[p.in_features], p, s) for p, s in problem.taken(layers, part)]

    allowed = 4 * EXACT[problem.case.dtype]  # the scaled weight is rounded once more
    want = problem.truth(first, scales, scales)
    x = problem.x[first.in_features]
    return Built(run, passes, lambda: dequantized_product(x, first, scales), want, allowed)


def four_alike(device):
    """A generator for each sweep of a step, which all draw the same numbers; see the module's docstring."""
    return tuple(torch.Generator(device).manual_seed(SEED) for _ in range(4))


def sweep(parameters, factor, generator):
    """parameters += factor * z, z materialized tensor by tensor."""
    for p in parameters:
        z = torch.normal(0.0, 1.0, p.shape, generator=generator, device=p.device, dtype=p.dtype)
        p.add_(z, alpha=factor)


def in_place_pair(parameters, forward, rows, step, generators):
    """Outputs under +eps and -eps by perturbing `parameters` in place; the fourth sweep, an update, if `step`."""
    eps = EPS * 0.02  # absolute; the scales are around 0.02
    first, second, third, fourth = generators
    sweep(parameters, eps, first)
    plus = forward(slice(0, rows))
    sweep(parameters, -2 * eps, second)
    minus = forward(slice(rows, 2 * rows))
    sweep(parameters, eps, third)
    if step:
        sweep(parameters, -LR, fourth)
    return [torch.cat(pair) for pair in zip(plus, minus, strict=True)]


def signs_of(parameter, scale=EPS * 0.02):
    """A parameter under +eps and -eps of the first step, as in_place_pair leaves it."""
    plus, (first, second, _, _) = parameter.clone(), four_alike(parameter.device)
    sweep([plus], scale, first)
    minus = plus.clone()
    sweep([minus], -2 * scale, second)
    return plus, minus


def _official(problem):
    layers, passes = _float16_scales(problem)
    first, scales = layers[0]
    case, generators = problem.case, four_alike(problem.device)

    def forward(some, layers):
        return [dequantized_product(problem.x[p.in_features][some], p, s) for p, s in layers]

    def pair(layers, generators):
        return in_place_pair(
            [s for _, s in layers], lambda some: forward(some, layers), case.rows, case.kind == "step", generators
        )

    def run(part=EVERY):
        return pair(problem.taken(layers, part), generators)

    kept, want = scales.clone(), problem.truth(first, *signs_of(scales))
    return Built(
        run,
        passes,
        lambda: pair([(first, kept.clone())], four_alike(problem.device))[0],
        want,
        4 * EXACT[case.dtype],
        generators,
    )


def _official_fused(problem):
    """The official loop over qzo's own kernel without noise: what fusing the perturbation is worth."""
    model, passes = problem.model()
    case, arena, first = problem.case, arena_of(model), model[0]
    generators = four_alike(problem.device)

    def pair(layers, scales, generators):
        def forward(some):
            return [layer(problem.x[layer.in_features][some]) for layer in layers]

        return in_place_pair(scales, forward, case.rows, case.kind == "step", generators)

    def run(part=EVERY):
        layers = problem.taken(model, part)
        whole = len(layers) == len(model)  # then all scales are one tensor
        return pair(layers, [arena.data] if whole else [arena.quads(x.arena_name) for x in layers], generators)

    kept, signs = arena.data.clone(), []
    for scales in signs_of(arena.data):
        arena.data.copy_(scales)
        signs.append(first.read_scales())
    want = problem.truth(first, *signs)

    def output():
        arena.data.copy_(kept)
        return pair([first], [arena.data], four_alike(problem.device))[0]

    return Built(run, passes, output, want, EXACT[case.dtype], generators)


def _mezo(problem):
    weights, passes = problem.dense()
    case, first = problem.case, weights[0].clone()
    generators = four_alike(problem.device)

    def pair(weights, generators):
        def forward(some):
            return [dense_linear(problem.x[w.shape[1]][some], w) for w in weights]

        return in_place_pair(weights, forward, case.rows, case.kind == "step", generators)

    def run(part=EVERY):
        return pair(problem.taken(weights, part), generators)

    plus, minus = (w[:SAMPLE].double() for w in signs_of(first))
    x = problem.x[first.shape[1]].double()
    want = problem.sample(torch.cat([x[: case.rows] @ plus.T, x[case.rows :] @ minus.T]))
    return Built(
        run, passes, lambda: pair([first.clone()], four_alike(problem.device))[0], want, EXACT[case.dtype], generators
    )


# ------------------------------------------------------------------------------------------------ the list


@dataclasses.dataclass(frozen=True)
class Provider:
    """build(problem) -> Built. package: what has to be installed; kinds, codes: the cases it can run."""

    name: str
    build: Callable[..., Built]
    package: str = ""
    kinds: tuple = ("linear", "step")
    cuda_only: bool = False
    codes: tuple = tuple(CODES)

    def missing(self, device, case):
        """Why it cannot run the case here, or None."""
        if case.codes not in self.codes:
            return f"{self.name} is timed with {' and '.join(self.codes)} codes only"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.cuda_only and device != "cuda":
            return f"{self.name} needs a CUDA device"
        return None


PROVIDERS = (
    Provider("qzo", _qzo),
    Provider("qzo-row", functools.partial(_qzo, sharing="row")),
    Provider("qzo-blas", functools.partial(_qzo, large_rows="blas"), cuda_only=True),
    Provider("qzo-unperturbed", functools.partial(_qzo, perturbed=False)),
    Provider("dense", _dense),
    Provider("dequantize", _dequantize),
    Provider("official", _official),
    Provider("official-fused", _official_fused),
    Provider("mezo", _mezo),
)
