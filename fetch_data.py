"""Where every input comes from: datasets, T5 weights, and the demo (its task, its teacher, its pretrained student).

    python fetch_data.py svamp t5-small             # download, check, convert; nothing is fetched twice
    python fetch_data.py cqa --archive datasets.zip # a task out of a copy of Distilling Step-by-Step's archive that you have
    python fetch_data.py --from-hf flan-t5-base     # any T5 checkpoint on disk, converted to weights/flan-t5-base/
    python fetch_data.py serve-teacher --port 8000  # the demo's rule-based teacher, an OpenAI-compatible server to try a client on
    python fetch_data.py pretrain-demo              # make weights/demo/ again (minutes)

Names: svamp cqa anli1 esnli (tasks, to data/<name>/), demo (generated, no download), t5-small t5-base (students, to weights/<name>/).
Without internet: QCRD_MIRROR=<folder or base URL> replaces "https://" (folder/host/path), and the same checks hold.
Proxies are those of the environment (HTTPS_PROXY). A download that was cut goes on where it stopped when the command is run again.
"""
import argparse
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import sentencepiece
import torch

import t5
from t5 import InputError, Progress, atomic, require

HERE = Path(__file__).resolve().parent
TASKS = ("svamp", "cqa", "anli1", "esnli", "demo")
SPLITS = ("train", "valid", "test")
COMMITTED = ("demo", "golden")              # the folders of weights/ that come with the code


def root() -> Path:
    """The folder that data/ and weights/ lie in: the one of this file unless QCRD_HOME names another."""
    return Path(os.environ.get("QCRD_HOME") or HERE)


# ---------------------------------------------------------------- downloads

HUB, GITHUB = "https://huggingface.co/google-t5/", "https://github.com/google-research/"
SMALL, BASE = "t5-small/resolve/df1b051c49625cf57a3d0d8d3863ed4d13564fe4/", "t5-base/resolve/a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1/"
VOCABULARY = "sha256:d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
# Each pinned by what `measure` finds. t5-small's weights have no published digest: the server names it, as Hugging Face does.
SOURCES = {
    "SVAMP.json": ("https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
                   "sha256:5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e"),
    # Distilling Step-by-Step's archive (Hsieh et al., 2023): the other datasets, and PaLM-540B's rationales for all four.
    "datasets.zip": (GITHUB + "distilling-step-by-step/raw/ef944263c9ddfd40a9888557f3e7d17513fd1a7e/datasets.zip",
                     "blob:fb9d88a0b44c2daac1ec1639f0bdae993e7e5bcd"),
    "t5-small/model.safetensors": (HUB + SMALL + "model.safetensors", "size:242043056"),
    "t5-small/spiece.model": (HUB + SMALL + "spiece.model", VOCABULARY),
    "t5-base/model.safetensors": (HUB + BASE + "model.safetensors",
                                  "sha256:a90903540cc02cbeb7ff9f823f1a80eb778c7e22426a0e620b01c77a5ec8f5b4"),
    "t5-base/spiece.model": (HUB + BASE + "spiece.model", VOCABULARY),
}


def measure(path: Path, kind: str) -> str:
    """A file's size in bytes, sha256, or blob: git's id of a content, the sha1 of "blob <size>\0" and the bytes."""
    size = path.stat().st_size
    if kind == "size":
        return str(size)
    h = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def check(path: Path, pins: Iterable[str], remedy: str) -> None:
    """Raise InputError where the file is not what "kind:value" says."""
    for kind, expected in (pin.split(":") for pin in pins):
        got = measure(path, kind)
        require(got == expected, f"{path}: expected {kind} {expected}, got {got}; {remedy}")


def download(name: str) -> Path:
    """Fetch SOURCES[name] into data/downloads/ once: resumed, checked, then renamed into place.

    Raises InputError (no connection, refused, cut, wrong digest) that names the remedy. Deletes no finished file.
    """
    (url, pin), target = SOURCES[name], root() / "data" / "downloads" / name
    if mirror := os.environ.get("QCRD_MIRROR"):
        url = mirror.rstrip("/") + "/" + url.removeprefix("https://")
    part, linked = Path(f"{target}.part"), None
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)       # one process at a time; the kernel's, so that a killed one leaves no lock behind
        if target.exists():
            check(target, [pin], "move this file away and run again")
            return target
        if url.startswith(("http://", "https://")):
            linked = stream(url, part, target)
        else:
            require(Path(url).is_file(), f"{url}: no such file in the mirror that QCRD_MIRROR names; put it there, or unset QCRD_MIRROR")
            shutil.copyfile(url, part)
        try:
            check(part, [pin, f"sha256:{linked}"] if linked else [pin], f"{url} brought something else: run again, or put it at {target}")
        except InputError:
            part.unlink()                      # nothing can be resumed from it
            raise
        if pin.startswith("size:") and not linked:
            print(f"{url}: its server named no digest, only the size was checked", file=sys.stderr)
        os.replace(part, target)
    return target


