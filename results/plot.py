"""Pictures of runs and tables, and the audit as a page to look at.

    python results/plot.py scores RUN                densities of s(x, r) -> RUN/scores.png
    python results/plot.py rationales [FILE]         by iteration -> results/rationales.png
    python results/plot.py curves RUN [RUN ...]      training curves -> the first RUN/curves.png
    python results/plot.py audit RUN N               N questions of --audit -> RUN/audit.html

`scores` needs a run with a discriminator and lets its student write. `rationales` reads run.py's
ablation. `curves` also takes a table: runs that differ in the seed alone are drawn as their mean,
with a band from lowest to highest. Pictures need matplotlib (pip install matplotlib).
"""

import argparse
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from judge import HERE_AND_NOW, load_run, read_lines  # noqa: E402

import qcrd  # noqa: E402
import t5  # noqa: E402
from t5 import InputError, require  # noqa: E402

BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"


def figure(rows: int, columns: int, height: float) -> tuple[Any, np.ndarray]:
    """Panels on a picture 9 inches, 900 pixels, wide. Raises InputError without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    plt.switch_backend("Agg")
    style = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    plt.rcParams.update(style | {"grid.alpha": 0.25, "lines.markersize": 3})
    return plt.subplots(rows, columns, figsize=(9, height), squeeze=False, layout="constrained")


def save(picture: Any, path: Path, caption: str) -> None:
    """Writes a PNG of 256 colours, half of the bytes, with a caption below the panels."""
    from PIL import Image  # comes with matplotlib

    picture.supxlabel(caption, fontsize=8, color="#444444")
    raw = io.BytesIO()
    picture.savefig(raw, dpi=100)
    Image.open(raw).convert("RGB").quantize(256).save(path, "PNG", optimize=True)
    print(path)


def band(axis: Any, x: Any, y: np.ndarray, name: str, colour: str, style: str = "-") -> None:
    """The mean over the runs of y, (runs, points), and a band from the lowest to the highest."""
    seen = ~np.isnan(y).all(0)
    if seen.any():
        x, y = np.asarray(x)[seen], y[:, seen]
        label = None if name in axis.get_legend_handles_labels()[1] else name
        axis.plot(x, np.nanmean(y, 0), style, color=colour, label=label, marker="o")
        axis.fill_between(x, np.nanmin(y, 0), np.nanmax(y, 0), color=colour, alpha=0.15, lw=0)


def density(scores: list[float], grid: np.ndarray, width: float = 0.025) -> np.ndarray:
    """Kernel density of scores in [0, 1] at the points of `grid`, reflected at 0 and 1."""
    s = np.array(scores)
    points = np.concatenate([s, -s, 2 - s])
    kernels = np.exp(-0.5 * ((grid[:, None] - points) / width) ** 2)
    return kernels.sum(1) / (len(s) * width * math.sqrt(2 * math.pi))


def score_sets(run: qcrd.Run) -> dict[str, list[float]]:
    """s of the teacher's rationales and of the student's samples for the validation questions."""
    config, student, D = run.config, run.student, run.discriminator
    require(D is not None, f"{run.folder}: has no discriminator, so that there is no s to show")
    task = qcrd.load_task(config)
    examples = task.valid[: qcrd.JUDGED]
    questions = []
    for i, vote in enumerate(qcrd.votes_of(qcrd.connect_teacher(config), task, examples)):
        S_pos, minority, _ = qcrd.sets_of(vote, config.vote)
        questions.append(student.question(examples[i], f"valid {i}", S_pos, minority))
    pairs = {"teacher's positives": [(q.x, r) for q in questions for r in q.S_pos]}
    pairs["teacher's negatives"] = [(q.x, r) for q in questions for r in q.minority]
    limit = config.rationale_tokens
    for tau in (1.5, 2.0):
        seeds = [qcrd.derive_seed(config.seed, "score figure", tau, q.place) for q in questions]
        texts = student.write(student.explain_prefix, questions, limit, tau, seeds)
        pairs[f"student's samples, τ = {tau}"] = [(q.x, r) for q, r in zip(questions, texts)]
    return {name: D.score(of).tolist() for name, of in pairs.items()}


def draw_scores(names: list[str], path: Path) -> None:
    run = load_run(Path(names[0]))
    picture, ((axis,),) = figure(1, 1, 3.6)
    grid = np.linspace(0, 1, 401)
    for (name, s), colour in zip(score_sets(run).items(), (GREEN, ORANGE, BLUE, PINK)):
        if s:
            label = f"{name} ({len(s)}, mean {np.mean(s):.2f})"
            axis.plot(grid, density(s, grid), color=colour, label=label)
            axis.fill_between(grid, density(s, grid), color=colour, alpha=0.08, linewidth=0)
    axis.set(xlim=(0, 1), ylim=(0, None), xlabel="s(x, r)", ylabel="density")
    axis.legend()
    where = f"{run.folder.name}: validation questions of {Path(run.config.task).name}"
    save(picture, path, f"{where}. The paper's figure: SVAMP's test set, T5-base")
    rows = sorted(read_lines(run.folder / "predictions.jsonl"), key=lambda row: row["quality"])
    right = [row["rationale_right"] for row in rows]
    s_right = [row["quality"] for row in rows if row["rationale_right"]]
    s_wrong = [row["quality"] for row in rows if not row["rationale_right"]]
    if above := qcrd.in_order(s_right, s_wrong):
        ends = f"ten lowest {np.mean(right[:10]):.0%} right, ten highest {np.mean(right[-10:]):.0%}"
        print(f"test: right above wrong in {np.mean(above):.1%} of the pairs; {ends}")


# title -> {key of metrics.jsonl: (name, colour)}
PANELS = {
    "loss terms": {"L": ("L_total", GREY), "L_pred": ("L_pred", BLUE)}
    | {"L_cl": ("L_cl", GREEN), "L_D": ("L_D", ORANGE)},
    "ℓ of the picks": {"l_pos": ("ℓ of r⁺", GREEN), "l_neg": ("ℓ of r⁻", ORANGE)},
    "negatives, %": {"zero": ("terms at 0", ORANGE), "right": ("student's, right answer", PINK)},
    "s of the picks": {"s_pos": ("s of r⁺", GREEN), "s_neg": ("s of r⁻", ORANGE)},
    "mean s, validation questions": {"s.positives": ("teacher's positives", GREEN)}
    | {"s.teacher": ("teacher's negatives", ORANGE), "s.student": ("student's samples", PINK)},
    "validation questions, %": {"valid": ("label", BLUE), "valid_rationale": ("rationale", PINK)}
    | {"pair": ("positive above negative", GREY)},
}
STYLES = {"solid": "-", "dashed": "--", "dotted": ":"}


def read_runs(names: list[str]) -> list[tuple[str, float, list[list[dict]]]]:
    """Title, δ and the runs' iterations for each setting in folders and tables."""
    settings: dict[str, tuple[str, float, list]] = {}
    for path in map(Path, names):
        if path.suffix == ".jsonl":
            for run in read_lines(path):
                given = re.search(r"--delta (\S+)", run["command"])
                delta = float(given[1]) if given else qcrd.Config.delta
                setting = (run["cell"], delta, [])
                same = run["command"].partition(" --seed")[0]
                settings.setdefault(same, setting)[2].append(run["iterations"])
        else:
            config = qcrd.read_config(path, HERE_AND_NOW)
            setting = (path.resolve().name, config.delta, [])
            same = repr(dataclasses.replace(config, seed=0, run=""))
            settings.setdefault(same, setting)[2].append(read_lines(path / "metrics.jsonl"))
    return list(settings.values())


