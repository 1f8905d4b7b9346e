"""Controls: what examples do for an untouched model without a run, to be shown beside every run."""

from collections.abc import Mapping

from ..loss.label_bias import fit_label_bias
from ..loss.linear_probe import LEAST, fit_linear_probe
from .task import Look, Measure, measure

EXAMPLES = 512  # of the training data, that the controls are fitted on
PROBED = 1024  # of them, that a linear probe is fitted on at the most
NAMES = {"control": "control: label biases only", "linear_probe": "control: linear probe"}
Controls = dict[str, dict[str, Measure]]  # a name of NAMES -> split -> measured


def controls(fitted: Look, held_out: Mapping[str, Look]) -> Controls:
    """Of each split: "control", the scores with label biases, and for a classification with at least LEAST examples to
    fit on, whose states are finite, "linear_probe", a linear probe's; each fitted on `fitted`."""
    bias = fit_label_bias(fitted.scores, fitted.label)
    found = {"control": {split: measure(look.scores + bias, look.label) for split, look in held_out.items()}}
    states = {split: look.states for split, look in held_out.items() if look.classes == fitted.classes}
    known = {split: of_split for split, of_split in states.items() if of_split is not None}
    if fitted.states is None or len(fitted.label) < LEAST or not known or not fitted.states.isfinite().all():
        return found
    probe = fit_linear_probe(fitted.scores[:PROBED], fitted.states[:PROBED], fitted.label[:PROBED])
    probed = {split: probe(held_out[split].scores, of_split) for split, of_split in known.items()}
    return {**found, "linear_probe": {split: measure(probed[split], held_out[split].label) for split in probed}}
