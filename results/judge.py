"""Let any teacher compare the rationales of two runs blind: each pair is judged in both orders, without saying whose is whose.

    python results/judge.py runs/svamp-qcrd-0 runs/svamp-dss-0 --teacher http://localhost:8000/v1 --questions 100

It reads the runs' predictions.jsonl (the test questions). A run wins a question when it is preferred in both orders; when the orders
disagree, or both say tie, the question is a tie. The share of disagreement says how much the judge goes by position. Verdicts are kept
in data/judge/ as a teacher's samples are (same client, same flags): nothing is asked twice. The key comes from OPENAI_API_KEY.
"""
import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch_data  # noqa: E402
import qcrd  # noqa: E402
from t5 import InputError, require  # noqa: E402

PROMPT = """Two explanations of how to answer one question are given. Decide which is better: its steps are right and follow from the \
question, lead to the right answer, and say neither too little nor anything beside the point. Their length and order must not matter. \
Compare them in one or two sentences, then end with 'The answer is 1.', 'The answer is 2.' or 'The answer is tie.'"""
VERDICTS = ["1", "2", "tie"]


def read_predictions(run: Path) -> dict[str, dict]:
    """question -> its line of a run's predictions.jsonl. Raises InputError."""
    try:
        rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text("utf-8").splitlines()]
        require(any(row["rationale"] for row in rows), f"{run}/predictions.jsonl: holds no rationales; a finetune run writes none")
        return {row["input"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{run}/predictions.jsonl: cannot be read ({type(e).__name__}); is it the folder of a finished run?") from None


def pair_text(row: dict, first: str, second: str) -> str:
    return f"{row['input']}\nRight answer: {row['gold']}\n\nExplanation 1: {first}\n\nExplanation 2: {second}"


def judge(runs: list[Path], count: int, config: qcrd.Config) -> tuple[list[list[str | None]], list[str]]:
    """-> for each question the verdicts of both orders, in terms of the runs: "0" (first run), "1", "tie" or None (unread); the questions."""
    a, b = (read_predictions(run) for run in runs)
    questions = [q for q in a if q in b][:count]
    require(bool(questions), f"{runs[0]} and {runs[1]} have no question in common: compare runs of one task")
    texts = [pair_text(a[q], *pair) for q in questions for pair in ((a[q]["rationale"], b[q]["rationale"]), (b[q]["rationale"], a[q]["rationale"]))]
    split = qcrd.Split(texts, ["tie"] * len(texts))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt:
        prompt.write(PROMPT)
        prompt.flush()
        config.prompt = prompt.name
        slots, _ = qcrd.collect(qcrd.Task("judge", "text", fetch_data.root() / "data" / "judge", split, split, split, VERDICTS), config)
    said = [qcrd.read_sample(row[0][0], text, "text", VERDICTS)[1] if row[0] else None for text, row in zip(texts, slots)]
    whose = [{"1": "0", "2": "1"}, {"1": "1", "2": "0"}]                       # explanation 1 or 2 -> which run, by order
    return [[whose[order].get(v, v) for order, v in enumerate(said[2 * i:2 * i + 2])] for i in range(len(questions))], questions


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    p.add_argument("--teacher", default="", help="URL of a server with OpenAI's API, or openai (default: as for qcrd.py)")
    p.add_argument("--teacher-model", default="", help="default: gpt-3.5-turbo at OpenAI, else the first model that the server lists")
    p.add_argument("--questions", type=int, default=100, help="test questions to compare, two requests each (default: 100)")
    p.add_argument("--concurrency", type=int, default=8)
    args = p.parse_args()
    # method dss: samples for these questions and for no others
    config = qcrd.Config(task="judge", method="dss", samples=1, teacher_temperature=0.0, teacher=args.teacher, teacher_model=args.teacher_model,
                         concurrency=args.concurrency)
    try:
        require(args.questions > 0, f"--questions {args.questions}: must be above 0")
        verdicts, _ = judge(args.runs, args.questions, qcrd.check(config))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    read = [pair for pair in verdicts if None not in pair]
    c = Counter(pair[0] if pair[0] == pair[1] else "tie" for pair in read)
    flipped = sum(set(pair) == {"0", "1"} for pair in read)
    n = max(1, len(read))
    print(f"{args.runs[0]}: {c['0']} wins ({c['0'] / n:.0%}), {c['tie']} ties ({c['tie'] / n:.0%}), {c['1']} losses ({c['1'] / n:.0%}) "
          f"against {args.runs[1]}, on {len(read)} questions\n"
          f"the two orders contradict each other on {flipped} ({flipped / n:.0%}); {len(verdicts) - len(read)} questions without a verdict that can be read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
