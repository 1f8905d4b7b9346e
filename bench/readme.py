"""The pages' tables, made from results files: `python -m qzo.bench.readme` rewrites what lies between the lines

    <!-- table of bench/results/NAME.jsonl -->
    <!-- end -->

A file of `qzo bench run` or `bench/gpu_check.py` gives the times of qzo and what the others take of them; one of
`qzo memory --json` gives bytes; one of the study what each method learned; one of eps.py the error of derivatives, one
of flow_variance.py their variance. Edit the text around, never a table.
"""

import json
import re
import sys
from pathlib import Path

from . import results
from .study import report

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("linear", "step", "whole step", "update", "noise")
SECTION = re.compile(r"(<!-- table of (\S+) -->\n).*?(<!-- end -->)", re.S)


def with_tables(text, root=ROOT):
    """The text with every table made anew. ValueError or FileNotFoundError for a results file that cannot be read."""
    return SECTION.sub(lambda found: found[1] + markdown_of(root / found[2]) + "\n" + found[3], text)


def markdown_of(path):
    """Markdown of a results file of any kind."""
    found = path.read_text(encoding="utf-8").splitlines()
    first = json.loads(found[0])
    if "method" in first:
        return report.as_markdown(report.lines(map(json.loads, found)))
    if "one_sided" in first:
        return eps_table([json.loads(line) for line in found])
    if "design" in first:
        return variance_table([json.loads(line) for line in found])
    return memory_table(path) if "predicted" in first else ratio_table(results.read(path))


def ratio_table(rows):
    """A line for each case, and mode where there is more than calls: the milliseconds of qzo, and each other provider's
    time over them. A provider without a ratio was not timed in this mode."""
    timed = [r for r in rows if r["ms"] and r["kind"] in KINDS]
    others = [name for name in dict.fromkeys(r["provider"] for r in timed) if name != "qzo"]
    graphs = any(r["mode"] == "graph" for r in timed)
    lines = [f"| case | qzo, ms | {' | '.join(others)} |", "|---|---|" + "---|" * len(others)]
    for case, mode in dict.fromkeys((r["case"], r["mode"]) for r in timed):
        by_name = {r["provider"]: r for r in timed if (r["case"], r["mode"]) == (case, mode)}
        ratios = [by_name[name]["ratio"] if name in by_name else None for name in others]
        cells = ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        ours = f"{by_name['qzo']['ms']:.3g}" if "qzo" in by_name else ""
        lines.append(f"| {case}{f', {mode}' if graphs else ''} | {ours} | {' | '.join(cells)} |")
    missing = [r["provider"] for r in rows if r["note"].startswith(results.NOT_THERE)]
    said = f"Not there and so not timed: {', '.join(dict.fromkeys(missing))}. " if missing else ""
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    return "\n".join([*lines, "", f"{said}{rows[0]['device']}; {versions}; {rows[0]['date']}."])


def memory_table(path):
    """A line for each report: predicted, measured where it was, and the rivals."""
    reports = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rivals = list(reports[0]["rivals"])
    lines = [f"| step | qzo, predicted | measured | {' | '.join(rivals)} |", "|---|---|---|" + "---|" * len(rivals)]
    for told_of in reports:
        measured = told_of["measured"]
        told = told_of["predicted"]["total"]
        cells = [
            f"{told / 1e9:.2f} GB",
            f"{measured['total'] / told:.3f}x of it" if measured else "",
            *(f"{told_of['rivals'][name] / 1e9:.1f} GB" for name in rivals),
        ]
        lines.append(f"| {told_of['subject']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def variance_table(rows):
    """A line for each design, and for each robust mean of stratified rows: variance, and squared mean, of each case."""
    cases, designs = (list(dict.fromkeys(row[name] for row in rows)) for name in ("case", "design"))
    found = {(row["case"], row["design"], mean): each for row in rows for mean, each in row["means"].items()}
    robust = [mean for mean in rows[0]["means"] if mean != "mean"]
    heads = [head for case in cases for head in (f"{case}: variance", "(E d)², 10⁻³")]
    lines = [f"| rows of a step | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for design, mean in [(name, "mean") for name in designs] + [("stratified", name) for name in robust]:
        cells = [design if mean == "mean" else f"{design}, {mean}"]
        for case in cases:
            each = found[case, design, mean]
            (ratio, error), (squared, its_error) = each["ratio"], each["squared_mean"]
            cells += [f"{ratio:.2f} ({error:.2f})", f"{1e3 * squared:.2f} ({1e3 * its_error:.2f})"]
        lines.append("| " + " | ".join(cells) + " |")
    row, batches = rows[0], {row["case"]: row["batches"] for row in rows}
    sizes = f"{', '.join(f'{count} ({case})' for case, count in batches.items())}, of {row['rows']} rows"
    how = f"{row['directions']} directions, eps {row['eps']:g}; {row['device']}; torch {row['versions']['torch']}"
    return "\n".join([*lines, "", f"Batches: {sizes}; {how}; {row['date']}."])


def eps_table(rows):
    """A line for each noise law and type of activations: the error at each eps, of pairs / one-sided."""
    sizes = list(dict.fromkeys(row["eps"] for row in rows))
    lines = [
        f"| noise, activations | {' | '.join(f'eps {size:g}' for size in sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    for noise, activations in dict.fromkeys((row["noise"], row["activations"]) for row in rows):
        mine = {row["eps"]: row for row in rows if (row["noise"], row["activations"]) == (noise, activations)}
        cells = [f"{mine[size]['error']:.2g} / {mine[size]['one_sided']['error']:.2g}" for size in sizes]
        lines.append(f"| {noise}, {activations} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    for page in pages():
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def pages(root=ROOT):
    """The files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


if __name__ == "__main__":
    sys.exit(main())
