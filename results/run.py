"""The paper's tables, and the studies of what it leaves open: each cell is qcrd.py with some flags.

    python results/run.py                            # the tables and their cells
    python results/run.py main ablation              # run what is missing of them, print them
    python results/run.py --print main               # print what is there, for the same flags
    python results/run.py --paper                    # the paper's numbers and their commands
    python results/run.py ablation --task svamp --teacher URL      # the paper's setting, on a GPU

A finished run is a line of results/<table>.jsonl (with --task T: results/<table>-T.jsonl) and is
skipped; one that was interrupted is resumed, by the same code alone. A run takes one thread, so
that the number of cores does not change its result and two processes can share a table; the demo's
take up to five minutes each. Accuracies are percentages: mean ± standard deviation over seeds.
Compare the last iteration's: in brackets their paired difference from the table's reference, with p
of an exact sign-flip test of six pairs or more. It covers the student's randomness alone.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import t5  # noqa: E402
from t5 import InputError, require  # noqa: E402

# The commit of what a run is made by; one that only records results is not named.
CODE = "git log -1 --format=%h -- qcrd.py t5.py fetch_data.py weights".split()
UNTRAINED = "--steps 0"  # the same for every seed
DSS = "--method dss"
ED = "--negative-source none --no-discriminator"  # extended and denoised positives
PARTS = (25, 50, 75)  # percent of the training set

# table -> {cell: flags}
CELLS: dict[str, dict[str, str]] = {
    "main": {"before": UNTRAINED, "finetuning": "--method finetune"}
    | {"single task": "--method single", "DSS": DSS, "QCRD": ""},
    "ablation": {"before": UNTRAINED, "none": DSS, "ED": ED}
    | {"ED + NK": "--no-discriminator", "ED + NK + QJ": ""},
    "schemes": {"MinMax": "", "MaxMin": "--scheme maxmin", "Sampling": "--scheme sampling"}
    | {"Mean": "--scheme mean", "W-mean": "--scheme wmean", "MinMin": "--scheme minmin"},
    "negatives": {f"j = {j}": f"--lag {j}" if j != 5 else "" for j in (1, 3, 5, 10)}
    | {"Fixed": "--negative-source fixed", "Static": "--negative-source static"}
    | {"SC": "--negative-source sc"},
    "discriminator": {"each iteration": "", "each fifth": "--discriminator-every 5"}
    | {"never": "--discriminator-every 0"}
    | {f"{p} % swapped": f"--discriminator-noise {p / 100}" for p in (30, 50)}
    | {"ce": "--discriminator-loss ce", "rate 1e-3": "--discriminator-lr 1e-3"}
    | {"500 steps": "--discriminator-pretrain 500"},
    "fractions": {f"DSS, {part} %": f"{DSS} --fraction {part / 100}" for part in PARTS}
    | {"DSS, 100 %": DSS}
    | {f"QCRD, {part} %": f"--fraction {part / 100}" for part in PARTS}
    | {"QCRD, 100 %": ""},
    "llm-labels": {"finetuning": "--labels teacher --method finetune"}
    | {"DSS": f"--labels teacher {DSS}", "QCRD": "--labels teacher"},
    "samples": {"K = 1": "--samples 1", "K = 3": "--samples 3", "K = 5": ""}
    | {"K = 10": "--samples 10", "one greedy": "--samples 1 --teacher-temperature 0"},
    "temperature": {f"τ = {tau}": f"--student-temperature {tau}" for tau in (0.7, 1.0)}
    | {"τ = 1.5": "", "τ = 2.0": "--student-temperature 2.0"}
    | {"2.0 to 0.7": "--student-temperature 2.0 --student-temperature-end 0.7"},
    "vote": {"ED": ED, "ED, all samples positive": f"{ED} --vote all"},
}
SEEDS = {"main": 10, "ablation": 10, "schemes": 6, "negatives": 6, "discriminator": 6}  # else 3
REFERENCE = {"main": "DSS", "ablation": "none", "schemes": "MinMax", "negatives": "j = 5"}
REFERENCE |= {"discriminator": "each iteration", "fractions": "DSS, 100 %", "llm-labels": "DSS"}
REFERENCE |= {"samples": "K = 5", "temperature": "τ = 1.5", "vote": "ED"}
# table -> (seeds, the reference cell, {cell: flags})
TABLES = {name: (SEEDS.get(name, 3), REFERENCE[name], cells) for name, cells in CELLS.items()}
# The demo's ten iterations would end where j = 10 begins: there, twenty of half the length.
DEMO = {"negatives": "--iterations 20 --discriminator-steps 10".split()}

# Label accuracies in percent that the paper prints: (task, student) -> table -> {cell: value}. MI
# is not built here. The main table's columns, with t5-base and with t5-small:
ROWS = ("finetuning", "single task", "DSS", "MI", "QCRD")
COLUMNS = {
    "svamp": ((63.0, 59.0, 65.5, 67.5, 69.0), (45.0, 46.5, 48.0, 47.0, 50.5)),
    "cqa": ((62.19, 63.11, 63.23, 63.50, 63.64), (43.16, 44.98, 45.21, 45.49, 46.11)),
    "anli1": ((43.58, 47.90, 52.80, 54.20, 54.00), (42.00, 42.50, 42.80, 42.10, 44.10)),
    "esnli": ((88.38, 88.77, 90.09, 90.15, 90.26), (82.90, 83.67, 84.23, 83.55, 85.30)),
}
PAPER: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    (task, student): {"main": dict(zip(ROWS, values))}
    for task, columns in COLUMNS.items()
    for student, values in zip(("t5-base", "t5-small"), columns)
}
PAPER["svamp", "t5-base"] |= {
    "ablation": {"none": 65.5, "ED": 67.0, "ED + NK": 68.5, "ED + NK + QJ": 69.0},
    "schemes": {"MinMax": 69.0, "MaxMin": 67.0, "Sampling": 66.5, "Mean": 65.0, "W-mean": 66.0},
    "negatives": {"j = 3": 68.0, "j = 5": 69.0, "j = 10": 68.5, "Fixed": 66.5, "SC": 64.5},
    "fractions": dict(zip(CELLS["fractions"], (34.0, 47.0, 61.0, 65.5, 35.5, 49.0, 62.0, 69.0))),
}
PAPER["cqa", "t5-base"]["llm-labels"] = {"DSS": 59.15, "QCRD": 59.80}
PAPER["anli1", "t5-base"]["llm-labels"] = {"DSS": 44.10, "QCRD": 46.70}
PAPER["esnli", "t5-base"]["llm-labels"] = {"DSS": 74.88, "QCRD": 74.88}
for task, values in (
    ("anli1", (45.6, 47.8, 51.6, 52.8, 47.1, 48.4, 52.9, 54.0)),
    ("esnli", (90.22, 90.19, 90.11, 90.09, 90.22, 90.22, 90.21, 90.26)),
):
    PAPER[task, "t5-base"]["fractions"] = dict(zip(CELLS["fractions"], values))
values = {"DSS, 75 %": 62.16, "DSS, 100 %": 63.23, "QCRD, 75 %": 62.34, "QCRD, 100 %": 63.64}
PAPER["cqa", "t5-base"]["fractions"] = values  # at 25 and 50 % its two lines cross

# Kept of each iteration's line of metrics.jsonl: what plots and tables need.
KEPT = "iteration L L_pred L_cl L_D l_pos l_neg zero s_pos s_neg pair pair_student past right"
KEPT = f"{KEPT} valid valid_rationale s".split()
SCORES = ("test_accuracy_last", "rationale_accuracy_last", "test_accuracy", "rationale_accuracy")
TITLES = ("label, last", "rationale, last", "label, selected", "rationale, selected")
WHOLE = ("main", "ablation")  # tables that show the selected student too
JUDGED = "discriminator"  # the table that shows what D makes of validation questions
SETTING = "task answer teacher teacher-model model device micro-batch".split()  # flags for qcrd.py


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
    try:
        held = t5.lock(f"{folder}.lock", "another process has it")
    except InputError:
        return None
    with held:
        words = [sys.executable, *command.split(), "--run", str(folder)]
        if (folder / "config.json").exists():
            words = [sys.executable, "qcrd.py", "--resume", str(folder)]
        done = subprocess.run(words, cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.returncode)
        result = json.loads((folder / "result.json").read_text("utf-8"))
        lines = records(folder / "metrics.jsonl")
        config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = [{key: line.get(key) for key in KEPT} for line in lines]
    seconds = sum(line["seconds"] for line in lines)
    result |= {name: config[name.replace("-", "_")] for name in [*SETTING, "precision", "steps"]}
    short = json.loads(json.dumps(kept), parse_float=lambda text: float(f"{float(text):.4g}"))
    return {"command": command, "seconds": round(seconds), **result, "iterations": short}


def run_table(table: str, task: str, passed: list[str], seeds: int) -> None:
    """Runs what is missing, seed by seed, and records it."""
    path = path_of(table, task)
    commit = subprocess.run(CODE, cwd=HERE.parent, capture_output=True).stdout.decode().strip()
    for seed, (cell, flags) in itertools.product(range(seeds), TABLES[table][2].items()):
        command = command_of(flags, seed, passed)
        if command in [run["command"] for run in records(path)] or (seed and flags == UNTRAINED):
            continue
        name = "-".join([commit, *command.replace("--", "").replace("/", "_").split()[1:]])
        print(f"== {table}, {cell}, seed {seed}: {command}", flush=True)
        line = finished(task).get(command) or run_cell(command, HERE.parent / "runs/tables" / name)
        if line is None:
            print("   another process is at it; run this again", flush=True)
        else:
            line = {"cell": cell, "seed": seed, "commit": commit} | line
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
    """The recorded runs of each cell that has some, by seed. Raises InputError for a mixture."""
    seeds, _, cells = TABLES[table]
    of_command = {run["command"]: run for run in records(path_of(table, task))}
    of = {}
    for cell, flags in cells.items():
        wanted = range(1 if flags == UNTRAINED else seeds)
        every = [of_command.get(command_of(flags, seed, passed)) for seed in wanted]
        of[cell] = {seed: run for seed, run in enumerate(every) if run}
    runs = [run for found in of.values() for run in found.values()]
    for key in ("teacher-model", "model", "device", "precision"):
        values = sorted({str(run.get(key) or "") for run in runs} - {""})  # fine-tuning: no teacher
        where = f"{path_of(table, task)}: its runs have the {key}"
        require(len(values) < 2, f"{where} {' or '.join(values)}; a table is of one alone")
    return {cell: found for cell, found in of.items() if found}


def accuracy_cell(key: str, found: dict[int, dict], base: dict[int, dict]) -> str:
    """Mean ± deviation of an accuracy over seeds and its paired difference from the reference."""
    values = {seed: 100 * run[key] for seed, run in found.items() if run[key] is not None}
    others = {seed: 100 * run[key] for seed, run in base.items() if run[key] is not None}
    pairs = [values[seed] - others[seed] for seed in values if seed in others]
    text = spread(list(values.values())) if values else ""
    if found is base or not pairs:
        return text
    p = f", p {exact_p(pairs):.3f}" if len(pairs) >= 6 else ""
    return f"{text} ({statistics.mean(pairs):+.1f}{p})"


def judge_cells(found: dict[int, dict]) -> list[str]:
    """What the last D makes of validation questions: pairs in order, and mean s of each kind."""
    lines = [run["iterations"][-1] for run in found.values()]
    columns = [[line["pair"] for line in lines]]
    columns += [[line["s"][kind] for line in lines] for kind in ("positives", "teacher", "student")]
    known = [[value for value in column if value is not None] for column in columns]
    return [f"{statistics.mean(column):.2f}" if column else "" for column in known]


def print_table(table: str, task: str, passed: list[str]) -> None:
    """Markdown: accuracies of the last student and what belongs to them; the paper's numbers where
    it has some for the task and the student that were run."""
    _, reference, flags = TABLES[table]
    of = runs_of(table, task, passed)
    if not of:
        return print(f"\n{table}: no run of these commands is recorded")
    runs = [run for found in of.values() for run in found.values()]
    student = Path(runs[0].get("model", "demo")).name  # of all
    paper = PAPER.get((Path(task).name, student), {}).get(table, {})
    columns = 4 if table in WHOLE else 2
    names = [table, *TITLES[:columns]]
    if table == JUDGED:
        names += ["pairs in order", "s: positives", "minority", "student's"]
    names += ["seeds", *([f"*paper: {task}, {student}*"] if paper else [])]
    print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for cell, found in of.items():
        row = [cell]
        for key in SCORES[:columns]:
            compared = key.endswith("_last") and flags[cell] != UNTRAINED
            base = of.get(reference, {}) if compared else {}
            row.append(accuracy_cell(key, found, base))
        if table == JUDGED:
            row += judge_cells(found)
        row.append(str(len(found)))
        if paper:
            row.append(f"*{paper[cell]}*" if cell in paper else "")
        print("| " + " | ".join(row) + " |")


def print_paper() -> None:
    """Markdown: the paper's label accuracies, and the commands that make the same cells here."""
    for (task, student), of in PAPER.items():
        for table, cells in of.items():
            print(f"\n| *paper: {task}, {student}* | {table} | python |\n|---|---|---|")
            for cell, value in cells.items():
                flags = f"--task {task} --model {student} --teacher URL {CELLS[table].get(cell)}"
                command = f"qcrd.py {flags}".strip() if cell in CELLS[table] else "not built here"
                print(f"| {cell} | *{value}* | {command} |")