def stream(url: str, part: Path, target: Path) -> str | None:
    """Append to `part` what it lacks of `url`; return the sha256 that the server's X-Linked-ETag names, if any.

    A broken connection is taken up where it broke: any number of times while bytes come, else five times.
    """
    failures, linked = 0, None
    while True:
        done = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}       # else the range may be a compressed file's
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as r:
                resumed = r.status_code == 206 and r.headers.get("Content-Range", "").startswith(f"bytes {done}-")
                if r.status_code == 416:       # the part is longer than the file, or whole but not renamed
                    part.unlink(missing_ok=True)
                elif r.status_code in (400, 401, 403, 404, 410):
                    raise InputError(f"{url}: HTTP {r.status_code} {r.reason}; get the file elsewhere and put it at {target}")
                if r.status_code != 200 and not resumed:
                    raise requests.ConnectionError(f"HTTP {r.status_code} {r.reason}")
                # Hugging Face names the digest on the redirect, before its storage answers.
                for hop in (*r.history, r):
                    if found := re.fullmatch('"?([0-9a-f]{64})"?', hop.headers.get("X-Linked-ETag", "")):
                        linked = found[1]
                done = done if resumed else 0
                total = done + int(r.headers.get("Content-Length") or 0)
                progress = Progress(f"download {target.name}", total)
                with open(part, "ab" if resumed else "wb") as f:
                    for block in r.iter_content(1 << 16):
                        done, failures = done + f.write(block), 0
                        progress.update(min(done, total))
                progress.close()
                if done >= total:
                    return linked
                raise requests.ConnectionError(f"cut after {done:,} of {total:,} bytes")
        except requests.RequestException as why:
            failures += 1
            if failures == 5 or isinstance(why, ValueError):       # the latter: not a URL
                raise InputError(f"cannot fetch {url} ({fold(str(why))[:150]}); check the connection and run again (it resumes), "
                                 f"name a mirror with QCRD_MIRROR, or put the file at {target}") from None
            time.sleep(min(0.1 * 2 ** failures, 5))


def fold(text: str) -> str:
    """Runs of white space become one blank."""
    return " ".join(text.split())


# ---------------------------------------------------------------- tasks

MEMBER_LIMIT = 1 << 30                 # bytes of an unpacked member; the largest, e-SNLI's training file, has a fraction of that
NLI = ("entailment", "neutral", "contradiction")
# What a damaged zip file and records that are not what they should be raise; json's, codecs' and index's errors are ValueErrors.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, TypeError, KeyError)


def open_archive(archive: str | Path | None) -> zipfile.ZipFile:
    """The user's own copy of datasets.zip (its sha256 is printed as unverified), or the pinned one, fetched once."""
    path = Path(archive) if archive else download("datasets.zip")
    try:
        opened = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as why:
        raise InputError(f"{path}: not a zip file that can be read ({why}); give a copy of datasets.zip") from None
    if archive:
        print(f"{path}: sha256 {measure(path, 'sha256')} (unverified; contents are checked instead)", file=sys.stderr)
    return opened


def record(task: str, r: dict) -> dict[str, str]:
    """One line of the archive -> {"input", "label"}, in the formats of Distilling Step-by-Step. Raises one of DAMAGE."""
    if task == "svamp":
        made = {"input": r["input"], "label": r["label"]}
    elif task == "cqa":
        choices = "".join(f"\n({letter}) {choice}" for letter, choice in zip("abcde", r["choices"], strict=True))
        made = {"input": r["question"] + "\nAnswer Choices:" + choices, "label": r["choices"][r["choices"].index(r["answer"])]}
    else:
        # Premise and hypothesis are joined by T5's end-of-sequence token there, and so here.
        made = {"input": r["premise"] + "</s>" + r["hypothesis"], "label": NLI[(0, 1, 2).index(r["label"])]}
    if not all(isinstance(text, str) and text.strip() for text in made.values()):
        raise ValueError("input or label is not a text")
    return made


def member(task: str, split: str) -> str:
    """The archive's file of questions."""
    return f"datasets/{task}/{task}_{split}.json"


def parsed(archive: zipfile.ZipFile, name: str, parse: Callable[[str], object], whole: bool = False) -> Iterator:
    """parse(line) of a member's lines, or of its whole text; the member by exact name, of bounded size, streamed.

    Raises InputError naming member and line for all that can be wrong with it.
    """
    require(name in archive.NameToInfo, f"{archive.filename}: {name} is missing; get the whole datasets.zip")
    require(archive.NameToInfo[name].file_size <= MEMBER_LIMIT,
            f"{archive.filename}: {name} unpacks to more than {MEMBER_LIMIT >> 20} MiB; this is not datasets.zip")
    number = 0
    try:
        with io.TextIOWrapper(archive.open(name), encoding="utf-8") as f:
            for number, text in enumerate([f.read()] if whole else f, 1):
                yield parse(text)
    except DAMAGE as why:
        raise InputError(f"{archive.filename}: {name} line {number}: {type(why).__name__} {fold(str(why))[:100]}; "
                         "get the archive again") from None


