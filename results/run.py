"""The paper's tables, and the studies of what it leaves open: each cell is qcrd.py with some flags.

    python results/run.py                            # the tables and their cells
    python results/run.py main ablation              # run what is missing of them, print them
    python results/run.py --print main               # print what is there
    python results/run.py ablation --task svamp --teacher URL      # the paper's setting, on a GPU

A finished cell is a line of results/<table>.jsonl (with --task T: results/<table>-T.jsonl) and is
skipped; one that was interrupted is resumed. A cell runs on one thread, so that the number of cores
does not change its result and two processes can share a table. Accuracies are percentages: mean ±
standard deviation over seeds, in brackets the paired difference from the table's reference with p
of an exact sign-flip test, which covers the student's randomness: all have the same samples.
"""

import argparse
import fcntl
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ED = "--negative-source none --no-discriminator"  # extended and denoised positives

# table -> (seeds, the reference cell, {cell: flags})
TABLES: dict[str, tuple[int, str, dict[str, str]]] = {
    "main": (
        10,
        "DSS",
        {"finetuning": "--method finetune", "single task": "--labels teacher --method finetune"}
        | {"DSS": "--method dss", "QCRD": ""},
    ),
    "ablation": (
        10,
        "none",
        {"none": "--method dss", "ED": ED, "ED + NK": "--no-discriminator", "ED + NK + QJ": ""},
    ),
    "schemes": (
        5,
        "MinMax",
        {"MinMax": "", "MaxMin": "--scheme maxmin", "Sampling": "--scheme sampling"}
        | {"Mean": "--scheme mean", "W-mean": "--scheme wmean", "MinMin": "--scheme minmin"},
    ),
    "negatives": (
        5,
        "j = 5",
        {"j = 3": "--lag 3", "j = 5": "", "j = 10": "--lag 10"}
        | {"Fixed": "--negative-source fixed", "SC": "--negative-source sc"},
    ),
    "vote": (5, "ED", {"ED": ED, "ED, all samples positive": f"{ED} --vote all"}),
    "llm-labels": (
        3,
        "DSS",
        {"single task": "--labels teacher --method finetune"}
        | {"DSS": "--labels teacher --method dss", "QCRD": "--labels teacher"},
    ),
    "fractions": (
        3,
        "DSS, 100 %",
        {f"DSS, {f} %": f"--method dss --fraction {f / 100}" for f in (25, 50, 75)}
        | {"DSS, 100 %": "--method dss"}
        | {f"QCRD, {f} %": f"--fraction {f / 100}" for f in (25, 50, 75)}
        | {"QCRD, 100 %": ""},
    ),
    "temperature": (
        3,
        "τ = 1.5",
        {"τ = 0.7": "--student-temperature 0.7", "τ = 1.0": "--student-temperature 1.0"}
        | {"τ = 1.5": "", "τ = 2.0": "--student-temperature 2.0"}
        | {"2.0 to 0.7": "--student-temperature 2.0 --student-temperature-end 0.7"},
    ),
    "samples": (
        3,
        "K = 5",
        {f"K = {k}": f"--samples {k}" for k in (1, 3)}
        | {"K = 5": "", "K = 10": "--samples 10"}
        | {"one greedy": "--samples 1 --teacher-temperature 0"},
    ),
    "discriminator": (
        3,
        "each iteration",
        {"each iteration": "", "each fifth": "--discriminator-every 5"}
        | {"never": "--discriminator-every 0"}
        | {f"{p} % swapped": f"--discriminator-noise {p / 100}" for p in (30, 50)},
    ),
    "student-samples": (3, "one", {"one": "", "three": "--student-samples 3"}),
}
# The demo's ten iterations would end where j = 10 begins: there, twenty of half the length.
DEMO = {"negatives": "--iterations 20 --iteration-steps 10 --discriminator-steps 10".split()}