def series(runs: list[list[dict]], key: str) -> np.ndarray:
    """(runs, iterations) of the values of a key; NaN where a line has none."""
    outer, _, inner = key.rpartition(".")
    count = min(map(len, runs))
    rows = [[(line.get(outer) or {}) if outer else line for line in run[:count]] for run in runs]
    return np.array([[line.get(inner) for line in row] for row in rows], dtype=float)


def draw_curves(names: list[str], path: Path) -> None:
    settings = read_runs(names)
    require(len(settings) <= 3, f"{len(settings)} settings; a picture shows 3 at most")
    picture, axes = figure(2, 3, 5.2)
    parts = []
    for (title, delta, runs), (style, dashes) in zip(settings, STYLES.items()):
        parts.append(f"{style}: {title}" + (f", {len(runs)} seeds" if len(runs) > 1 else ""))
        iterations = series(runs, "iteration")[0]  # from 0, the student before training
        for axis, (panel, keys) in zip(axes.flat, PANELS.items()):
            for key, (name, colour) in keys.items():
                y = series(runs, key) * (100 if "%" in panel else 1)
                band(axis, iterations, y, name, colour, dashes)
            axis.set_title(panel)
            axis.set_xlim(left=-0.25)
            if "%" in panel:
                axis.set_ylim(-4, 104)
            axis.locator_params(axis="x", integer=True)
        axes[0, 1].axhline(delta, color="black", linestyle="-.", linewidth=1)
        axes[0, 1].annotate(f"δ = {delta:g}", (1, delta), va="bottom")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
    save(picture, path, f"iteration      ({'; '.join(parts)})")