def questions(archive: zipfile.ZipFile, task: str, split: str) -> Iterator[dict[str, str]]:
    """The records of one split in the archive's order."""
    return parsed(archive, member(task, split), lambda line: record(task, json.loads(line)))


def rationales(archive: zipfile.ZipFile, task: str, split: str) -> Iterator[str]:
    """PaLM's raw texts of one split in the order of its questions: numbered members, each a JSON list."""
    def texts(text: str) -> list[str]:
        if not isinstance(found := json.loads(text), list) or not all(isinstance(t, str) for t in found):
            raise ValueError("not a list of texts")
        return found
    for i in itertools.count():
        if (name := f"datasets/{task}/llm/{split}_CoT_{i}.json") not in archive.NameToInfo:
            return
        for found in parsed(archive, name, texts, whole=True):
            yield from found


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines, streaming, whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def write_task(folder: Path, splits: dict[str, Iterable[dict]]) -> None:
    """Write a task's files. Without a "valid" split the last tenth of the training records becomes it.

    Distilling Step-by-Step draws that tenth at random; the last one needs no seed [ours]. Only there are records collected: e-SNLI, which
    has half a million, brings its own.
    """
    if "train" in splits and "valid" not in splits:
        train = list(splits["train"])
        kept = len(train) - len(train) // 10
        splits = splits | {"train": train[:kept], "valid": train[kept:]}
    for split, records in splits.items():
        write_lines(folder / f"{split}.jsonl", records)


def ensure(name: str, archive: str | Path | None = None) -> Path:
    """Make a task or a student ready and return its folder; at once where it is complete.

    svamp, cqa, anli1, esnli, demo -> data/<name>/ with train.jsonl, valid.jsonl, test.jsonl, one {"input", "label"} a line (UTF-8);
    t5-small, t5-base -> weights/<name>/ with config.json, model.pt, spiece.model.
    archive: a datasets.zip to read a task from instead of its pinned source. Raises InputError.
    """
    if name not in TASKS:
        return ensure_student(name)
    folder = root() / "data" / name
    if all((folder / f"{split}.jsonl").is_file() for split in SPLITS):
        return folder
    if name == "demo":
        write_task(folder, {s: ({"input": p.text, "label": p.label} for p in demo_problems(s)) for s in SPLITS})
    elif name == "svamp" and not archive:
        source = json.loads(download("SVAMP.json").read_text(encoding="utf-8"))
        rows = [{"input": f"{r['Body']}\n{r['Question']}", "label": r["Equation"]} for r in source]
        order = np.random.RandomState(0).permutation(len(rows))    # Distilling Step-by-Step's split: 800 to train on, 200 to test
        write_task(folder, {"train": [rows[i] for i in order[:800]], "test": [rows[i] for i in order[800:]]})
    else:
        opened = open_archive(archive)
        found = [split for split in SPLITS if member(name, split) in opened.NameToInfo]
        write_task(folder, {split: questions(opened, name, split) for split in found})
        if missing := [split for split in ("train", "test") if split not in found]:
            has = f"; its {' and '.join(found)} went to {folder}" if found else ""
            raise InputError(f"{name}: {' and '.join(missing)} missing in {opened.filename} ({member(name, missing[0])}){has}; "
                             "get the whole datasets.zip")
    return folder


def ensure_palm(task: str, archive: str | Path | None = None) -> Path:
    """data/<task>/teacher-palm.jsonl: the PaLM-540B rationales that Distilling Step-by-Step published, raw, one a question.

    Lines {"question", "slot": 0, "text", "finish": "stop"} for all that was published as training or validation set. Raises InputError.
    """
    path = root() / "data" / task / "teacher-palm.jsonl"
    if path.is_file():
        return path
    require(task in TASKS and task != "demo",
            f"{task}: PaLM's rationales were published for svamp, cqa, anli1 and esnli; choose another --teacher")
    opened = open_archive(archive)

    def samples() -> Iterator[dict]:
        for split in ("train", "valid") if member(task, "valid") in opened.NameToInfo else ("train",):
            for row, text in itertools.zip_longest(questions(opened, task, split), rationales(opened, task, split)):
                require(None not in (row, text),
                        f"{opened.filename}: {task} {split}: questions and rationales differ in number; get the archive again")
                yield {"question": row["input"], "slot": 0, "text": text, "finish": "stop"}
    write_lines(path, samples())
    return path


