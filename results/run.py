"""The tables' cells, run one after the other: each is qcrd.py with some flags and a seed, on one thread. Stop and start it at will.

    python results/run.py --list                          # the tables, their cells and commands
    python results/run.py --run main                      # run what is missing of a table, then print it
    python results/run.py --run svamp --teacher URL       # ask this teacher
    python results/run.py --table main                    # print what is there; --table all prints every table of results/README.md

What the tables need of a finished cell (metrics.jsonl, result.json) is kept in results/metrics/<flags>-<seed>/, and a cell that has it is
skipped; its run is runs/results-<flags>-<seed>/. To run one again, delete both. A cell that was stopped is resumed. One thread a cell: two
processes may run side by side, also on one table, and the numbers do not depend on how many cores there are.
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
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import qcrd  # noqa: E402

METHODS = {"finetune": "--method finetune", "dss": "--method dss", "qcrd": ""}
# What all cells of a table share, by the name that it has in results/metrics/.
SHARED = {
    # 12.8 passes over the 720 questions, by the student that results/svamp_student.py makes
    "svamp": "--task svamp --model weights/svamp-student --lr 1e-3 --discriminator-lr 1e-3 --rationale-tokens 128 --iterations 12 --iteration-steps 12 "
             "--discriminator-pretrain 100 --discriminator-steps 10",
    "svamp-demo": "--task svamp --model demo --iterations 8 --iteration-steps 12",      # 8.5 passes, by the demo's student
    "short": "--iterations 8 --iteration-steps 10",                                     # of the studies: 80 steps; the demo's default are 285
}
SHORT = SHARED["short"]

# table -> (flags of all its cells, seeds, the cell that the others are compared with, {cell: flags})
TABLES = {
    "main": ("", 5, "dss", METHODS | {"no vote": "--no-vote", "no negatives": "--no-negatives", "no discriminator": "--no-discriminator"}),
    "ten": ("", 10, "dss", {"dss": METHODS["dss"], "qcrd": ""}),     # the main table's question again, with more seeds
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
    """Where a cell's results are kept: its flags as a name, those that a table shares under the name of SHARED."""
    name = flags.replace(f"-{seed}/student", "")                     # of --negative-model: the seed stands at the end
    for short, text in SHARED.items():
        name = name.replace(text, short)
    return HERE / "metrics" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-') or 'qcrd'}-{seed}"


def command_of(flags: str, seed: int) -> str:
    return " ".join(["qcrd.py", *flags.split(), "--seed", str(seed)])


def stop(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def read_result(flags: str, seed: int) -> dict | None:
    """What is kept of a cell, None where it has not been run. Errors: one line where another command made it or the file is damaged."""
    path = keep(flags, seed) / "result.json"
    try:
        result = json.loads(path.read_text("utf-8"))
        if result["command"] != command_of(flags, seed):
            stop(f"{path}: is of another command ({result['command']}); move its folder away")
        return result
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        stop(f"{path}: cannot be read; delete its folder, and --run brings it back")


def cells(table: str, most: int = 99):
    """(cell, flags with the seed filled in, seed) of a table, seed by seed, so that an early stop leaves whole seeds; at most `most` seeds."""
    common, seeds, _, named = TABLES[table]
    for seed in range(min(seeds, most)):
        for cell, flags in named.items():
            yield cell, f"{common} {flags}".strip().format(seed=seed), seed


def train(flags: str, seed: int, teacher: list[str], wait: bool = False) -> Path | None:
    """The finished run of a cell: as it is there, resumed, or new; None while another process is at it, unless told to wait."""
    command, folder = command_of(flags, seed), Path("runs", f"results-{keep(flags, seed).name}")
    folder.parent.mkdir(exist_ok=True)
    with open(f"{folder}.lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        lock.seek(0)
        if lock.read() != command or not (folder / "config.json").exists():                    # left by other flags, or before it began
            shutil.rmtree(folder, ignore_errors=True)
            lock.truncate(0)
            print(command, end="", file=lock, flush=True)
        if not (folder / "result.json").exists():
            how = ["--resume", str(folder)] if folder.exists() else [*command.split()[1:], *teacher, "--run", folder.name]
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            # The child holds the lock too: should this process be killed, nobody else begins while the child goes on.
            child = subprocess.Popen([sys.executable, qcrd.__file__, *how], stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()],
                                     env=os.environ | {"OMP_NUM_THREADS": "1"})
            try:
                code = child.wait()
            except KeyboardInterrupt:                                # it has the signal too: it finishes its step and writes
                code = child.wait() or 130
            if code:
                sys.exit(code)                                       # it has said why
            if "--resume" not in how:                                # the processor's minutes: what else the machine does is not in them
                result = json.loads((folder / "result.json").read_text("utf-8"))
                minutes = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before) / 60
                qcrd.write_json(folder / "result.json", result | {"cpu_minutes": round(minutes, 2)})
        return folder


def run(table: str, seeds: int, teacher: list[str]) -> None:
    for cell, flags, seed in cells(table, seeds):
        if read_result(flags, seed):
            continue
        if "--negative-source fixed" in flags:
            train(METHODS["dss"], seed, [], wait=True)               # whose student it is
        start, target = time.time(), keep(flags, seed)
        if not (folder := train(flags, seed, teacher)):
            print(f"{table}, {cell}, seed {seed}: left to another process that is at it", flush=True)
            continue
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        result = json.loads((folder / "result.json").read_text("utf-8")) | {
            "command": command_of(flags, seed), "rationales_right": rationales_right(folder)}
        target.mkdir(parents=True, exist_ok=True)
        qcrd.write_text(target / "metrics.jsonl", kept_lines(lines, SHORT in flags))
        qcrd.write_text(target / "result.json", json.dumps(result) + "\n")
        shutil.rmtree(folder / "snapshots", ignore_errors=True)      # the student stays: other cells and results/judge.py use it
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{table}, {cell}, seed {seed}: {result['test_accuracy']:.1%}, {(time.time() - start) / 60:.1f} min", flush=True)


