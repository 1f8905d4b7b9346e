"""Result files, JSON lines with a schema number: read, compare, table, plot.

A row's `mode` is how it was timed: "graph", a replayed CUDA graph, or "eager", the calls one after another. `ratio` is
the provider's ms over qzo's of the same case and mode. `gbps` and `tflops` are what has to be moved and computed over
the time. `bandwidth_fraction` is of the bandwidth of reading where three quarters of the bytes or more are read (few
rows), else of that of a copy; `matmul_fraction` of a dense product; `roof_ms` is the least time that these allow, all
measured in the same run (`read_gbps`, `copy_gbps`, `dense_tflops`). `note` says why a row has no ms, or no graph.
"""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

SCHEMA = 2
_OF_1 = (
    "case",
    "provider",
    "rows",
    "n",
    "k",
    "group",
    "dtype",
    "noise",
    "ms",
    "p20",
    "p80",
    "gbps",
    "tflops",
    "bandwidth_fraction",
    "matmul_fraction",
    "ratio",
    "error",
    "device",
    "versions",
    "date",
)
FIELDS = (*_OF_1, "mode", "roof_ms")
NOT_THERE = ("not there", "missing")  # how the note of a provider begins that this machine lacks; now and before


def append(row, path):
    """Print a row, and write it behind those of a JSONL file; path: None for no file."""
    line = json.dumps(row)
    print(line, flush=True)
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            print(line, file=file)


def read(path):
    """Rows of a results file. ValueError naming the line that is no JSON, lacks a field or has an unknown schema.

    Rows of schema 1 become those of schema 2. They did not say how they were timed: on a CPU it was eager; on a GPU
    some were graphs and some were not, so that their ratios say nothing and are left out.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text; give a results file of qzo bench run --out") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or row.get("schema") not in (1, SCHEMA):
            found = row.get("schema", "none") if isinstance(row, dict) else "none"
            raise ValueError(
                f"{path}, line {number}: schema {found}, this qzo reads schemas 1 and {SCHEMA}; measure "
                "again with qzo bench run"
            )
        lacking = [name for name in (_OF_1 if row["schema"] == 1 else FIELDS) if name not in row]
        if lacking:
            raise ValueError(f"{path}, line {number}: the fields {', '.join(lacking)} are missing")
        rows.append(_of_1(row) if row["schema"] == 1 else row)
    if not rows:
        raise ValueError(f"{path} holds no results")
    return rows


def _of_1(row):
    on_gpu = "cuda" in row["versions"]
    return row | {
        "schema": SCHEMA,
        "mode": None if on_gpu else "eager",
        "roof_ms": None,
        "ratio": None if on_gpu else row["ratio"],
    }


def compare(old, new, threshold):
    """[(case, provider, old ms, new ms, new / old)] of what both measured in the same mode, and those slower by more
    than threshold. A case is named with its mode where that is a graph."""
    before = {(named(r), r["provider"], r["mode"], r["device"]): r["ms"] for r in old if r["ms"]}
    both = [
        (named(r), r["provider"], before[key], r["ms"], r["ms"] / before[key])
        for r in new
        if r["ms"] and (key := (named(r), r["provider"], r["mode"], r["device"])) in before
    ]
    if not both:
        raise ValueError("the two files share no case, provider, mode and device; nothing can be compared")
    return both, [line for line in both if line[4] > 1 + threshold]


def named(row):
    """The case, and that it is a graph."""
    return row["case"] + (", graph" if row["mode"] == "graph" else "")


def note_of(row):
    """What a row says for itself: a provider of all its cases, or of the case alone; empty if nothing."""
    whose = row["provider"] if row["note"].startswith(NOT_THERE) else f"{row['case']}, {row['provider']}"
    return row["note"] and f"{whose}: {row['note']}"


def as_markdown(rows):
    """Markdown: a line for each case, mode and provider that was timed, then what was not and why."""
    lines = [
        "| case | provider | ms (p20-p80) | roof, ms | GB/s | of bandwidth | TFLOP/s | of dense | x qzo | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["ms"] is None:
            continue
        cells = [
            named(r),
            r["provider"],
            f"{_number(r['ms'])} ({_number(r['p20'])}-{_number(r['p80'])})",
            _number(r["roof_ms"]),
            _number(r["gbps"]),
            _percent(r["bandwidth_fraction"]),
            _number(r["tflops"]),
            _percent(r["matmul_fraction"]),
            "" if r["ratio"] is None else f"{r['ratio']:.2f}",
            "" if r["error"] is None else f"{r['error']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [""] + [note for note in dict.fromkeys(map(note_of, rows)) if note]
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return "\n".join([*lines, "", f"{first['device']}; {versions}; {first['date']}."])


def _number(value):
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(fraction):
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def plot(rows, path):
    """Roofline (TFLOP/s over operations per byte) and times over qzo's by rows, as a PNG; ValueError without any."""
    timed = [r for r in rows if r["ms"] and r["tflops"]]
    if not timed:
        raise ValueError("nothing to plot: no product or step was timed")
    figure = Figure(figsize=(12, 5), layout="tight")
    roof, ratio = figure.subplots(1, 2)
    intensities = []
    for number, name in enumerate(dict.fromkeys(r["provider"] for r in timed)):
        mine = [r for r in timed if r["provider"] == name]
        intensity = [1e3 * r["tflops"] / r["gbps"] for r in mine]
        intensities += intensity
        look = {"color": f"C{number}", "label": name}
        roof.loglog(intensity, [r["tflops"] for r in mine], "o", markersize=4, **look)
        by_rows: dict[int, list[float]] = {}
        for r in mine:
            if r["ratio"] and name != "qzo":
                by_rows.setdefault(r["rows"], []).append(r["ratio"])
        if by_rows:
            rows_seen = sorted(by_rows)
            ratio.semilogx(
                [x for x in rows_seen for _ in by_rows[x]],
                [y for x in rows_seen for y in by_rows[x]],
                "o",
                markersize=3,
                alpha=0.4,
                color=look["color"],
            )
            ratio.semilogx(rows_seen, [statistics.median(by_rows[x]) for x in rows_seen], "-", **look)
    copy = timed[0].get("read_gbps", timed[0].get("copy_gbps"))  # of what lies under the slope most is read
    dense = timed[0].get("dense_tflops")
    if copy and dense:
        knee = 1e3 * dense / copy
        ends = sorted({min(*intensities, knee / 4), knee, max(*intensities, 4 * knee)})
        roof.loglog(ends, [min(1e-3 * copy * x, dense) for x in ends], "k-", linewidth=1, label="measured roof")
    roof.set(xlabel="operations per byte", ylabel="TFLOP/s", title=timed[0]["device"])
    ratio.axhline(1, color="k", linewidth=1)
    ratio.set(
        xlabel="rows per evaluation",
        ylabel="time over qzo's (line: median of the cases)",
        title="above 1: qzo is faster",
        yscale="log",
    )
    for axes in (roof, ratio):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