# ---------------------------------------------------------------- the demo's task

PEOPLE = ["Ana", "Ben", "Dev", "Emma", "Finn", "Hugo", "Iris", "Kira", "Leo", "Maya", "Noah", "Olga"]
THINGS = ["apples", "balls", "books", "cards", "coins", "cups", "eggs", "hats", "keys", "mugs", "pears", "photos", "rocks", "shells",
          "stamps", "toys"]


class Kind(NamedTuple):
    """One step of a story: `s op u`, s being what is there before it and u its own number.

    In the texts {a}, {b}, {c} are people, {o} the things that count and {p} others. The last of several sentences for the same is
    kept for the test set, here and below.
    """
    op: str
    wrong: str                         # the step that a person takes it for
    ask: str                           # the question of a story that ends with it
    tell: tuple[str, ...]
    why: tuple[str, ...]               # what the teacher says of it; {sum} is the sum done, "12 + 5 = 17"


OPEN = ("{a} has {s} {o}.", "There are {s} {o} in {a}'s room.", "{a} collects {s} {o}.", "{a}'s shelf holds {s} {o}.")
GAIN = ("{a} finds {u} more {o}.", "{b} gives {a} {u} {o}.", "Then {a} buys {u} {o}.", "{u} {o} arrive for {a} by mail.")
LOSS = ("{a} gives {u} {o} to {b}.", "{a} loses {u} {o}.", "Then {a} sells {u} {o}.", "{b} borrows {u} {o} from {a}.")
OTHER = ("{b} has {u} {o}.", "{b} owns {u} {o}.", "{u} {o} belong to {b}.")
KINDS = {
    # these two open a story
    "groups": Kind("*", "parts", "now", ("{a} has {s} boxes with {u} {o} in each.", "{a} fills {s} bags with {u} {o} each.",
                                         "In each of {a}'s {s} baskets lie {u} {o}."),
                   ("{s} groups of {u} {o} are {sum}.", "{a} has {s} times {u} {o}, {sum}.")),
    "parts": Kind("+", "groups", "now", ("{a} has {s} {o} at home and {u} {o} at school.",
                                         "{a} picks {s} {o} on Monday and {u} {o} on Tuesday.",
                                         "{a} keeps {s} {o} upstairs and {u} {o} downstairs."),
                  ("Both parts make {sum} {o}.", "{a} has {s} and {u} {o}, {sum}.")),
    "gain": Kind("+", "loss", "now", GAIN, ("{a} gets {u} more, {sum}.", "{u} {o} come in, {sum}.")),
    "loss": Kind("-", "gain", "now", LOSS, ("{u} of the {o} go away, {sum}.", "{a} is left with {sum}.")),
    # asked for the beginning, a story is solved from its end
    "ungain": Kind("-", "gain", "first", GAIN, ("Before the {u} came there were {sum}.", "Without the {u} new ones: {sum}.")),
    "unloss": Kind("+", "loss", "first", LOSS, ("Before the {u} went there were {sum}.", "Put the {u} back: {sum}.")),
    # these end one
    "share": Kind("/", "loss", "friend", ("{a} shares the {o} equally among {u} friends.", "{u} friends split the {o} of {a} equally.",
                                          "{a} deals the {o} out evenly to {u} friends."),
                  ("Each of {u} friends gets {sum}.", "Split in {u} equal shares: {sum}.")),
    "times": Kind("*", "more", "other", ("{b} has {u} times as many {o} as {a}.", "{b} owns {u} times the {o} of {a}.",
                                         "For every one of {a}'s {o} there are {u} of {b}'s."),
                  ("{b} has {u} times that, {sum}.", "{u} times as many are {sum}.")),
    "more": Kind("+", "fewer", "other", ("{b} has {u} more {o} than {a}.", "{b} owns {u} {o} more than {a}.", "{b} beats {a} by {u} {o}."),
                 ("{b} has {u} more, {sum}.", "{u} more than that are {sum}.")),
    "fewer": Kind("-", "more", "other", ("{b} has {u} fewer {o} than {a}.", "{b} owns {u} {o} fewer than {a}.",
                                           "{b} trails {a} by {u} {o}."),
                  ("{b} has {u} fewer, {sum}.", "{u} fewer than that are {sum}.")),
    "gap": Kind("-", "both", "gap", OTHER, ("{b} has {u}, the difference is {sum}.", "{a} is ahead of {u} by {sum}.")),
    "both": Kind("+", "gap", "both", OTHER, ("{b} has {u}, together {sum}.", "With the {u} of {b} there are {sum}.")),
}
QUESTIONS = {
    "now": ("How many {o} does {a} have now?", "How many {o} are there with {a} in the end?", "{a} owns how many {o} after this?"),
    "first": ("How many {o} did {a} have at first?", "How many {o} did {a} start with?", "What was {a}'s number of {o} in the beginning?"),
    "other": ("How many {o} does {b} have?", "How many {o} are {b}'s?", "What number of {o} does {b} own?"),
    "friend": ("How many {o} does each friend get?", "How many {o} are there for each friend?", "What does each friend receive in {o}?"),
    "gap": ("How many more {o} does {a} have than {b}?", "{a} has how many {o} more than {b}?", "By how many {o} is {a} ahead of {b}?"),
    "both": ("How many {o} do {a} and {b} have together?", "How many {o} do {a} and {b} have in all?",
             "What do {a} and {b} own in {o}, added up?"),
}
UNKNOWN = ("{a} has some {o}.", "{a} has a number of {o}.", "{a} has {o}, we do not know how many.")
LEFT = ("Now {a} has {s} {o}.", "{a} has {s} {o} now.", "That makes {s} {o} for {a}.")
# {d} is a number that the answer does not need: of other things, of another person, of another time.
DISTRACTORS = ("{a} also has {d} {p}.", "{c} has {d} {o}.", "{b} gives {c} {d} {p}.", "{a} buys {d} {p}.", "{c} loses {d} {o}.",
               "Last year {a} had {d} {o}.", "{b} has {d} {p}.", "{d} {p} belong to {c}.")
