"""The tables' cells, run one after the other: each is qcrd.py with some flags and a seed. Stop and start it at will.

    python results/run.py --list                       # the cells and their commands
    python results/run.py --run main --seeds 5         # run what is missing of a table, then print it
    python results/run.py --table main                 # print what is there

A cell's metrics.jsonl and result.json are copied to results/metrics/<table>/<cell>-<seed>/ when it is done; a cell that has them is skipped.
"""
import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLES = {
    "main": {"finetune": "--method finetune", "dss": "--method dss", "qcrd": ""},
    "ablations": {"qcrd": "", "no vote": "--no-vote", "no negatives": "--no-negatives", "no discriminator": "--no-discriminator",
                  "labels of the teacher": "--labels teacher", "finetune, labels of the teacher": "--method finetune --labels teacher"},
    "temperature": {f"student temperature {t}": f"--student-temperature {t}" for t in ("0.7", "1.0", "1.5", "2.0", "2.0:1.0")},
    "lag": {f"lag {n}": f"--lag {n}" for n in (1, 3, 5, 7)},
    "samples": {f"{n} samples": f"--samples {n}" for n in (1, 3, 5, 10)},
    "discriminator": {"every iteration": "", "every fifth": "--discriminator-every 5", "never": "--discriminator-every 0",
                      **{f"{p:.0%} of its labels flipped": f"--discriminator-noise {p}" for p in (0.1, 0.3, 0.5)}},
    "schemes": {f"{p}-{n}": f"--positive {p} --negative {n}" for p, n in (("min", "max"), ("mean", "mean"), ("max", "min"), ("min", "min"))},
    "data": {f"{f:.0%} of the questions": f"--fraction {f}" for f in (0.25, 0.5, 0.75, 1.0)},
}


def folder(table: str, cell: str, seed: int) -> Path:
    return HERE / "metrics" / table / f"{cell.replace(' ', '-').replace('%', '').replace(':', '-').replace(',', '')}-{seed}"


def run(table: str, seeds: int, extra: list[str]) -> None:
    """Every missing cell of the table, seed by seed, so that an early stop leaves whole seeds."""
    for seed in range(seeds):
        for cell, flags in TABLES[table].items():
            keep = folder(table, cell, seed)
            if (keep / "result.json").exists():
                continue
            name = f"results-{table}-{keep.name}"
            shutil.rmtree(Path("runs") / name, ignore_errors=True)       # of a stopped cell
            start = time.time()
            command = [sys.executable, str(HERE.parent / "qcrd.py"), *flags.split(), "--seed", str(seed), "--run", name, *extra]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            keep.mkdir(parents=True, exist_ok=True)
            result = json.loads((Path("runs") / name / "result.json").read_text())
            (keep / "metrics.jsonl").write_bytes((Path("runs") / name / "metrics.jsonl").read_bytes())
            (keep / "result.json").write_text(json.dumps(result | {"minutes": round((time.time() - start) / 60, 2), "command": " ".join(command[1:])}))
            shutil.rmtree(Path("runs") / name)
            print(f"{table}, {cell}, seed {seed}: {result['test_accuracy']:.1%}, {(time.time() - start) / 60:.1f} min", flush=True)


def p_value(differences: list[float]) -> float:
    """Two-sided p of a mean of 0, by all sign flips of the paired differences: exact, and no normality assumed."""
    mean, n = abs(sum(differences)), len(differences)
    flips = [abs(sum(d if mask >> i & 1 else -d for i, d in enumerate(differences))) for mask in range(2**n)]
    return sum(f >= mean - 1e-12 for f in flips) / 2**n


def show(table: str) -> None:
    """A Markdown table: mean ± standard deviation over seeds, and the paired difference from dss where it was run."""
    found = {cell: {int(p.parent.name.rsplit("-", 1)[1]): json.loads(p.read_text()) for p in
                    folder(table, cell, 0).parent.glob(folder(table, cell, 0).name[:-2] + "-[0-9]*/result.json")} for cell in TABLES[table]}
    print("| | test accuracy | seeds | against dss, same seeds | minutes a run |\n|---|---|---|---|---|")
    for cell, results in found.items():
        accuracy = [r["test_accuracy"] * 100 for _, r in sorted(results.items())]
        if accuracy:
            paired = [results[s]["test_accuracy"] * 100 - r["test_accuracy"] * 100 for s, r in sorted(found.get("dss", {}).items()) if s in results]
            against = f"{statistics.mean(paired):+.1f} (p {p_value(paired):.2f})" if paired and cell != "dss" else ""
            spread = statistics.stdev(accuracy) if len(accuracy) > 1 else math.nan
            print(f"| {cell} | {statistics.mean(accuracy):.1f} ± {spread:.1f} % | {len(accuracy)} | {against} "
                  f"| {statistics.mean(r['minutes'] for r in results.values()):.1f} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", choices=TABLES, metavar="TABLE")
    p.add_argument("--table", choices=TABLES, metavar="TABLE")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--list", action="store_true")
    args, extra = p.parse_known_args()
    if args.list:
        for table, cells in TABLES.items():
            for cell, flags in cells.items():
                print(f"{table:14s} {cell:34s} python qcrd.py {flags}")
    if args.run:
        run(args.run, args.seeds, extra)
    if args.run or args.table:
        show(args.run or args.table)


if __name__ == "__main__":
    main()
