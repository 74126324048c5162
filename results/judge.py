"""The paper's comparison of rationales: a judge model says which of two runs explains better.

    python results/judge.py DSS_RUN QCRD_RUN                        # greedy rationales, τ = 0
    python results/judge.py DSS_RUN QCRD_RUN --temperature 0.7      # sampled anew

50 test questions are drawn by seed. The judge, any server with OpenAI's API, sees a question, its
right answer and two explanations, but not whose they are. Each pair is judged in both orders: a run
that is preferred in both is better, else both count as good. Answers are kept in data/judge/. The
key comes from OPENAI_API_KEY. The paper's prompt is not known; this one is ours.
"""

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch_data  # noqa: E402
import qcrd  # noqa: E402
import t5  # noqa: E402
from t5 import require  # noqa: E402

PROMPT = """Compare two explanations of the answer to a question. The better one has right steps
that follow from the question and lead to the right answer, whatever its length, style or place.
Reason in a sentence or two, then end with "Verdict: 1", "Verdict: 2" or "Verdict: both"."""
VERDICT = re.compile(r"verdict\W*(1|2|both)\W*$|\A\W*(1|2|both)\W*\Z", re.IGNORECASE | re.MULTILINE)
# Of the verdicts of both orders; by order: the same place was preferred twice, both are good.
OUTCOMES = {"12": "first", "21": "second", "11": "by order", "22": "by order"}
# What the paper prints, judged by GPT-3.5 on 50 questions: DSS better, both good, QCRD better.
PAPER = {
    0.0: {"svamp": (21, 0, 29), "cqa": (19, 6, 25), "anli1": (26, 1, 23), "esnli": (17, 11, 22)},
    0.7: {"svamp": (22, 0, 28), "cqa": (20, 6, 24), "anli1": (25, 1, 24), "esnli": (14, 3, 33)},
}


HERE_AND_NOW = {"device": ""}  # the device is chosen anew: a run made on a GPU is read on a CPU


def read_lines(path: Path) -> list[dict]:
    """The records of a JSONL file, at least one. Raises InputError."""
    try:
        records = [json.loads(line) for line in open(path, encoding="utf-8")]
    except (OSError, ValueError):
        records = []
    require(records, f"{path}: not there, empty or damaged")
    return records


def load_run(folder: Path) -> qcrd.Run:
    """A finished run's selected student and discriminator. Raises InputError."""
    return qcrd.load_trained(folder, qcrd.read_config(folder, HERE_AND_NOW))


def sample_rationales(folder: Path, rows: list[dict], temperature: float, seed: int) -> list[str]:
    """What a run's student writes at a temperature for the questions of `rows`."""
    run = load_run(folder)
    student, longest = run.student, run.config.rationale_tokens
    require(run.config.method != "single", f"{folder}: --method single has no task of explaining")
    examples = [fetch_data.Example(row["input"], "") for row in rows]
    questions = [student.question(example, f"judge {example.input}") for example in examples]
    seeds = [qcrd.derive_seed("judge", seed, q.place) for q in questions]
    written = student.write(student.explain_prefix, questions, longest, temperature, seeds)
    return [student.tokenizer.decode(ids) for ids in written]


def messages(row: dict, first: str, second: str) -> list[dict]:
    """A judge's prompt for one order of a pair."""
    text = f"Question: {row['input']}\nRight answer: {row['gold']}\n\nExplanation 1: {first}\n\n"
    user = {"role": "user", "content": f"{text}Explanation 2: {second}"}
    return [{"role": "system", "content": PROMPT}, user]


def ask(judge: qcrd.Teacher, prompts: list[list[dict]]) -> list[str]:
    """The judge's answer to each prompt, from the file of answers or asked for now; "": none."""
    judge.cache = fetch_data.root() / "data/judge/answers.jsonl"
    names = [judge.sample_id(prompt) for prompt in prompts]
    kept = qcrd.ask_teacher(judge, dict(zip(names, prompts)))
    return [kept.get(name, {}).get(0, ("", ""))[0] for name in names]


def verdict(answer: str) -> str | None:
    """ "1", "2" or "both": an answer's last verdict, or all that it says; None: unreadable."""
    found = VERDICT.findall(answer[-2000:])
    return "".join(found[-1]).lower() if found else None


def compare(folders: list[Path], judge: qcrd.Teacher, count: int, tau: float, seed: int) -> Counter:
    """How many questions have which outcome; "by order" are both good too."""
    a, b = ({row["input"]: row for row in read_lines(f / "predictions.jsonl")} for f in folders)
    common = sorted(q for q in a.keys() & b.keys() if "rationale" in a[q] and "rationale" in b[q])
    require(common, f"{folders[0]} and {folders[1]}: no question that both explain")
    rows = random.Random(seed).sample([a[q] for q in common], min(count, len(common)))
    texts = [[of[row["input"]]["rationale"] for row in rows] for of in (a, b)]
    if tau:
        texts = [sample_rationales(folder, rows, tau, seed) for folder in folders]
    orders = (texts, texts[::-1])
    prompts = [messages(row, *pair) for order in orders for row, *pair in zip(rows, *order)]
    said = [verdict(answer) for answer in ask(judge, prompts)]
    pairs = zip(said[: len(rows)], said[len(rows) :])
    return Counter("unreadable" if None in p else OUTCOMES.get("".join(p), "both") for p in pairs)


def main() -> int:
    """-> exit code, 2 after one line for what comes from outside."""
    return t5.run_program(run_command)


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("runs", nargs=2, type=Path, metavar="RUN", help="DSS's, then QCRD's")
    add("--judge", default="", help="URL (default: OPENAI_BASE_URL, or OpenAI where a key is set)")
    add("--judge-model", default="", help="gpt-3.5-turbo at OpenAI, else the first one listed")
    add("--questions", type=int, default=50, help="two requests each (default: 50)")
    add("--temperature", type=float, default=0.0, help="the students'; 0: predictions.jsonl")
    add("--seed", type=int, default=0, help="which questions, and the students' samples")
    args = parser.parse_args()
    tau, (first, second) = args.temperature, args.runs
    require(args.questions > 0 and tau >= 0, "--questions, --temperature: too small")
    named = args.judge or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_KEY")
    require(named, "no judge: name --judge URL, or set OPENAI_API_KEY")
    task = qcrd.read_config(second, HERE_AND_NOW).task
    given = {"teacher": args.judge, "teacher_model": args.judge_model, "samples": 1}
    judge = qcrd.connect_teacher(qcrd.Config("judge", teacher_temperature=0.0, **given))
    counts = compare(args.runs, judge, args.questions, tau, args.seed)
    good = counts["both"] + counts["by order"]
    print(f"{task}, τ = {tau:g}, {judge.config.teacher_model}: {first.name} better ", end="")
    print(f"{counts['first']} / both good {good} / {second.name} better {counts['second']}")
    print(f"  both good by order alone: {counts['by order']}; unreadable: {counts['unreadable']}")
    if paper := PAPER.get(tau, {}).get(task):
        print("  the paper, 50 questions, GPT-3.5: {} / {} / {}".format(*paper))


if __name__ == "__main__":
    sys.exit(main())
