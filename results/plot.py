"""Pictures of training from metrics.jsonl. Needs matplotlib (pip install matplotlib), which nothing else in the project does.

    python results/plot.py demo                  # results/demo.png from results/metrics/, the main table's runs
    python results/plot.py svamp                 # results/svamp.png, the svamp table's
    python results/plot.py runs/demo-qcrd-0      # training.png in that folder; several folders are drawn as seeds of one method
"""
import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402  (comes with matplotlib)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import run as tables  # noqa: E402

COLOURS = {"finetune": "#888888", "dss": "#0072B2", "qcrd": "#D55E00", "positives": "#009E73", "teacher": "#E69F00", "student": "#CC79A7"}
NAMES = {"positives": "positives", "teacher": "teacher's negatives", "student": "student's negatives"}


def series(runs: list[list[dict]], value) -> tuple[np.ndarray, np.ndarray]:
    """-> (iterations, values): (seeds, iterations), NaN where an iteration has none."""
    count = min(map(len, runs))
    rows = [[np.nan if (v := value(m)) is None else v for m in lines[:count]] for lines in runs]
    return np.arange(1, count + 1), np.array(rows, dtype=float)


def line(axis, runs: list[list[dict]], value, label: str, colour: str, style: str = "-") -> None:
    """Mean over seeds, a band from the lowest to the highest seed."""
    x, y = series(runs, value)
    seen = ~np.isnan(y).all(0)
    if seen.any():
        x, y = x[seen], y[:, seen]
        axis.fill_between(x, np.nanmin(y, 0), np.nanmax(y, 0), color=colour, alpha=0.15, linewidth=0)
        axis.plot(x, np.nanmean(y, 0), style, color=colour, label=label, linewidth=1.6)


def draw(title: str, methods: dict[str, list[list[dict]]], path: Path) -> None:
    """methods: name -> a list of metrics lines for each seed. Panels: accuracy, loss terms, mean scores, the last iteration's scores."""
    shown = "qcrd" if "qcrd" in methods else next(iter(methods))
    main = methods[shown]
    figure, (accuracy, loss, mean, last) = plt.subplots(1, 4, figsize=(17, 3.9), constrained_layout=True)
    for name, runs in methods.items():
        line(accuracy, runs, lambda m: 100 * m["valid_accuracy"], name, COLOURS.get(name, "#000000"))
    accuracy.set(title="accuracy on the validation questions, %", xlabel="iteration")
    terms = {"L_predict": ("L_predict", "#0072B2", "-"), "ℓ_pos": ("l_pos", "#009E73", "-"), "ℓ_neg (0: beyond δ)": ("l_neg", "#CC79A7", "-"),
             "L_D": ("L_D", "#D55E00", "-"), "share of negative terms at 0": ("zero_neg", "#555555", "--")}
    for label, (term, colour, style) in terms.items():
        line(loss, main, lambda m, term=term: m[term], label, colour, style)
    loss.set(title=f"{shown}: loss terms", xlabel="iteration")
    for name, label in NAMES.items():
        line(mean, main, lambda m, name=name: m["scores"].get(name, {}).get("mean"), label, COLOURS[name])
        counts = sum(np.array(lines[-1]["scores"].get(name, {}).get("histogram", [0] * 10)) for lines in main)
        if counts.sum():
            last.stairs(100 * counts / counts.sum(), np.linspace(0, 1, 11), color=COLOURS[name], label=label, linewidth=1.8)
    mean.set(title=f"{shown}: mean score s(x, r) of each set", xlabel="iteration", ylim=(0, 1))
    last.set(title=f"{shown}: scores in the last iteration, % of the set", xlabel="s(x, r)", xlim=(0, 1))
    for axis in (accuracy, loss, mean, last):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    raw = io.BytesIO()
    figure.savefig(raw, dpi=66)
    Image.open(raw).quantize(64).save(path, optimize=True)       # a third of the bytes
    plt.close(figure)
    print(path)


def main() -> int:
    names = sys.argv[1:]
    if not names or "-h" in names or "--help" in names:
        print(__doc__)
        return 0 if names else 2
    if names[0] in ("demo", "svamp"):
        table, title = {"demo": ("main", "The demo"), "svamp": ("svamp", "SVAMP, the student of svamp_student.py")}[names[0]]
        methods = {cell: [r["lines"] for r in results.values()] for cell, results in tables.finished(table).items() if cell in COLOURS}
        if not methods:
            print(f"error: nothing of the table {table} has been run; python results/run.py --run {table}", file=sys.stderr)
            return 2
        draw(f"{title}: mean of {min(map(len, methods.values()))} seeds, band from the lowest to the highest", methods, tables.HERE / f"{names[0]}.png")
        return 0
    try:
        runs = [[json.loads(text) for text in (Path(name) / "metrics.jsonl").read_text("utf-8").splitlines()] for name in names]
        draw(", ".join(names), {"qcrd" if runs[0][0]["scores"] else "run": runs}, Path(names[0]) / "training.png")
    except OSError as e:
        print(f"error: {e.filename}: {e.strerror}; name a run's folder, demo or svamp", file=sys.stderr)
        return 2
    except (ValueError, IndexError, KeyError):
        print(f"error: {', '.join(names)}: metrics.jsonl holds no finished iteration yet, or is damaged", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