# What the paper prints, in percent: table -> (task and student, {cell: label accuracy})
SVAMP = "SVAMP, T5-base"
PAPER: dict[str, tuple[str, dict[str, float]]] = {
    "main": (SVAMP, {"finetuning": 63.0, "single task": 59.0, "DSS": 65.5, "QCRD": 69.0}),
    "main, T5-small": ("SVAMP, T5-small", {"DSS": 48.0, "QCRD": 50.5}),
    "ablation": (SVAMP, {"none": 65.5, "ED": 67.0, "ED + NK": 68.5, "ED + NK + QJ": 69.0}),
    "schemes": (
        SVAMP,
        {"MinMax": 69.0, "MaxMin": 67.0, "Sampling": 66.5, "Mean": 65.0, "W-mean": 66.0},
    ),
    "negatives": (
        SVAMP,
        {"j = 3": 68.0, "j = 5": 69.0, "j = 10": 68.5, "Fixed": 66.5, "SC": 64.5},
    ),
    "llm-labels": ("CQA, T5-base", {"DSS": 59.15, "QCRD": 59.80}),
    "fractions": (
        SVAMP,
        {"DSS, 25 %": 34.0, "DSS, 50 %": 47.0, "DSS, 75 %": 61.0, "DSS, 100 %": 65.5}
        | {"QCRD, 25 %": 35.5, "QCRD, 50 %": 49.0, "QCRD, 75 %": 62.0, "QCRD, 100 %": 69.0},
    ),
}
# Kept of each iteration's line of metrics.jsonl: what plots and tables need.
KEPT = "iteration L L_pred L_cl L_D l_pos l_neg zero s_pos s_neg pair past right valid s".split()
SCORES = ("test_accuracy", "test_accuracy_last", "rationale_accuracy", "rationale_accuracy_last")
SETTING = "task teacher teacher-model model device micro-batch".split()  # flags for qcrd.py


def path_of(table: str, task: str) -> Path:
    return HERE / (f"{table}.jsonl" if task == "demo" else f"{table}-{Path(task).name}.jsonl")


def records(path: Path) -> list[dict]:
    """The lines of a JSONL file; none where it is not there."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def finished(task: str) -> dict[str, dict]:
    """Every recorded run of the task by its command: tables share cells."""
    runs = [run for table in TABLES for run in records(path_of(table, task))]
    return {run["command"]: run for run in runs}


def command_of(flags: str, seed: int, passed: list[str]) -> str:
    return " ".join(["qcrd.py", *passed, *flags.split(), "--seed", str(seed)])


def run_cell(command: str, folder: Path) -> dict | None:
    """Runs or resumes a cell -> its line; None where another process has it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        words = [sys.executable, *command.split(), "--run", str(folder)]
        if (folder / "config.json").exists():
            words = [sys.executable, "qcrd.py", "--resume", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=HERE.parent, env=environment, pass_fds=[lock.fileno()])
        if done.returncode:
            sys.exit(done.returncode)
        result = json.loads((folder / "result.json").read_text("utf-8"))
        lines = records(folder / "metrics.jsonl")
        kept = [{key: line.get(key) for key in KEPT} for line in lines]
        seconds = sum(line["seconds"] for line in lines)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        result |= {name: config[name.replace("-", "_")] for name in [*SETTING, "precision"]}
        short = json.loads(json.dumps(kept), parse_float=lambda text: float(f"{float(text):.4g}"))
        return {"command": command, "seconds": round(seconds), **result, "iterations": short}