def print_terms(table: str, task: str, passed: list[str]) -> None:
    """Markdown: share of the negative terms at 0 by iteration, and of the student's negatives that
    end in the right answer; percent, means over seeds."""
    of = runs_of(table, task, passed)
    numbers = {x["iteration"] for r in of.values() for run in r.values() for x in run["iterations"]}
    count = max(numbers, default=0)
    heading = " | ".join(str(t) for t in range(1, count + 1))
    print(f"\n| {table}: terms at 0, iteration | {heading} | the student's own that are right |")
    print("|---" * (count + 2) + "|")
    for cell, found in of.items():
        lines = [line for run in found.values() for line in run["iterations"]]
        row = [[x["zero"] for x in lines if x["iteration"] == t] for t in range(1, count + 1)]
        row.append([line["right"] for line in lines])
        values = [[100 * value for value in column if value is not None] for column in row]
        means = [f"{statistics.mean(column):.0f}" if column else "" for column in values]
        print(f"| {cell} | " + " | ".join(means) + " |")


def main() -> int:
    """-> exit code, 2 after one line for what comes from outside."""
    return t5.run_program(run_command)


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--print", action="store_true", help="run nothing; flags as they ran")
    parser.add_argument("--paper", action="store_true", help="the paper's numbers, commands")
    parser.add_argument("--terms", action="store_true", help="the negative terms too")
    how = {"type": int, "choices": range(1, 11), "metavar": "N", "default": 10}
    parser.add_argument("--seeds", **how, help="fewer than the table's own number")
    for name in SETTING:
        parser.add_argument(f"--{name}", default="", help="passed on to qcrd.py")
    args = parser.parse_args()
    args.task = "" if args.task == "demo" else args.task
    given = {f"--{name}": vars(args)[name.replace("-", "_")] for name in SETTING}
    passed = [word for pair in given.items() if pair[1] for word in pair]
    if args.paper:
        return print_paper()
    for table in set(args.tables) - set(TABLES):
        parser.error(f"{table}: no table; there are {', '.join(TABLES)}")
    for table in args.tables:
        where = (table, args.task or "demo", passed + ([] if args.task else DEMO.get(table, [])))
        if not args.print:
            run_table(*where, min(args.seeds, TABLES[table][0]))
        print_table(*where)
        if args.terms:
            print_terms(*where)
    for table, (seeds, reference, cells) in TABLES.items() if not args.tables else ():
        print(f"{table}: {seeds} seeds, differences from {reference}")
        for cell, flags in cells.items():
            print(f"  {cell}: python", *command_of(flags, 0, DEMO.get(table, [])).split()[:-2])


if __name__ == "__main__":
    sys.exit(main())
