"""Result files, JSON lines with a schema number: read, compare, table, plot."""
import json
import statistics
from pathlib import Path

SCHEMA = 1
FIELDS = ("case", "provider", "rows", "n", "k", "group", "dtype", "noise", "ms", "p20", "p80", "gbps", "tflops",
          "bandwidth_fraction", "matmul_fraction", "ratio", "error", "device", "versions", "date")


def read(path):
    """Rows of a results file. ValueError naming the line that is no JSON, lacks a field or has another schema."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            found = row.get("schema", "none") if isinstance(row, dict) else "none"
            raise ValueError(f"{path}, line {number}: schema {found}, this qzo reads schema {SCHEMA}; measure again "
                             "with qzo bench run")
        lacking = [name for name in FIELDS if name not in row]
        if lacking:
            raise ValueError(f"{path}, line {number}: the fields {', '.join(lacking)} are missing")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no results")
    return rows


def compare(old, new, threshold):
    """[(case, provider, old ms, new ms, new / old)] of what both measured, and those slower by more than threshold."""
    before = {(r["case"], r["provider"], r["device"]): r["ms"] for r in old if r["ms"]}
    both = [(r["case"], r["provider"], before[key], r["ms"], r["ms"] / before[key]) for r in new
            if r["ms"] and (key := (r["case"], r["provider"], r["device"])) in before]
    if not both:
        raise ValueError("the two files share no case, provider and device; nothing can be compared")
    return both, [line for line in both if line[4] > 1 + threshold]


def table(rows):
    """Markdown: a line for each case and provider that was timed, then what was not and why."""
    lines = ["| case | provider | ms (p20-p80) | GB/s | of copy | TFLOP/s | of dense | x qzo | error |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        if r["ms"] is None:
            continue
        cells = [r["case"], r["provider"], f"{_number(r['ms'])} ({_number(r['p20'])}-{_number(r['p80'])})",
                 _number(r["gbps"]), _percent(r["bandwidth_fraction"]), _number(r["tflops"]),
                 _percent(r["matmul_fraction"]), "" if r["ratio"] is None else f"{r['ratio']:.2f}",
                 "" if r["error"] is None else f"{r['error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    notes = dict.fromkeys((r["provider"], r["note"]) for r in rows if r.get("note"))
    lines += [""] + [f"{provider}: {note}" for provider, note in notes]
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return "\n".join([*lines, "", f"{first['device']}; {versions}; {first['date']}."])


def _number(value):
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(fraction):
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def plot(rows, path):
    """Roofline (TFLOP/s over operations per byte) and times over qzo's by rows, as a PNG; ValueError without any."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in rows if r["ms"] and r["tflops"]]
    if not timed:
        raise ValueError("nothing to plot: no product or step was timed")
    figure, (roof, ratio) = pyplot.subplots(1, 2, figsize=(12, 5))
    intensities = []
    for number, name in enumerate(dict.fromkeys(r["provider"] for r in timed)):
        mine = [r for r in timed if r["provider"] == name]
        intensity = [1e3 * r["tflops"] / r["gbps"] for r in mine]
        intensities += intensity
        look = {"color": f"C{number}", "label": name}
        roof.loglog(intensity, [r["tflops"] for r in mine], "o", markersize=4, **look)
        by_rows = {}
        for r in mine:
            if r["ratio"] and name != "qzo":
                by_rows.setdefault(r["rows"], []).append(r["ratio"])
        if by_rows:
            rows_seen = sorted(by_rows)
            ratio.semilogx([x for x in rows_seen for _ in by_rows[x]], [y for x in rows_seen for y in by_rows[x]], "o",
                           markersize=3, alpha=0.4, color=look["color"])
            ratio.semilogx(rows_seen, [statistics.median(by_rows[x]) for x in rows_seen], "-", **look)
    copy, dense = timed[0].get("copy_gbps"), timed[0].get("dense_tflops")
    if copy and dense:
        knee = 1e3 * dense / copy
        ends = sorted({min(*intensities, knee / 4), knee, max(*intensities, 4 * knee)})
        roof.loglog(ends, [min(1e-3 * copy * x, dense) for x in ends], "k-", linewidth=1, label="measured roof")
    roof.set(xlabel="operations per byte", ylabel="TFLOP/s", title=timed[0]["device"])
    ratio.axhline(1, color="k", linewidth=1)
    ratio.set(xlabel="rows per evaluation", ylabel="time over qzo's (line: median of the cases)",
              title="above 1: qzo is faster", yscale="log")
    for axes in (roof, ratio):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