def shorter(x):
    """Numbers to four digits, whole ones without a point: all runs together stay below a megabyte."""
    if isinstance(x, float):
        return int(x) if x == int(x) else float(f"{x:.4g}")
    return {k: shorter(v) for k, v in x.items()} if isinstance(x, dict) else [shorter(v) for v in x] if isinstance(x, list) else x


def kept_lines(lines: list[dict], study: bool) -> str:
    """metrics.jsonl as it is kept: shorter, without counts of negatives where there were none; a study's histograms of its last iteration."""
    for m in lines:
        if not m["negatives"]["sampled"]:
            del m["negatives"]
    for m in lines[:-1] if study else []:
        for scores in m["scores"].values():
            scores.pop("histogram", None)
    return "".join(json.dumps(shorter(m), separators=(",", ":")) + "\n" for m in lines)


def rationales_right(folder: Path) -> float:
    """The part of the test questions whose rationale, read as a teacher's sample is, ends in the right number."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    return sum(qcrd.is_right(qcrd.read_sample(row["rationale"], row["input"], "number")[1] or "", row["gold"], "number") for row in rows) / len(rows)


def p_value(differences: list[float]) -> float:
    """Two-sided p of a mean of 0, by all sign flips of the paired differences: exact, no normality assumed; never below 2 / 2^n."""
    mean, n = abs(sum(differences)), len(differences)
    flips = [abs(sum(d if mask >> i & 1 else -d for i, d in enumerate(differences))) for mask in range(2**n)]
    return sum(f >= mean - 1e-12 for f in flips) / 2**n


def finished(table: str, seeds: int = 99) -> dict[str, dict[int, dict]]:
    """cell -> seed -> its result, with `lines`, those of metrics.jsonl."""
    found: dict[str, dict[int, dict]] = {}
    for cell, flags, seed in cells(table, seeds):
        if result := read_result(flags, seed):
            lines = (keep(flags, seed) / "metrics.jsonl").read_text("utf-8").splitlines()
            found.setdefault(cell, {})[seed] = result | {"lines": [json.loads(x) for x in lines]}
    return found


def show(table: str, seeds: int) -> None:
    """A Markdown table: mean ± standard deviation over seeds, the paired difference from the table's reference, and what the loss saw:
    rationales that end in the right number, and negative terms that were 0 in the last three iterations."""
    found, reference = finished(table, seeds), TABLES[table][2]
    print(f"| {table} | test accuracy | seeds | against {reference}, paired by seed | rationales right | negative terms at 0 | minutes of one core |\n"
          "|---|---|---|---|---|---|---|" if found else f"{table}: not run yet")

    def mean(values: list[float], form: str) -> str:
        return format(statistics.mean(values), form) if values else ""

    for cell, results in found.items():
        accuracy = [100 * r["test_accuracy"] for r in results.values()]
        paired = [100 * (r["test_accuracy"] - found[reference][s]["test_accuracy"]) for s, r in results.items() if s in found.get(reference, {})]
        against = f"{statistics.mean(paired):+.1f} (p {p_value(paired):.2f})" if paired and cell != reference else ""
        spread = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
        right = [r["rationales_right"] for r in results.values() if "finetune" not in cell and "rationales_right" in r]
        zero = [m["zero_neg"] for r in results.values() for m in r["lines"][-3:] if m["l_neg"] or m["zero_neg"]]
        minutes = [r["cpu_minutes"] for r in results.values() if "cpu_minutes" in r]
        print(f"| {cell} | {mean(accuracy, '.1f')}{spread} % | {len(accuracy)} | {against} | {mean(right, '.1%')} | {mean(zero, '.0%')} | {mean(minutes, '.1f')} |")


def show_cost() -> None:
    """Seconds of an iteration by stage in the main table's qcrd runs, before and after the student's own negatives begin."""
    lines = [m for r in finished("main").get("qcrd", {}).values() for m in r["lines"]]
    print("| stage | iterations 1 to 5 | iterations 6 to 15 |\n|---|---|---|")
    for stage in ("negatives", "discriminator", "steps", "rest", "all"):
        parts = [[m["seconds"][stage] for m in lines if (m["iteration"] > 5) == late] for late in (False, True)]
        print(f"| {stage} | " + " | ".join(f"{statistics.median(x):.1f} s" if x else "" for x in parts) + " |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print every cell and its command")
    what.add_argument("--run", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    what.add_argument("--table", choices=[*TABLES, "cost", "all"], metavar="TABLE", help="one of those, cost, or all")
    p.add_argument("--seeds", type=int, default=99, help="at most so many (default: as many as the table has)")
    p.add_argument("--teacher", help="with --run: qcrd.py's --teacher")
    args = p.parse_args()
    os.chdir(HERE.parent)                                            # qcrd.py's runs/ and weights/ are named from there
    if args.list:
        for table in TABLES:
            for cell, flags, seed in cells(table, 1):
                print(f"{table:16s} {cell:36s} python {command_of(flags, seed)}")
    if args.run:
        run(args.run, args.seeds, ["--teacher", args.teacher] if args.teacher else [])
    for table in [*TABLES, "cost"] if args.table == "all" else filter(None, [args.run or args.table]):
        if table == "cost":
            show_cost()
        else:
            show(table, args.seeds)
        print(end="\n" * (args.table == "all"))


if __name__ == "__main__":
    main()