ENDS = ("gain", "loss", "share", "times", "more", "fewer", "gap", "both")
PLANS = {1: [(kind,) for kind in KINDS],
         2: [(k, end) for k in ("groups", "parts", "gain", "loss") for end in ENDS]
            + [(k, end) for k in ("ungain", "unloss") for end in ("ungain", "unloss")]}


class Problem(NamedTuple):
    text: str                          # body, newline, question, as in SVAMP
    label: str                         # the equation, spaced as in SVAMP; numbers as the text has them
    first: int                         # what the solution starts from
    steps: tuple[tuple[str, int], ...] # and its steps: kind and number
    words: dict[str, str]              # who and what: {a} {b} {c} {o} {p}
    distractor: int | None


def solve(first: int, steps: Iterable[tuple[str, int]]) -> tuple[str, list[int | None]]:
    """The steps as one equation, "( ( 12 + 5 ) / 6 )", and what is there at first and after each: None from where it is not natural."""
    equation, amounts = str(first), [first]
    for kind, u in steps:
        op, s = KINDS[kind].op, amounts[-1]
        equation = f"( {equation} {op} {u} )"
        t = {"+": s + u, "-": s - u, "*": s * u, "/": s / u}[op] if s else 0
        amounts.append(int(t) if t > 0 and t == int(t) else None)
    return equation, amounts


def make_problem(rng: random.Random, hard: float = 0.7, unseen: bool = False, without: Iterable[str] = ()) -> Problem:
    """Draw a word problem: with probability `hard` it has two steps, else one; likewise a distractor or none.

    unseen: at least one of its sentences is kept for the test set; else none is. without: kinds of steps that it must not have.
    """
    plan = rng.choice([plan for plan in PLANS[2 if rng.random() < hard else 1] if not set(plan) & set(without)])
    distract = rng.random() < hard
    words = dict(zip("abcop", rng.sample(PEOPLE, 3) + rng.sample(THINGS, 2)))
    while True:
        first = rng.randint(2, 9 if plan[0] == "groups" else 50)
        moves = [(kind, rng.randint(2, 9 if KINDS[kind].op in "*/" else 50)) for kind in plan]
        numbers, (equation, amounts) = [first] + [u for _, u in moves], solve(first, moves)
        if None not in amounts and max(amounts) < 100 and len(set(numbers)) == len(numbers):
            break
    d = rng.choice([n for n in range(2, 51) if n not in numbers]) if distract else None
    parts = [(KINDS[kind].tell, {"s": first, "u": u}) for kind, u in moves]
    ask = KINDS[plan[-1]].ask
    if ask == "first":
        parts = [(UNKNOWN, {}), *reversed(parts), (LEFT, {"s": first})]
    elif plan[0] not in ("groups", "parts"):
        parts.insert(0, (OPEN, {"s": first}))
    if ask in ("other", "gap", "both") and len(parts) == 2 and rng.random() < 0.4:
        parts.reverse()                # a comparison may be told before what it compares with
    if distract:
        parts.insert(rng.randint(0, len(parts)), (DISTRACTORS, {"d": d}))
    parts.append((QUESTIONS[ask], {}))
    special = rng.randrange(len(parts)) if unseen else None
    lines = []
    for i, (tell, names) in enumerate(parts):
        chosen = tell[-1] if i == special else rng.choice(tell if unseen else tell[:-1])
        lines.append(chosen.format(**words, **names))
    return Problem(" ".join(lines[:-1]) + "\n" + lines[-1], equation, first, tuple(moves), words, d)


