"""The tables' cells, run one after the other: each is qcrd.py with some flags and a seed, on one thread. Stop and start it at will.

    python results/run.py --list                          # the tables, their cells and commands
    python results/run.py --run main                      # run what is missing of a table, then print it
    python results/run.py --run svamp --teacher URL       # other flags go to qcrd.py
    python results/run.py --table main                    # print what is there; --table all prints every table of results/README.md

A finished cell's metrics.jsonl and result.json lie in results/metrics/<flags>-<seed>/; a cell that has them is skipped, one that was
stopped is resumed. One thread a cell: two may run side by side, and the numbers do not depend on how many cores there are.
"""
import argparse
import fcntl
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import qcrd  # noqa: E402

METHODS = {"finetune": "--method finetune", "dss": "--method dss", "qcrd": ""}
# What all cells of a table share, by the name that it has in results/metrics/.
SHARED = {
    # 12 passes over the 720 questions, by the student that results/svamp_student.py makes
    "svamp": "--task svamp --model weights/svamp-student --lr 1e-3 --discriminator-lr 1e-3 --rationale-tokens 128 --iterations 12 --iteration-steps 12 "
             "--discriminator-pretrain 100 --discriminator-steps 10",
    "svamp-demo": "--task svamp --model demo --iterations 8 --iteration-steps 12",      # 8 passes, by the demo's student
    "short": "--iterations 8 --iteration-steps 10",                                     # of the studies: 80 steps; the demo's default are 285
}
SHORT = SHARED["short"]

# table -> (flags of all its cells, seeds, the cell that the others are compared with, {cell: flags})
TABLES = {
    "main": ("", 5, "dss", METHODS | {"no vote": "--no-vote", "no negatives": "--no-negatives", "no discriminator": "--no-discriminator"}),
    "svamp": (SHARED["svamp"], 3, "dss", METHODS | {"qcrd, negative min": "--negative min"}),
    "svamp-demo": (SHARED["svamp-demo"], 3, "dss", METHODS | {"qcrd": "--discriminator-pretrain 100 --discriminator-steps 10"}),
    "temperature": (SHORT, 3, "1.5", {"0.7": "--student-temperature 0.7", "1.0": "--student-temperature 1.0", "1.5": "",
                                      "2.0": "--student-temperature 2.0"}),
    "lag": (SHORT, 3, "lag 5", {"lag 1": "--lag 1", "lag 3": "--lag 3", "lag 5": "", "lag 7": "--lag 7",
                                "a fixed student's, trained with dss": "--negative-source fixed --negative-model runs/results-method-dss-{seed}/student"}),
    "schedules": (SHORT, 3, "1.5", {"1.5": "", "2.0 falling to 0.7": "--student-temperature 2.0:0.7", "0.7 rising to 2.0": "--student-temperature 0.7:2.0"}),
    "schemes": (SHORT, 3, "min-max", {"min-max": "", "min-min": "--negative min", "min-mean": "--negative mean", "mean-mean": "--positive mean --negative mean",
                                      "max-min": "--positive max --negative min"}),
    "samples": (SHORT, 3, "5", {"1": "--samples 1", "3": "--samples 3", "5": "", "10": "--samples 10",
                                    "1, greedy": "--samples 1 --teacher-temperature 0"}),
    "discriminator": (SHORT, 3, "each iteration", {"each iteration": "", "each fifth": "--discriminator-every 5", "never": "--discriminator-every 0",
                                                   **{f"{p:.0%} of its labels flipped": f"--discriminator-noise {p}" for p in (0.1, 0.3, 0.5)},
                                                   "on the student's encoder": "--discriminator shared"}),
    "labels": ("--labels teacher", 3, "dss", METHODS),
    "data": (SHORT, 3, "100% of the questions", {f"{f:.0%} of the questions": f"--fraction {f}" for f in (0.25, 0.5, 0.75)} | {"100% of the questions": ""}),
    "student samples": (SHORT, 3, "1", {"1": "", "3": "--student-samples 3"}),
}


def keep(flags: str, seed: int) -> Path:
    name = flags.replace(f"-{seed}/student", "")
    for short, text in SHARED.items():
        name = name.replace(text, short)
    return HERE / "metrics" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-') or 'qcrd'}-{seed}"


def cells(table: str, most: int = 99):
    """(cell, flags with the seed filled in, seed) of a table, seed by seed, so that an early stop leaves whole seeds; at most `most` seeds."""
    common, seeds, _, named = TABLES[table]
    for seed in range(min(seeds, most)):
        for cell, flags in named.items():
            yield cell, f"{common} {flags}".strip().format(seed=seed), seed