def run_table(table: str, task: str, passed: list[str], seeds: int) -> None:
    """Runs what is missing, seed by seed, and records it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True)
    for seed, (cell, flags) in itertools.product(range(seeds), TABLES[table][2].items()):
        command = command_of(flags, seed, passed)
        path = path_of(table, task)
        if command in [run["command"] for run in records(path)]:
            continue
        name = "-".join(command.replace("--", "").replace("/", "_").split()[1:])
        print(f"== {table}, {cell}, seed {seed}: {command}", flush=True)
        line = finished(task).get(command) or run_cell(command, HERE.parent / "runs/tables" / name)
        if line is None:
            print("   another process is at it, or a killed one's; run this again", flush=True)
        else:
            line = {"cell": cell, "seed": seed, "commit": commit.stdout.decode().strip()} | line
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"cell": cell}) + "\n")


def exact_p(differences: list[float]) -> float:
    """Two-sided p of the mean of paired differences, over all 2^n flips of their signs."""
    observed = abs(sum(differences)) - 1e-9
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in flips]
    return sum(total >= observed for total in sums) / len(sums)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def runs_of(table: str, task: str, passed: list[str]) -> dict[str, dict[int, dict]]:
    """The recorded runs of each cell that has some, by seed."""
    seeds, _, cells = TABLES[table]
    runs, of = finished(task), {}
    for cell, flags in cells.items():
        every = [runs.get(command_of(flags, seed, passed)) for seed in range(seeds)]
        of[cell] = {seed: run for seed, run in enumerate(every) if run}
    return {cell: found for cell, found in of.items() if found}


def print_table(table: str, task: str, passed: list[str]) -> None:
    """Markdown: label and rationale accuracy of the selected and the last student."""
    reference, of = TABLES[table][1], runs_of(table, task, passed)
    columns = "label | label, last student | rationale | rationale, last student | seeds"
    setting, paper = PAPER.get(table, ("", {}))
    print(f"\n| {table} | {columns} |" + (f" *paper: {setting}* |" if paper else ""))
    print("|---" * (7 if paper else 6) + "|")
    for cell, found in of.items():
        row = [cell]
        for key in SCORES:
            values = {s: 100 * run[key] for s, run in found.items() if run[key] is not None}
            base = {s: run[key] for s, run in of.get(reference, {}).items() if run[key] is not None}
            pairs = [values[s] - 100 * base[s] for s in values if s in base]
            row.append(spread(list(values.values())) if values else "")
            if cell != reference and pairs:
                row[-1] += f" ({statistics.mean(pairs):+.1f}, p {exact_p(pairs):.3f})"
        row.append(str(len(found)))
        if paper:
            row.append(f"*{paper[cell]}*" if cell in paper else "")
        print("| " + " | ".join(row) + " |")


def print_terms(table: str, task: str, passed: list[str]) -> None:
    """Markdown: share of the negative terms at 0 by iteration, and of the student's negatives that
    end in the right answer; percent, means over seeds."""
    of = runs_of(table, task, passed)
    counts = [len(run["iterations"]) for found in of.values() for run in found.values()]
    count = max(counts, default=0)
    numbers = " | ".join(str(t) for t in range(1, count + 1))
    print(f"\n| {table}: terms at 0, iteration | {numbers} | the student's own that are right |")
    print("|---" * (count + 2) + "|")
    for cell, found in of.items():
        lines = [line for run in found.values() for line in run["iterations"]]
        row = [[x["zero"] for x in lines if x["iteration"] == t] for t in range(1, count + 1)]
        row.append([line["right"] for line in lines])
        values = [[100 * value for value in column if value is not None] for column in row]
        means = [f"{statistics.mean(column):.0f}" if column else "" for column in values]
        print(f"| {cell} | " + " | ".join(means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--print", action="store_true", help="run nothing")
    parser.add_argument("--terms", action="store_true", help="the negative terms too")
    parser.add_argument("--seeds", type=int, help="fewer than the table's own number")
    for name in SETTING:
        parser.add_argument(f"--{name}", default="", help="passed on to qcrd.py")
    args = parser.parse_args()
    args.task = "" if args.task == "demo" else args.task
    given = {f"--{name}": vars(args)[name.replace("-", "_")] for name in SETTING}
    passed = [word for pair in given.items() if pair[1] for word in pair]
    for table in args.tables:
        if table not in TABLES:
            parser.error(f"{table}: no table; there are {', '.join(TABLES)}")
    for table in args.tables:
        where = (table, args.task or "demo", passed + ([] if args.task else DEMO.get(table, [])))
        if not args.print:
            run_table(*where, args.seeds or TABLES[table][0])
        print_table(*where)
        if args.terms:
            print_terms(*where)
    for table, (seeds, reference, cells) in TABLES.items() if not args.tables else ():
        print(f"{table}: {seeds} seeds, differences from {reference}")
        for cell, flags in cells.items():
            print(f"  {cell}: python", *command_of(flags, 0, DEMO.get(table, [])).split()[:-2])


if __name__ == "__main__":
    main()