@functools.cache
def demo_problems(split: str) -> tuple[Problem, ...]:
    """The demo's problems of one split, always the same: 600 train, 100 valid, 1,000 test, no text in two of them.

    More than a quarter of the test problems have a sentence in a phrasing that no other split has.
    """
    rng = random.Random(f"demo {split}")
    seen = {p.text for earlier in SPLITS[:SPLITS.index(split)] for p in demo_problems(earlier)}
    problems: dict[str, Problem] = {}
    while len(problems) < {"train": 600, "valid": 100, "test": 1000}[split]:
        problem = make_problem(rng, unseen=split == "test" and rng.random() < 0.28)
        if problem.text not in seen:
            problems.setdefault(problem.text, problem)
    return tuple(problems.values())


# ---------------------------------------------------------------- the demo's teacher

# How often the teacher errs on easy and on hard questions, and which share of the questions of one and of two steps is hard: chosen so
# that a vote of five comes near the paper's (3.87 positives a question, more than half of the questions with positives only).
EASY_ERRORS, HARD_ERRORS, HARD = 0.02, 0.6, {1: 0.2, 2: 0.48}

DISMISSALS = ("The {d} does not matter.", "We do not need the {d}.", "The {d} is about something else.")
BEGINNINGS = ("{a} has {s} {o}.", "We start with {s} {o}.")


def mistakes(p: Problem) -> list[tuple[int, list[tuple[str, int]]]]:
    """Wrong solutions that a person could reach: one step taken for another, the distractor's number used, a step forgotten."""
    steps = list(p.steps)
    found = [(p.first, steps[:i] + [(KINDS[kind].wrong, u)] + steps[i + 1:]) for i, (kind, u) in enumerate(steps)]
    if p.distractor is not None:
        found.append((p.distractor, steps))
        found += [(p.first, steps[:i] + [(kind, p.distractor)] + steps[i + 1:]) for i, (kind, _) in enumerate(steps)]
    if len(steps) == 2:
        found += [(p.first, steps[:1]), (p.first, steps[1:])]
    return found


def explain(p: Problem, first: int, steps: Iterable[tuple[str, int]], rng: random.Random, swap: bool = False) -> str:
    """A solution in words, ending in its equation. swap: the operands of the last step change places, as in "5 - 12 = 7"."""
    steps, amounts = list(steps), solve(first, steps)[1]
    said, equation, opens = [], str(first), steps[0][0]
    if p.distractor not in (None, first, *(u for _, u in steps)) and rng.random() < 0.6:
        said.append(rng.choice(DISMISSALS))
    if opens not in ("groups", "parts"):
        said.append(LEFT[0] if opens in ("ungain", "unloss") else rng.choice(BEGINNINGS))
    said = [line.format(**p.words, s=first, d=p.distractor) for line in said]
    for i, (kind, u) in enumerate(steps):
        s, t = amounts[i] or "that", amounts[i + 1]
        turned = swap and i == len(steps) - 1
        left, right = (f"{u} {KINDS[kind].op} {x}" if turned else f"{x} {KINDS[kind].op} {u}" for x in (s, equation))
        said.append(rng.choice(KINDS[kind].why).format(**p.words, s=s, u=u, sum=f"{left} = {t}" if t else left))
        equation = f"( {right} )"
    return " ".join(said) + f" The answer is {equation}."


def teacher_answer(p: Problem, seed: int | None, temperature: float) -> str:
    """What the rule-based teacher says, a function of question and seed alone; at temperature 0 it is always right."""
    rng = random.Random(f"{p.text}|{seed if temperature else 'greedy'}")
    about = random.Random(p.text)      # what is hard about a question, and its most tempting mistake, are the same in all samples
    errors = HARD_ERRORS if about.random() < HARD[len(p.steps)] else EASY_ERRORS
    tempting = about.choice(mistakes(p))
    if rng.random() >= errors * min(temperature / 0.7, 1.5):
        return explain(p, p.first, p.steps, rng)
    if KINDS[p.steps[-1][0]].op in "-/" and rng.random() < 0.2:
        return explain(p, p.first, p.steps, rng, swap=True)
    return explain(p, *(tempting if rng.random() < 0.4 else rng.choice(mistakes(p))), rng)