def train(folder: Path, flags: list[str]) -> bool:
    """One run of qcrd.py on one thread, new or resumed -> whether it was resumed."""
    resumed = (folder / "config.json").exists()
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)
    how = ["--resume", str(folder)] if resumed else [*flags, "--run", folder.name]
    subprocess.run([sys.executable, str(HERE.parent / "qcrd.py"), *how], check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return resumed


def run_cell(flags: str, seed: int, extra: list[str]) -> float:
    """Train, then keep what the tables need -> test accuracy."""
    target, given = keep(flags, seed), [*flags.split(), "--seed", str(seed)]
    folder, fixed = Path("runs") / f"results-{target.name}", re.search(r"--negative-model (\S+)/student", flags)
    if fixed and not Path(fixed[1], "result.json").exists():         # a clone has its metrics, but not its weights
        train(Path(fixed[1]), [*METHODS["dss"].split(), "--seed", str(seed)])
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    resumed = train(folder, [*given, *extra])
    result = json.loads((folder / "result.json").read_text()) | {"command": " ".join(["qcrd.py", *given]), "rationales_right": rationales_right(folder)}
    if not resumed:                                                  # the processor's minutes: what else the machine does is not in them
        result["cpu_minutes"] = round((resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - cpu) / 60, 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    target.mkdir(parents=True, exist_ok=True)
    (target / "metrics.jsonl").write_text("".join(json.dumps(shorter(line), separators=(",", ":")) + "\n" for line in lines))
    (target / "result.json").write_text(json.dumps(result) + "\n")
    shutil.rmtree(folder / "snapshots", ignore_errors=True)          # the student stays: other cells and results/judge.py use it
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result["test_accuracy"]


def run(table: str, seeds: int, extra: list[str]) -> None:
    for cell, flags, seed in cells(table, seeds):
        target, start = keep(flags, seed), time.time()
        Path("runs").mkdir(exist_ok=True)
        with open(f"runs/results-{target.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue                                             # another process is at it
            if not (target / "result.json").exists():
                accuracy = run_cell(flags, seed, extra)
                print(f"{table}, {cell}, seed {seed}: {accuracy:.1%}, {(time.time() - start) / 60:.1f} min", flush=True)


def shorter(x):
    """Numbers to four digits, whole ones without a point: all runs together stay below a megabyte."""
    if isinstance(x, float):
        return int(x) if x == int(x) else float(f"{x:.4g}")
    return {k: shorter(v) for k, v in x.items()} if isinstance(x, dict) else [shorter(v) for v in x] if isinstance(x, list) else x


def rationales_right(folder: Path) -> float:
    """The part of the test questions whose rationale, read as a teacher's sample is, ends in the right number."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    return sum(qcrd.is_right(qcrd.read_sample(row["rationale"], row["input"], "number")[1] or "", row["gold"], "number") for row in rows) / len(rows)


def p_value(differences: list[float]) -> float:
    """Two-sided p of a mean of 0, by all sign flips of the paired differences: exact, no normality assumed; never below 2 / 2^n."""
    mean, n = abs(sum(differences)), len(differences)
    flips = [abs(sum(d if mask >> i & 1 else -d for i, d in enumerate(differences))) for mask in range(2**n)]
    return sum(f >= mean - 1e-12 for f in flips) / 2**n


def finished(table: str) -> dict[str, dict[int, dict]]:
    """cell -> seed -> its result, with `lines`, those of metrics.jsonl."""
    found: dict[str, dict[int, dict]] = {}
    for cell, flags, seed in cells(table):
        if (keep(flags, seed) / "result.json").exists():
            lines = (keep(flags, seed) / "metrics.jsonl").read_text().splitlines()
            found.setdefault(cell, {})[seed] = json.loads((keep(flags, seed) / "result.json").read_text()) | {"lines": [json.loads(x) for x in lines]}
    return found


def show(table: str) -> None:
    """A Markdown table: mean ± standard deviation over seeds, the paired difference from the table's reference, and what the loss saw."""
    found, reference = finished(table), TABLES[table][2]
    print(f"| {table} | test accuracy | seeds | against {reference}, paired by seed | rationales right | negative terms at 0 | minutes of one core |\n"
          "|---|---|---|---|---|---|---|")
    for cell, results in found.items():
        accuracy = [100 * r["test_accuracy"] for r in results.values()]
        paired = [100 * (r["test_accuracy"] - found[reference][s]["test_accuracy"]) for s, r in results.items() if s in found.get(reference, {})]
        against = f"{statistics.mean(paired):+.1f} (p {p_value(paired):.2f})" if paired and cell != reference else ""
        spread = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
        right = [r["rationales_right"] for r in results.values() if "finetune" not in cell and "rationales_right" in r]
        zero = [m["zero_neg"] for r in results.values() for m in r["lines"][-3:] if m["l_neg"] or m["zero_neg"]]
        minutes = [r["cpu_minutes"] for r in results.values() if "cpu_minutes" in r]
        print(f"| {cell} | {statistics.mean(accuracy):.1f}{spread} % | {len(accuracy)} | {against} "
              f"| {f'{statistics.mean(right):.1%}' if right else ''} | {f'{statistics.mean(zero):.0%}' if zero else ''} "
              f"| {f'{statistics.mean(minutes):.1f}' if minutes else ''} |")


def show_cost() -> None:
    """Seconds of an iteration by stage in the main table's qcrd runs, before and after the student's own negatives begin."""
    lines = [m for r in finished("main").get("qcrd", {}).values() for m in r["lines"]]
    print("| stage | iterations 1 to 5 | iterations 6 to 15 |\n|---|---|---|")
    for stage in ("negatives", "discriminator", "steps", "rest", "all"):
        parts = [[m["seconds"][stage] for m in lines if (m["iteration"] > 5) == late] for late in (False, True)]
        print(f"| {stage} | " + " | ".join(f"{statistics.median(x):.1f} s" if x else "" for x in parts) + " |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", choices=TABLES, metavar="TABLE")
    p.add_argument("--table", choices=[*TABLES, "cost", "all"], metavar="TABLE")
    p.add_argument("--seeds", type=int, default=99, help="at most so many (default: as many as the table has)")
    p.add_argument("--list", action="store_true")
    args, extra = p.parse_known_args()
    if args.list:
        for table in TABLES:
            for cell, flags, seed in cells(table):
                if seed == 0:
                    print(f"{table:16s} {cell:36s} python qcrd.py {flags}")
    if args.run:
        run(args.run, args.seeds, extra)
    for table in [*TABLES, "cost"] if args.table == "all" else [args.run or args.table]:
        if table == "cost":
            show_cost()
        elif table:
            show(table)
        print(end="\n" * (args.table == "all"))


if __name__ == "__main__":
    main()