def draw_rationales(names: list[str], path: Path) -> None:
    """What DSS, several positives and QCRD teach the student to explain, from row zero on."""
    runs = read_lines(Path(*names or [HERE / "ablation.jsonl"]))
    picture, ((axis,),) = figure(1, 1, 3.2)
    shown = {"none": ("DSS", BLUE), "ED": ("several positives (ED)", GREEN)}
    for cell, (name, colour) in (shown | {"ED + NK + QJ": ("QCRD", ORANGE)}).items():
        found = [run["iterations"] for run in runs if run["cell"] == cell]
        if found:
            accuracy = 100 * series(found, "valid_rationale")
            band(axis, series(found, "iteration")[0], accuracy, name, colour)
    axis.set(xlabel="iteration (0: before training)", ylabel="right rationales, %", ylim=(0, None))
    axis.legend()
    seeds = 1 + max(run["seed"] for run in runs)
    task = Path(runs[0].get("task", "demo")).name
    caption = f"{qcrd.JUDGED} validation questions of {task}; {seeds} seeds: mean and range"
    save(picture, path, caption)


STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem;
  color: #222; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-top: 2px solid } h3 { margin: 1.2rem 0 .3rem; font-size: 1rem }
.question { white-space: pre-line; font-size: 1.1rem }
.row { display: grid; grid-template-columns: 15rem 1fr 20rem; gap: .2rem 1rem; margin: .3rem 0;
  padding: .45rem .6rem; border-left: 4px solid #ccc; background: #f7f7f7 }
.positive { border-color: #009e73 } .negative { border-color: #d55e00 }
.sample { grid-template-columns: 15rem 1fr } .picked { background: #fff3bf }
.bar { display: grid; grid-template-columns: 1.2rem 1fr 4.2rem; gap: .5rem; align-items: center }
.track { position: relative; height: .8rem; background: #ddd }
.fill { position: absolute; inset: 0 auto 0 0; background: #0072b2 } .grey { background: #888 }
.delta { position: absolute; top: -.2rem; bottom: -.2rem; border-left: 2px solid #b00 }
.number { text-align: right; font-variant-numeric: tabular-nums }
@media (max-width: 45rem) { .row { grid-template-columns: 1fr } }
"""
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""
LEGEND = """The run's last checkpoint, without dropout. ℓ: mean token cross-entropy; s: the score of
the discriminator. Yellow: the picks, which alone count in L_cl. Red mark: δ; a negative with ℓ
beyond it adds 0 (grey bar). L_D is eq. (2) on what is shown, without the fillers of training."""
VOTES = {"positive": "majority, S_pos", "negative": "minority, S_neg", "none": "without a vote"}


def bar(name: str, value: float, full: float, delta: float | None = None) -> str:
    """A value from 0 to `full` as a bar; with a mark at delta, and grey where it is beyond."""
    kind = "fill grey" if delta is not None and value >= delta else "fill"
    track = f'<span class="{kind}" style="width:{100 * min(max(value / full, 0), 1):.2f}%"></span>'
    if delta is not None:
        track += f'<span class="delta" style="left:{100 * delta / full:.2f}%"></span>'
    number = f'<span class="number">{value:.4f}</span>'
    return f'<div class="bar"><i>{name}</i><span class="track">{track}</span>{number}</div>'


def sample_row(sample: dict) -> str:
    answer = "cannot be read" if sample["answer"] is None else str(sample["answer"])
    head = f"<div>slot {sample['slot']}<br>answer: <b>{escape(answer)}</b></div>"
    text = f"<div>{escape(sample['rationale'] or '')}</div>"
    return f'<div class="row sample {escape(sample["vote"])}">{head}{text}</div>'


def candidate_row(c: dict, delta: float, full: float) -> str:
    head = f"{'S_pos' if c['set'] == 'positive' else 'S_neg'}, {escape(c['source'])}'s"
    head += "<br><b>→ picked</b>" if c["picked"] else ""
    kind = escape(c["set"]) + (" picked" if c["picked"] else "")
    bars = bar("ℓ", c["loss"], full, delta if c["set"] == "negative" else None)
    bars += bar("s", c["score"], 1.0)
    cells = (head, escape(c["rationale"]), bars)
    return f'<div class="row {kind}">' + "".join(f"<div>{x}</div>" for x in cells) + "</div>"


def sum_lines(item: dict) -> list[str]:
    """L_cl from the picks, and L_total, each product written out."""
    lines = []
    for c in item["candidates"]:
        factors = {"share": c["share"], "weight": c["weight"], "ℓ(r⁺)": c["loss"]}
        if c["set"] == "negative":
            margin = min(factors.pop("ℓ(r⁺)") - item["delta"], 0.0)
            factors = {"(−β)": -item["beta"], **factors, "min(ℓ(r⁻) − δ, 0)": margin}
        product = " · ".join(f"{name} {value:.5g}" for name, value in factors.items())
        if c["picked"]:
            lines.append(f"{c['set']}: {product} = {math.prod(factors.values()) + 0.0:.4f}")
    lines.append(f"L_cl, the sum of these = {item['L_cl']:.4f}")
    terms = zip(item["alphas"], ("L_pred", "L_cl", "L_D"))
    total = " + ".join(f"{alpha:.5g} · {name} {item[name]:.4f}" for alpha, name in terms)
    return [*lines, f"L_total = {total} = <b>{item['L_total']:.4f}</b>"]


def audit_page(items: list[dict], title: str) -> str:
    """qcrd.py --audit's data as one HTML page that needs nothing from elsewhere."""
    parts = [f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{escape(title)}</h1><p>{LEGEND}</p>")
    for number, item in enumerate(items, 1):
        parts.append(f"<h2>Question {number}</h2><p class=question>{escape(item['question'])}</p>")
        label, best, scheme = (escape(str(item[key])) for key in ("label", "majority", "scheme"))
        facts = f"label: <b>{label}</b> · majority: <b>{best}</b> · iteration {item['iteration']}"
        parts.append(f"<p>{facts}, {scheme}, δ = {item['delta']:g}, β = {item['beta']:g}</p>")
        for vote, name in VOTES.items():
            rows = [sample_row(sample) for sample in item["samples"] if sample["vote"] == vote]
            parts += [f"<h3>Teacher's samples: {name} ({len(rows)})</h3>", *rows] if rows else []
        parts.append(f"<h3>Candidates ({len(item['candidates'])})</h3>")
        full = 1.05 * max([item["delta"], *(c["loss"] for c in item["candidates"])])
        parts += [candidate_row(c, item["delta"], full) for c in item["candidates"]]
        parts.append(f'<h3>Sum</h3><div class="sum">{"<br>".join(sum_lines(item))}</div>')
    return "\n".join(parts) + "\n</html>\n"


def write_audit(names: list[str], path: Path) -> None:
    command = [sys.executable, "-X", "utf8", HERE.parent / "qcrd.py", "--json", "--audit", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        sys.exit(done.returncode)  # the error is on stderr
    page = audit_page(json.loads(done.stdout), f"QCRD audit: {names[0]}")
    path.write_text(page, encoding="utf-8")
    print(path)


COMMANDS = {"scores": (draw_scores, 1), "rationales": (draw_rationales, "*")}
COMMANDS |= {"curves": (draw_curves, "+"), "audit": (write_audit, 2)}


def main() -> int:
    """-> exit code, 2 after one line for what comes from outside."""
    return t5.run_program(run_command)


def run_command() -> None:
    how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **how)
    commands = parser.add_subparsers(dest="what", required=True)
    for what, (_, count) in COMMANDS.items():
        command = commands.add_parser(what)
        command.add_argument("names", nargs=count, help="RUN or FILE; for audit RUN and N")
        command.add_argument("--out", type=Path, help="the file to write")
    args = parser.parse_args()
    folder = Path(args.names[0]) if args.names and Path(args.names[0]).is_dir() else HERE
    suffix = "html" if args.what == "audit" else "png"
    try:
        COMMANDS[args.what][0](args.names, args.out or folder / f"{args.what}.{suffix}")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        where = " ".join(args.names)
        raise InputError(f"{where}: not what {args.what} is drawn from ({error!r})") from None


if __name__ == "__main__":
    sys.exit(main())