class Teacher(BaseHTTPRequestHandler):
    """As much of OpenAI's chat-completions API as a client of it needs."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True     # headers and body are two writes; the second would wait 40 ms for the first one's receipt

    def log_message(self, *args: object) -> None:
        """Say nothing: a run makes hundreds of requests."""

    def reply(self, status: int, body: dict | str) -> None:
        """Send a body, or a text as an error in OpenAI's form."""
        error = {"message": body, "type": "invalid_request_error", "param": None, "code": None}
        raw = json.dumps(body if isinstance(body, dict) else {"error": error}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {self.path}"
        if asked == "GET /v1/models":
            model = {"id": "demo-teacher", "object": "model", "created": 0, "owned_by": "qcrd"}
            return self.reply(200, {"object": "list", "data": [model]})
        if asked != "POST /v1/chat/completions":
            return self.reply(404, f"{self.path}: there are GET /v1/models and POST /v1/chat/completions")
        try:
            answer = complete(json.loads(raw), self.server.problems)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as why:
            return self.reply(400, f"no chat completion that can be answered: {type(why).__name__} {why}")
        self.reply(200, answer)

    do_GET = do_POST


TOKEN = re.compile(r"\w+|[^\w\s]")     # what the teacher counts as a token


def complete(asked: dict, problems: dict[str, Problem]) -> dict:
    """A request's body -> the body of its answer, both in OpenAI's form. Raises ValueError and its like for a bad request."""
    prompt = asked["messages"][-1]["content"]
    prompt = fold(prompt if isinstance(prompt, str) else " ".join(part["text"] for part in prompt))
    n, seed, limit = asked.get("n") or 1, asked.get("seed"), asked.get("max_tokens") or asked.get("max_completion_tokens")
    temperature = 1.0 if asked.get("temperature") is None else asked["temperature"]
    if not (n in range(1, 129) and isinstance(temperature, int | float) and 0 <= temperature <= 2 and isinstance(limit, int | None)
            and (limit is None or limit > 0) and isinstance(seed, int | None)):
        raise ValueError("n must be 1 to 128, temperature 0 to 2, max_tokens at least 1, seed a whole number")
    question = max((text for text in problems if text in prompt), key=prompt.rfind, default=None)
    choices, read, written = [], len(TOKEN.findall(prompt)), 0
    for i in range(n):
        # Choice i of seed s is choice 0 of seed s + i: slots that are asked for one by one are those asked for at once.
        one = random.randrange(2 ** 62) if seed is None else seed + i
        text = teacher_answer(problems[question], one, temperature) if question else "I cannot tell: I know the demo's problems only."
        tokens = list(TOKEN.finditer(text))
        kept = tokens[:limit]
        choices.append({"index": i, "message": {"role": "assistant", "content": text[:kept[-1].end()]}, "logprobs": None,
                        "finish_reason": "stop" if kept == tokens else "length"})
        written += len(kept)
    return {"id": "chatcmpl-demo", "object": "chat.completion", "created": int(time.time()), "model": "demo-teacher", "choices": choices,
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}}


def demo_teacher(port: int = 0) -> tuple[str, ThreadingHTTPServer]:
    """Start the rule-based teacher in a daemon thread on 127.0.0.1; return its base URL and the server (`shutdown()` ends it).

    It answers the last problem of the demo that it finds in the last message. Raises InputError where the port cannot be had.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Teacher)
    except (OSError, OverflowError) as why:
        raise InputError(f"port {port} cannot be used ({why}); choose another with --port") from None
    server.daemon_threads = True
    server.problems = {fold(p.text): p for split in SPLITS for p in demo_problems(split)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1", server


# ---------------------------------------------------------------- students

# The published shapes, so that config.json need not be fetched.
PUBLISHED = {
    name: {"model_type": "t5", "vocab_size": 32128, "d_model": d, "d_kv": 64, "d_ff": 4 * d, "num_layers": layers, "num_heads": heads,
           "feed_forward_proj": "relu", "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1}
    for name, d, layers, heads in (("t5-small", 512, 6, 8), ("t5-base", 768, 12, 12))}


def ensure_student(name: str) -> Path:
    """weights/<name>/ of a published student, downloaded and converted once; the demo's stands beside the code. Raises InputError."""
    folder = (HERE if name in COMMITTED else root()) / "weights" / name
    if all((folder / file).is_file() for file in ("config.json", "model.pt", "spiece.model")):
        return folder
    require(name in PUBLISHED,
            f"{name}: no task ({', '.join(TASKS)}) and no student ({', '.join(PUBLISHED)}); --from-hf FOLDER brings in others")
    vocab, weights = download(f"{name}/spiece.model"), download(f"{name}/model.safetensors")
    with atomic(weights.parent / "config.json") as temporary:
        temporary.write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
    return convert(weights.parent, name, vocab)


def convert(source: str | Path, name: str | None = None, vocab: str | Path | None = None) -> Path:
    """A Hugging Face T5 folder -> weights/<name>/, by default its own name; vocab: its spiece.model, where the folder has none."""
    name, vocab = name or Path(source).resolve().name, Path(vocab or Path(source) / "spiece.model")
    require(re.fullmatch(r"[\w-][\w.-]*", name) and name not in COMMITTED,
            f"{name!r} cannot be a folder of weights/; choose another --name of letters, digits, '.', '_' and '-'")
    model = t5.T5.from_hf(source)
    require(vocab.is_file(), f"{vocab}: no such file; name the checkpoint's SentencePiece model with --vocab FILE")
    pieces, rows = t5.Tokenizer(vocab).size, model.config.vocab_size
    require(pieces <= rows, f"{vocab}: {pieces:,} pieces for the {rows:,} embeddings of {source}; name its own with --vocab FILE")
    folder = root() / "weights" / name
    model.save(folder, vocab=vocab)
    return folder


