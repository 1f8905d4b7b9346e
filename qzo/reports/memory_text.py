"""A report of `qzo memory` as text and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from .memory import PARTS


def as_text(report: Mapping[str, Any]) -> str:
    """The report as text: predicted beside measured, then the phases, the rivals and the cards."""
    predicted, measured = report["predicted"], report["measured"]
    lines = [f"{'':12}{'predicted':>12}" + (f"{'measured':>12}" if measured else "")]
    for part in (*PARTS, "total"):
        line = f"{part:12}{_gb(predicted[part]):>12}"
        lines.append(line + (f"{_gb(measured[part]):>12}" if measured else ""))
    for where in ("host", "disk"):
        if where in predicted:
            lines.append(f"{'on the ' + where:12}{_gb(predicted[where]):>12}")
    if measured:
        lines += [
            f"{'slack':24}{_gb(measured['slack']):>12}",
            f"measured is {measured['total'] / predicted['total']:.3f} of predicted",
        ]
    lines += ["", "highest in each phase:"]
    for phase, at in predicted["phases"].items():
        where = f" in {at['layer']}" if at["layer"] else ""
        lines.append(f"  {phase:10}{_gb(at['total']):>12}{where}")
    lines += ["", "beside it, by their published formulas:"]
    for name, size in report["rivals"].items():
        lines.append(f"  {name:24}{_gb(size):>12}  {size / predicted['total']:.1f}x")
    lines += ["", "fits: " + ("; ".join(report["fits"]) or "no card that is listed")]
    if report["free"] is not None:
        short = "; that is not enough" if report["free"] < predicted["total"] else ""
        lines.append(f"free here: {_gb(report['free'])}{short}")
    return "\n".join(lines)


def _gb(nbytes: int) -> str:
    return f"{max(nbytes, 0) / 1e9:.3f} GB"


def check_picture(path: str | Path) -> None:
    """ValueError for a file name whose ending is no picture's."""
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot {path}: a picture's name ends in .png, or in one of {', '.join(known)}")


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Stacked bars of what is predicted and measured; beside them the totals of the rivals, as a PNG."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    parts, totals = figure.subplots(1, 2, width_ratios=(1, 1.3))
    bars = [(name, report[name]) for name in ("predicted", "measured") if report[name]]
    bottoms = [0.0] * len(bars)
    for part in PARTS:
        heights = [max(0, numbers[part]) / 1e9 for _, numbers in bars]
        if any(heights):
            parts.bar([name for name, _ in bars], heights, bottom=bottoms, label=part, width=0.6)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    parts.set(ylabel="GB (1e9 bytes)", xlim=(-0.6, len(bars) + 0.2))
    parts.legend(frameon=False, fontsize=8, reverse=True)
    sizes = {"qzo": report["predicted"]["total"] / 1e9, **{k: v / 1e9 for k, v in report["rivals"].items()}}
    drawn = totals.barh(list(sizes), list(sizes.values()), color=["C0", *["0.8"] * (len(sizes) - 1)])
    totals.bar_label(drawn, fmt="%.3g", padding=3)
    totals.set(xscale="log", xlabel="GB, logarithmic; rivals by their published formulas")
    totals.invert_yaxis()
    totals.margins(x=0.15)
    figure.suptitle(report["subject"], fontsize=10)
    figure.savefig(path, dpi=150)