# What made weights/demo/: see weights/README.md. A mixture like T5 1.0's, in small: span corruption, and supervised pairs.
SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
TAUGHT = ("share", "gap", "both", "ungain", "unloss")     # left to the demo's training set: no pretraining pair has them


def pretraining_data() -> tuple[list[str], list[tuple[str, str]]]:
    """Texts for span corruption and (input, label) pairs, seeded. No problem and no test phrasing of the demo is in them.

    The texts are stories of every kind without their answers; the pairs are shorter on average than the demo's, and of fewer kinds.
    """
    rng = random.Random("pretraining")
    known = {p.text for split in SPLITS for p in demo_problems(split)}
    texts = [make_problem(rng).text for _ in range(20000)]
    pairs = [make_problem(rng, hard=0.5, without=TAUGHT) for _ in range(60000)]
    return [text for text in texts if text not in known], [("predict: " + p.text, p.label) for p in pairs if p.text not in known]


def train_vocabulary(lines: Iterable[str], path: Path, size: int = 1100, numbers: int = 100) -> None:
    """A SentencePiece model of `size` pieces: frequent words, signs and the numbers below `numbers` as one piece each, the rest by letters."""
    with atomic(path) as temporary, open(temporary, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(fold, lines), model_writer=f, model_type="bpe", vocab_size=size, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, byte_fallback=True, character_coverage=1.0, required_chars="".join(map(chr, range(33, 127))),
            user_defined_symbols=[f"▁{n}" for n in (*range(numbers), *"()+-*/=")], hard_vocab_limit=False, num_threads=1, minloglevel=2)


def pretrain_demo(folder: Path = HERE / "weights" / "demo", steps: int = 6000) -> Path:
    """Make the demo's student: vocabulary, pretraining, half precision on disk. Same machine, same code: same weights."""
    texts, pairs = pretraining_data()
    phrases = [kind.tell + kind.why for kind in KINDS.values()] + [*QUESTIONS.values(), DISTRACTORS, DISMISSALS, BEGINNINGS]
    words = re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", " ".join(sum(phrases, ())))) + ["predict", "explain", "answer"]
    train_vocabulary([*texts, *50 * sorted(set(words))], folder / "spiece.model")
    tokenizer = t5.Tokenizer(folder / "spiece.model")
    torch.manual_seed(0)
    model = t5.T5(t5.Config(vocab_size=tokenizer.size + 100, **SHAPE))
    for stack in (model.encoder, model.decoder):
        # T5 starts these near 0 and learns them slowly: its heads would not tell positions apart for thousands of steps. Spread, each
        # head looks at other distances from the first one (loss 0.11 in place of 0.28 after 1,500 steps).
        torch.nn.init.normal_(stack.bias.weight, std=2.0)
    t5.pretrain(model, tokenizer, texts, steps, batch=32, lr=1e-3, pairs=pairs, share=0.85)
    model.save(folder, vocab=folder / "spiece.model", dtype=torch.float16)
    return folder


# ---------------------------------------------------------------- command line

def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (2 and one line on stderr for a mistake of the user's)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="tasks and students to make ready, or pretrain-demo, or serve-teacher")
    parser.add_argument("--archive", metavar="FILE", help="read tasks from this datasets.zip; its PaLM rationales are read too")
    parser.add_argument("--from-hf", metavar="FOLDER", help="convert this Hugging Face T5 checkpoint (config.json and weights)")
    parser.add_argument("--name", help="with --from-hf: the folder in weights/ to write (default: the checkpoint's own name)")
    parser.add_argument("--vocab", metavar="FILE", help="with --from-hf: the SentencePiece model, where FOLDER has no spiece.model")
    parser.add_argument("--port", type=int, default=8000, help="with serve-teacher (default: 8000; 0: any free one)")
    args = parser.parse_args(argv)
    try:
        if not args.names and not args.from_hf:
            parser.print_help()
        if args.from_hf:
            print(convert(args.from_hf, args.name, args.vocab))
        for name in args.names:
            if name == "pretrain-demo":
                print(pretrain_demo())
            elif name == "serve-teacher":
                print(demo_teacher(args.port)[0], " (Ctrl-C ends it)", flush=True)
                threading.Event().wait()
            else:
                print(ensure(name, args.archive))
                if args.archive and name in TASKS and name != "demo":
                    print(ensure_palm(name, args.archive))
    except InputError as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
