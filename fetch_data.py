"""Where every input comes from: datasets, T5 weights, tasks, prompts, answers, and the demo.

    python fetch_data.py svamp t5-small              # download, check; nothing is fetched twice
    python fetch_data.py cqa --archive datasets.zip  # a task out of a copy of the archive
    python fetch_data.py serve-teacher --port 8000   # the demo's teacher on loopback, OpenAI's API
    python fetch_data.py pretrain-demo               # make weights/demo/ again (minutes)

Tasks (data/<name>/): svamp, cqa, anli1, esnli, and demo, which is generated without a download.
Students (weights/<name>/): t5-small, t5-base. The archive is Distilling Step-by-Step's [DSS].
QCRD_MIRROR=<folder or base URL> stands in for "https://" (folder/host/path); checks stay the same.
QCRD_HOME=<folder>: where data/ and weights/ lie, by default beside this file.
"""

import argparse
import ast
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import add, mul, neg, sub, truediv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import sentencepiece
import torch

import t5
from t5 import InputError, Progress, atomic, require

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "valid", "test")
KINDS = {"demo": "number", "svamp": "number", "cqa": "choice", "anli1": "nli", "esnli": "nli"}
TASKS = tuple(KINDS)
NLI = ("entailment", "neutral", "contradiction")


def root() -> Path:
    """The folder that data/ and weights/ lie in."""
    return Path(os.environ.get("QCRD_HOME") or HERE)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fold(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------ 1. Downloads

GITHUB = "https://github.com/google-research/distilling-step-by-step/raw/"
SVAMP = "https://raw.githubusercontent.com/arkilpatel/SVAMP/"
SMALL = "https://huggingface.co/google-t5/t5-small/resolve/df1b051c49625cf57a3d0d8d3863ed4d13564fe4"
BASE = "https://huggingface.co/google-t5/t5-base/resolve/a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"
SOURCES = {  # file in data/downloads/ -> URL
    "SVAMP.json": SVAMP + "689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
    "datasets.zip": GITHUB + "ef944263c9ddfd40a9888557f3e7d17513fd1a7e/datasets.zip",
    "t5-small/model.safetensors": SMALL + "/model.safetensors",
    "t5-base/model.safetensors": BASE + "/model.safetensors",
    "spiece.model": SMALL + "/spiece.model",  # t5-base has the same
}
PINS = {  # -> sha256, git blob id, or size where only the server names the sha256
    "SVAMP.json": "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
    "datasets.zip": "fb9d88a0b44c2daac1ec1639f0bdae993e7e5bcd",
    "t5-small/model.safetensors": "242043056",
    "t5-base/model.safetensors": "a90903540cc02cbeb7ff9f823f1a80eb778c7e22426a0e620b01c77a5ec8f5b4",
    "spiece.model": "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86",
}


def digests(path: Path) -> tuple[str, str, str]:
    """A file's sha256, git blob id (the sha1 of "blob <size>", NUL and the content), and size."""
    size, sha256 = path.stat().st_size, hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            blob.update(block)
    return sha256.hexdigest(), blob.hexdigest(), str(size)


def download(name: str) -> Path:
    """SOURCES[name] in data/downloads/, fetched once: resumed, checked, renamed. InputError."""
    url, pins = SOURCES[name], [PINS[name]]
    if mirror := os.environ.get("QCRD_MIRROR"):
        require("@" not in mirror, "QCRD_MIRROR: a password in it would be shown; use none")
        url = mirror.rstrip("/") + "/" + url.removeprefix("https://")
    target = root() / "data" / "downloads" / name
    part = Path(f"{target}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with t5.lock(f"{target}.lock"):
        path = target if target.exists() else part
        if path == part and url.startswith(("http://", "https://")):
            pins += fetch(url, part)
        elif path == part:
            require(Path(url).is_file(), f"{url}: no such file in the mirror, see QCRD_MIRROR")
            shutil.copyfile(url, part)
        found = digests(path)
        wrong = [pin for pin in pins if pin not in found]
        if wrong:
            part.unlink(missing_ok=True)  # nothing can be resumed from it
        remedy = f"move it away, or run again, or get {url} elsewhere"
        require(not wrong, f"{path}: expected {wrong}, got {', '.join(found)}; {remedy}")
        if path == part and len(pins) == 1 and pins[0].isdigit():
            note(f"{url}: the server named no digest, only the size was checked")
        os.replace(path, target)
    return target


def anonymous_session(url: str) -> requests.Session:
    """With the environment's proxies, none for loopback, but without ~/.netrc, of which requests
    sends a password after every redirect, even where `auth` is given."""
    session = requests.Session()
    session.trust_env = False
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    session.verify = bundle or True
    if not re.match(r"https?://(127\.[\d.]+|localhost|\[::1\])([:/]|\Z)", url):
        session.proxies = requests.utils.get_environ_proxies(url)
    return session


def fetch(url: str, part: Path) -> list[str]:
    """Append to `part` what it lacks -> the sha256 that the server names, if any. InputError."""
    part.touch()
    for seconds in (0.2, 0.4, 0.8, 1.6, 0):
        done = part.stat().st_size
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}  # bytes of the file
        try:
            how = {"headers": headers, "stream": True, "timeout": (10, 60)}  # seconds
            with anonymous_session(url) as session, session.get(url, **how) as response:
                if response.status_code == 416:  # the part is longer than the file, or whole
                    os.truncate(part, 0)
                response.raise_for_status()
                if not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                    os.truncate(part, 0)  # a server without ranges sends the whole file
                    done = 0
                total = done + int(response.headers.get("Content-Length") or 0)
                progress = Progress(f"download {part.stem}", total)
                with open(part, "ab") as file:
                    for block in response.iter_content(1 << 16):
                        done += file.write(block)
                        progress.update(done)
                progress.close()
            if done >= total:  # Hugging Face names the digest on its redirect
                hops = [*response.history, response]
                tags = " ".join(hop.headers.get("X-Linked-ETag", "") for hop in hops)
                return re.findall(r"\b[0-9a-f]{64}\b", tags)
            why = f"cut after {done:,} of {total:,} bytes"
        except requests.RequestException as error:
            why = fold(str(error))[:150]
        time.sleep(seconds)
    remedy = f"run again (it resumes), or put it at {part.with_suffix('')} or in a mirror"
    raise InputError(f"cannot fetch {url} ({why}); {remedy} (QCRD_MIRROR)")


# ---------------------------------------------------------------------- 2. The archive of [DSS]

MEMBER_LIMIT = 1 << 30  # bytes of an unpacked member, ten times e-SNLI's training file
# What damaged members raise; the errors of json and of codecs are ValueErrors.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, TypeError, KeyError)


class Example(NamedTuple):
    input: str
    label: str


def open_archive(archive: str | Path) -> zipfile.ZipFile:
    """The user's datasets.zip, or the pinned one, fetched once. Raises InputError."""
    path = Path(archive or download("datasets.zip"))
    try:
        if archive:
            note(f"{path}: sha256 {digests(path)[0]} (unverified)")
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no readable zip file ({error}); give a datasets.zip") from None


def read_member(archive: zipfile.ZipFile, name: str, convert: Callable) -> Iterator:
    """convert(value) of each line's JSON value. Raises InputError with member and line."""
    where = f"{archive.filename}: {name}"
    require(name in archive.NameToInfo, f"{where} is missing; get the whole datasets.zip")
    size, number = archive.NameToInfo[name].file_size, 0
    require(size <= MEMBER_LIMIT, f"{where} unpacks to {size:,} bytes; this is not datasets.zip")
    try:
        for number, line in enumerate(archive.open(name), 1):
            yield convert(json.loads(line))
    except DAMAGE as error:
        what = f"{type(error).__name__} {fold(str(error))[:100]}"
        raise InputError(f"{where} line {number}: {what}; get the archive again") from None


def archive_example(task: str, row: dict) -> Example:
    """A record of the archive as question and label, in the text formats of [DSS]."""
    if task == "svamp":
        return Example(row["input"], row["label"])
    if task == "cqa":
        choices = [f"({a}) {text}" for a, text in zip("abcde", row["choices"], strict=True)]
        text = "\n".join([row["question"], "Answer Choices:", *choices])
        return Example(text, row["choices"][row["choices"].index(row["answer"])])
    # T5's end-of-sequence token joins premise and hypothesis.
    return Example(row["premise"] + "</s>" + row["hypothesis"], NLI[(0, 1, 2).index(row["label"])])


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write JSON lines, all or none."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def palm_samples(name: str, archive: str | Path = "") -> Path:
    """data/<name>/teacher-palm.jsonl, lines {"question", "slot": 0, "text", "finish": "stop"}:
    PaLM-540B's published texts, raw, one a question of training and validation. InputError."""
    path = root() / "data" / name / "teacher-palm.jsonl"
    if path.is_file():
        return path
    require(name in TASKS[1:], f"{name}: PaLM's rationales are of {', '.join(TASKS[1:])} only")
    task, opened, texts = load_task(name, archive=archive), open_archive(archive), []
    for split, i in itertools.product(("train", "valid"), range(1000)):
        file = f"datasets/{name}/llm/{split}_CoT_{i}.json"  # a list of texts on one line
        if file in opened.NameToInfo:
            texts += next(read_member(opened, file, list))
    questions = [example.input for example in task.train + task.valid]
    counts = f"{len(texts)} rationales, {len(questions)} questions"
    require(len(texts) == len(questions), f"{opened.filename}: {counts}; get the archive again")
    pairs = zip(questions, texts)
    rows = ({"question": q, "slot": 0, "text": text, "finish": "stop"} for q, text in pairs)
    write_lines(path, rows)
    return path


# ---------------------------------------------------------------------------------------- 3. Tasks


@dataclass(frozen=True)
class Task:
    name: str  # as the user gave it
    kind: str  # "number", "choice", "nli" or "text": how answers are read and compared
    folder: Path  # data/<task>/, for the teacher's samples
    train: list[Example]
    valid: list[Example]
    test: list[Example]
    options: tuple[str, ...]  # the labels, where they are few and the same for all questions


def ensure(name: str, archive: str | Path = "") -> Path:
    """The folder of a task, data/<name>/ with {train,valid,test}.jsonl of {"input", "label"}, or of
    a student, weights/<name>/, made where it is missing. Raises InputError."""
    if name not in TASKS:
        return ensure_student(name)
    folder = root() / "data" / name
    if name == "demo":
        splits = {s: [Example(p.text, p.label) for p in demo_problems(s)] for s in SPLITS}
    elif all((folder / f"{split}.jsonl").is_file() for split in SPLITS):
        return folder
    elif name == "svamp" and not archive:
        rows = json.loads(download("SVAMP.json").read_text(encoding="utf-8"))
        rows = [rows[i] for i in np.random.RandomState(0).permutation(1000)]  # [DSS]
        examples = [Example(f"{row['Body']}\n{row['Question']}", row["Equation"]) for row in rows]
        splits = {"train": examples[:800], "test": examples[800:]}
    else:
        opened = open_archive(archive)
        convert = functools.partial(archive_example, name)
        files = {split: f"datasets/{name}/{name}_{split}.json" for split in SPLITS}
        if files["valid"] not in opened.NameToInfo:
            del files["valid"]
        splits = {split: read_member(opened, file, convert) for split, file in files.items()}
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(list(splits["train"]))
    for split, examples in splits.items():
        write_lines(folder / f"{split}.jsonl", (example._asdict() for example in examples))
    return folder


def hold_out(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Training and validation examples: the last tenth, at least one, is for validation [ours]."""
    count = max(1, len(examples) // 10)
    return examples[:-count], examples[-count:]


def load_task(name: str, answer: str = "text", archive: str | Path = "") -> Task:
    """A built-in task, fetched where it is missing, or a folder with train.jsonl, test.jsonl and
    perhaps valid.jsonl; answer, what its labels are: "text" or "number". Raises InputError."""
    kind = KINDS.get(name, answer)
    folder = ensure(name, archive) if name in TASKS else Path(name)
    require(folder.is_dir(), f"task {name}: neither a folder nor one of {', '.join(TASKS)}")
    train, test = (read_split(folder / f"{split}.jsonl", kind) for split in ("train", "test"))
    if (folder / "valid.jsonl").exists():
        valid = read_split(folder / "valid.jsonl", kind)
    else:
        require(len(train) > 1, f"{folder}/train.jsonl: too short to hold out a validation set")
        train, valid = hold_out(train)
        note(f"note: {folder} has no valid.jsonl: the last {len(valid)} training questions are it")
    options = NLI if kind == "nli" else tuple(sorted({example.label for example in train}))
    few = kind == "nli" or kind == "text" and len(options) <= 20 and len(options) < len(train)
    samples = root() / "data" / folder.resolve().name
    return Task(name, kind, samples, train, valid, test, options if few else ())


def read_split(path: Path, kind: str) -> list[Example]:
    """The examples of a JSONL file, read line by line. Raises InputError with file and line."""
    examples = []
    require(path.is_file(), f"{path}: no such file; a task needs train.jsonl and test.jsonl")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                examples.append(parse_example(line, kind, f"{path}:{number}"))
    require(len(examples) > 0, f"{path}: holds no question")
    return examples


def parse_example(line: bytes, kind: str, where: str) -> Example:
    """One line of a data file; a number as label becomes text. Raises InputError."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        question, label = record["input"], record["label"]
        label = str(label) if type(label) in (int, float) else label
        empty = not question.strip() or not label.strip()
        (question + label).encode()  # half of a surrogate pair is JSON, but not UTF-8
    except UnicodeError:
        raise InputError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f'{where}: not like {{"input": "text", "label": "text"}}') from None
    require(not empty, f"{where}: an empty input or label")
    shown = f"{where}: label {label[:40]!r}"
    require(kind != "nli" or label in NLI, f"{shown} must be one of {', '.join(NLI)}")
    good = kind != "number" or value(label) is not None  # any text but a blank one has a key
    require(good, f"{shown} is no number and no equation; --answer text compares text")
    return Example(question, sys.intern(label))  # one object for the 549,367 labels of e-SNLI


# -------------------------------------------------------------------------------------- 4. Prompts

# In words of ours; explanation and answer in a fixed format are the paper's [figure].
STEPS = "Explain your reasoning step by step in a few short sentences, then give the answer"
INSTRUCTIONS = {
    "number": f"You solve word problems. {STEPS} as an equation without its result and unit.",
    "choice": f"You answer questions. {STEPS}: one of the choices, with its letter.",
    "nli": f"You decide what follows from a premise. {STEPS}.",
    "text": f"You answer questions. {STEPS} in as few words as possible.",
}
FORMS = {"number": "( 12 + 5 )", "choice": "(c) the choice", "nli": "neutral", "text": "the answer"}


def messages(task: Task, question: str, own: str = "") -> list[dict]:
    """System and user message for one question. own: a system message of the user's instead."""
    options = f"The answer must be one of: {', '.join(task.options)}. " if task.options else ""
    form = f"<Explanation>: your explanation <Answer>: {FORMS[task.kind]}"
    system = f"{INSTRUCTIONS[task.kind]} {options}Keep to this format and write no more:\n{form}"
    system = own.strip() or system
    if task.kind == "nli":
        question = "Premise: " + question.replace("</s>", "\nHypothesis: ", 1)
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


# -------------------------------------------------------------------------------------- 5. Answers

SIGNS = str.maketrans({"÷": "/", "×": "*", "−": "-"})
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.USub: neg}


def value(expression: str) -> float | None:
    """The value of a number or of an equation in + - * / and brackets; None for anything else.

    The parsed tree is walked, nothing runs as code; length, digits and operators are bounded.
    """
    text = expression[:201].translate(SIGNS).strip()
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)  # 1,234
    text = re.sub(r"(?<![0-9.])0+(?=[0-9])", "", text)  # 007, which Python refuses
    if len(expression) > 200 or re.search(r"[^-+*/(). 0-9]|[0-9]{16}|\*\*|//", text):
        return None

    def walk(node: ast.expr) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)
        operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return OPERATORS[type(node.op)](*map(walk, operands))  # no .op: (1)(2) is a call

    try:
        result = walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, AttributeError, TypeError, LookupError, ArithmeticError, MemoryError):
        return None
    return result if math.isfinite(result) else None


QUOTES = "\"'`“”„‟‘’‚‛«»‹›「」『』"
STOPS = ".。．｡।॥۔։።"  # full stops: Latin, Chinese, Hindi, Urdu, Armenian, Amharic
EDGES = QUOTES + STOPS + ",;:!?()[]{}<>=*_$|\\…–—，、；：！？（）"  # not "#", "+", "-", "%", "/"


def bare(text: str) -> str:
    """Folded, without quotes around it and final stops, unless it is nothing else."""
    text = fold(text)
    rest = text.rstrip(STOPS + " ") or text
    while len(rest) > 2 and rest[0] in QUOTES and rest[-1] in QUOTES:  # not 5", not 'tis
        inner = rest[1:-1].strip()
        rest = inner.rstrip(STOPS + " ") or inner
    return rest or text


def answer_key(kind: str, answer: str | None) -> str | None:
    """What equal answers share: the value rounded to 1e-4, or the bare text in NFC, case-folded
    [ours; DSS: the text exactly]. No other sign is dropped: C is not C#."""
    if kind == "number":
        number = value(answer or "")
        return None if number is None else f"{round(number, 4) + 0.0:.4f}"  # + 0.0: -0 is 0
    folded = unicodedata.normalize("NFC", answer or "").casefold()
    return bare(unicodedata.normalize("NFC", folded)) or None


def is_right(kind: str, answer: str | None, label: str) -> bool:
    """The metric [DSS]: equal values, else equal texts, as `answer_key` compares them [ours]."""
    key = answer_key(kind, answer)
    return key is not None and key == answer_key(kind, label)


class Sample(NamedTuple):
    rationale: str  # what stands before the answer part
    answer: str | None  # as it was written, a choice as the text of its option; None: unreadable


# What announces an answer, repeated or not: "<Answer>:", "So the answer is", "####", "\boxed{".
# A sign behind the space may be the answer's own: "Answer: $5".
ANNOUNCED = r"""( \*{0,2} (\b(so|thus|hence|therefore),?\s+)? (\b(the|my)\s+)?
    (\b(final|correct)\s+)? (<answer>|\banswer) (\sto\s[^.:\n]{1,40}?)?
    \**\s* (is\s*:?|would\sbe\s*:?|=|:) | \#{4} | \\boxed\s*\{ )"""
MARK = re.compile(rf"(?ix) {ANNOUNCED} ([\s$*]* {ANNOUNCED})* (\*+(?=\s))? \s* (\*\*[ ]+)?")
# Not in "Dr. No" and "B. the"; "!" and "?" belong to the answer.
SENTENCE = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z][a-z])([.;]|(?<=[!?]))(?=\s|\Z)|\n")
OPENING = re.compile(r"\A\W*(explanation|rationale|reasoning|a)\W*:\s*", re.IGNORECASE)
RUN_ON = re.compile(r"\n\s*(?:Q|Question|Premise|Problem) ?:", re.IGNORECASE)  # of base models
LETTER = re.compile(r"\W*(?:(?:option|choice)\W+)?([a-h])(?:[).:]|[^\w#+]*\Z)", re.IGNORECASE)
NUMBER = r"(?: *-?\()* *-?\.?\d[\d,]*(?:\.\d+)?[) ]*"
EQUATION = re.compile(f"{NUMBER}(?:[-+*/^]+{NUMBER})*")
PLAIN = {  # LaTeX and units
    r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}": r"((\1)/(\2))",
    r"\\times\b|\\cdot\b|(?<=[0-9)])\s*[xX]\s*(?=[0-9(])": " * ",
    r"\\div\b": "/",
    r"\\[a-zA-Z]+|[\\${}€£]|(?<=\d)\s*[a-zA-Z]+\s*(?=\))": "",  # (42 apples)
}


def read_sample(task: Task, question: str, text: str, cut: bool = False) -> Sample:
    """Rationale and answer of a text, of the teacher's and of the student's [ours].

    The answer follows the last MARK that can be read; without any it is the last number, or the
    only option named. cut: the length limit ended the text; an answer at its very end is none.
    """
    text = text[-2_000_000:].rpartition("</think>")[2].partition("<think>")[0][:20_000]
    text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair: ?
    text = OPENING.sub("", RUN_ON.split(text.strip(), maxsplit=1)[0]).strip()
    options = list(task.options)
    if task.kind == "choice":
        options = re.findall(r"^\([a-h]\) (.*)$", question, re.MULTILINE)
    marks = list(MARK.finditer(text))[-20:]
    for mark in reversed(marks):
        end = SENTENCE.search(text, mark.end() + 1)  # "Answer: ?" is one
        said = text[mark.end() : end.start() if end else len(text)][:300]
        if mark[0].rstrip().endswith("{"):
            said = re.sub(r"\}[^{}]*\Z", "", said)  # the end of \boxed{
        answer = None if cut and not end else read_answer(task.kind, options, said, first=True)
        if answer is not None:
            start = mark.start()
            if mark[0].startswith("\\"):  # a box stands inside its sentence
                start = max(text.rfind("\n", 0, start), text.rfind(". ", 0, start)) + 1
            return Sample(text[:start].strip().translate(SIGNS), answer)
    known = None if marks or cut else read_answer(task.kind, options, text, first=False)
    return Sample(text.translate(SIGNS), known)


def read_answer(kind: str, options: list[str], text: str, first: bool) -> str | None:
    """The first answer of a text, or its last number or the only option that it names."""
    if kind == "number":
        return read_number(text, first)
    if first:  # without the Markdown or LaTeX around the whole of it
        text = re.sub(r"\\(?:text|math|mbox)\w*\s*\{([^{}]*)\}", r"\1", text)
        text = re.sub(r"\A(\*\*)?(.+)\*\*\Z", r"\2", text.strip())  # **Answer: yes**
        text = bare(re.sub(r"\A([*$])((?:(?!\1).)+)\1\Z", r"\2", text))
    if not options:
        return text or None if first else None
    if kind == "choice" and (letter := LETTER.match(text)):
        return dict(zip("abcdefgh", options)).get(letter[1].lower())
    named = options_in(text, options)
    return named[0] if len(named) == 1 or named and first else None


def options_in(text: str, options: list[str]) -> list[str]:
    """The options that a text names, in its order; of two at one place the longer one."""
    edge = re.escape(EDGES) + r"\s"  # what may touch an option: "C#" does not name "C"
    keys = {answer_key("text", option) or "\n": option for option in options}  # "\n" is in no key
    words = "|".join(map(re.escape, sorted(keys, key=len, reverse=True)))
    found = re.findall(rf"(?<![^{edge}])(?:{words})(?![^{edge}])", answer_key("text", text) or "")
    return [keys[key] for key in dict.fromkeys(found)]


def read_number(text: str, first: bool) -> str | None:
    """The first or last number or equation, behind the last "=" if one is there."""
    text = text[-1000:].translate(SIGNS)
    for pattern, plain in PLAIN.items():
        text = re.sub(pattern, plain, text)
    found = EQUATION.findall(text.rpartition("=")[2]) or EQUATION.findall(text)
    if not found:
        return None
    equation = found[0] if first else found[-1]
    if first and re.search(r"\s[-+*/]\s", text.rpartition("=")[2].replace(equation, " ", 1)):
        return None  # "(some - 12)": a part is unknown
    equation = equation.strip(" ,")
    while equation.endswith(")") and equation.count(")") > equation.count("("):
        equation = equation[:-1].strip()
    return equation if value(equation) is not None else None


# ------------------------------------------------------------------------------------- 6. The demo
#
# A generated task like SVAMP, its rule-based teacher, and how its student is pretrained.

SIZES = {"train": 400, "valid": 400, "test": 1000}
LIMIT, NUMBERS, FACTORS = 30, 20, 9  # amounts stay below 30, numbers of a text go up to 20 or 9
TURN = 12  # more than this is many
DISTRACTED = 0.5  # share of the problems
DEMO_STEPS = {1: 0.25, 2: 0.5, 3: 0.25}  # number of steps -> share of the demo's problems
PRETRAINING_STEPS = {1: 0.35, 2: 0.45, 3: 0.2}  # and of the pretraining's

PEOPLE = "Ana Ben Dev Emma Finn Hugo Iris Kira Leo Maya Noah Olga".split()
THINGS = "apples balls books cards coins cups eggs hats keys mugs pears rocks shells toys".split()

# A block a kind of step, `s op u`: s is what there is before the step, u the step's own number.
#     name, operation, the kind that a person takes it for, what is asked of a story ending with it
#     how a story tells it
#     what the teacher says of it; {sum} is the sum worked out, as in "12 + 5 = 17"
#     how the explanations of the pretraining put it; a kind without this line is in none of them
# The operation ? depends on the amount: - where s is more than TURN, {t}, and else +.
# {a} {b} {c} are people, {o} the things that count, {p} other things; "|" separates phrases.
STORIES = """
groups * parts now
    {a} has {s} boxes with {u} {o} in each. | {a} fills {s} bags with {u} {o} each.
    {s} groups of {u} {o} are {sum}. | {a} has {s} times {u} {o}, {sum}.
    there are {s} lots of {u} | each of the {s} holds {u} {o} | {u} {o} are counted {s} times
parts + groups now
    {a} has {s} {o} at home and {u} {o} at school. | {a} picks {s} {o} today and {u} {o} later.
    Both parts make {sum} {o}. | {a} has {s} and {u} {o}, {sum}.
    we put {s} and {u} together | {a} owns {s} {o} and also {u} | {s} {o} are joined by {u}
gain + loss now
    {a} finds {u} more {o}. | {b} gives {a} {u} {o}. | Then {a} buys {u} {o}.
    {a} gets {u} more, {sum}. | {u} {o} come in, {sum}.
    {u} {o} are new | {a} owns {u} more than before | we add the {u} {o}
loss - gain now
    {a} gives {u} {o} to {b}. | {a} loses {u} {o}. | Then {a} sells {u} {o}.
    {u} of the {o} go away, {sum}. | {a} is left with {sum}.
    {u} {o} are gone | {a} owns {u} less than before | we take off the {u} {o}
share / loss friend
    {a} shares the {o} equally among {u} friends. | {u} friends split the {o} of {a} equally.
    Each of {u} friends gets {sum}. | Split in {u} equal shares: {sum}.
    we divide the {o} by {u} | {u} friends take the same part | {a} makes {u} parts
times * more other
    {b} has {u} times as many {o} as {a}. | {b} owns {u} times the {o} of {a}.
    {b} has {u} times that, {sum}. | {u} times as many are {sum}.
    we multiply the {o} by {u} | {b} owns {u} for each of them | the {o} of {b} are {u} times more
more + fewer other
    {b} has {u} more {o} than {a}. | {b} owns {u} {o} more than {a}.
    {b} has {u} more, {sum}. | {u} more than that are {sum}.
    {b} owns {u} {o} extra | {b} is {u} above {a} | we count {u} up to {b}
fewer - more other
    {b} has {u} fewer {o} than {a}. | {b} owns {u} {o} fewer than {a}.
    {b} has {u} fewer, {sum}. | {u} fewer than that are {sum}.
    {b} lacks {u} {o} | {b} is {u} below {a} | we count {u} down to {b}
both + gap both
    {b} has {u} {o}. | {b} owns {u} {o}. | {u} {o} belong to {b}.
    {b} has {u}, together {sum}. | With the {u} of {b} there are {sum}.
gap - both gap
    {b} has {u} {o}. | {b} owns {u} {o}. | {u} {o} belong to {b}.
    {b} has {u}, the difference is {sum}. | {a} is ahead of {u} by {sum}.
cost * gain cost
    Each of the {o} costs {u} dollars. | The price of one is {u} dollars.
    One costs {u}, all of them {sum}. | {s} times the price of {u} is {sum}.
pack / loss pack
    One crate holds {u} {o}. | {u} {o} fit into a crate.
    A crate takes {u}, so we need {sum}. | Crates of {u} are {sum}.
rule ? gain now
    If {a} has more than {t} {o}, {b} takes {u}, else {b} brings {u}. |
    {b} takes {u} {o} if {a} has over {t} and brings {u} if not.
    {s} is {than} {t}, so {sum}. | {b} sees {s}, {than} {t}: {sum}.
"""
# How a story opens, a number {d} that the answer does not need, and the questions.
OTHERS = """
open {a} has {s} {o}. | There are {s} {o} in {a}'s room. | {a} collects {s} {o}.
distractor {a} also has {d} {p}. | {c} has {d} {o}. | {b} buys {d} {p}. | Last year {a} had {d} {o}.
now How many {o} does {a} have now? | How many {o} are there with {a} in the end?
other How many {o} does {b} have? | How many {o} are {b}'s?
friend How many {o} does each friend get? | How many {o} are there for each friend?
both How many {o} do {a} and {b} have together? | How many {o} do {a} and {b} have in all?
gap How many more {o} does {a} have than {b}? | By how many {o} is {a} ahead of {b}?
cost How many dollars do the {o} of {a} cost? | What does {a} pay for the {o} in dollars?
pack How many crates does {a} fill? | How many crates are there for the {o} of {a}?
"""


class Kind(NamedTuple):
    """A block of STORIES."""

    op: str
    wrong: str
    ask: str
    tell: list[str]
    why: list[str]
    plain: Sequence[str] = ()


def read_stories() -> Iterator[tuple[str, Kind]]:
    """The blocks of STORIES with their names."""
    for block in re.split(r"\n(?=\w)", re.sub(r"\|\n +", "| ", STORIES.strip())):
        heading, *lines = block.split("\n")
        name, *words = heading.split()
        yield name, Kind(*words, *(line.strip().split(" | ") for line in lines))


MOVES = dict(read_stories())
OTHER = dict(line.split(maxsplit=1) for line in OTHERS.strip().split("\n"))
OTHER = {name: phrases.split(" | ") for name, phrases in OTHER.items()}
TAUGHT = {kind for kind in MOVES if not MOVES[kind].plain}  # by the demo's training set alone
OPENERS, CHANGES = ("groups", "parts"), ("gain", "loss", "rule")  # other steps may follow these


class Problem(NamedTuple):
    """A word problem and its solution."""

    text: str  # body, newline, question, as in SVAMP
    label: str  # the equation, spaced as in SVAMP: "( ( 12 + 5 ) / 6 )"
    first: int  # what the solution starts from
    steps: tuple[tuple[str, int], ...]  # kind and number of each step
    words: dict[str, str]  # what {a} {b} {c} {o} {p} stand for
    distractor: int | None


def operation(kind: str, s: int) -> str:
    """What a step does to the amount s: "+", "-", "*" or "/"."""
    return MOVES[kind].op.replace("?", "-" if s > TURN else "+")


def calculate(s: int, op: str, u: int) -> int | None:
    """s op u, or None where the story would not have it: not whole, not above 0, too large."""
    result = {"+": s + u, "-": s - u, "*": s * u, "/": s / u}[op]
    return int(result) if 0 < result < LIMIT and result == int(result) else None


def solve(first: int, steps: Iterable[tuple[str, int]]) -> tuple[str, list[int | None]]:
    """The steps as an equation, and the amounts: at first and after each step, up to a None."""
    equation, amounts = str(first), [first]
    for kind, u in steps:
        if amounts[-1] is not None:
            op = operation(kind, amounts[-1])
            equation = f"( {equation} {op} {u} )"
            amounts.append(calculate(amounts[-1], op, u))
    return equation, amounts


@functools.cache
def plans(steps: int, taught: bool | None) -> list[tuple[str, ...]]:
    """The kinds of steps, in order, that a problem of 1 to 3 steps may have.

    taught: with a kind that only the demo teaches, or without; None: either.
    """
    last = [kind for kind in MOVES if steps == 1 or kind not in OPENERS]
    found = itertools.product(*[OPENERS + CHANGES, CHANGES][: steps - 1], last)
    if steps == 3:  # a product after a sum leaves hardly any amounts below LIMIT
        found = (plan for plan in found if plan[1] != "gain" or MOVES[plan[2]].op != "*")
    return [plan for plan in found if taught in (None, not TAUGHT.isdisjoint(plan))]


def make_problem(rng: random.Random, shares: dict[int, float], taught: bool | None) -> Problem:
    """Draw a problem, with a distractor or none. shares: of problems of 1, 2 and 3 steps."""
    plan = rng.choice(plans(rng.choices([*shares], [*shares.values()])[0], taught))
    words = dict(zip("abcop", rng.sample(PEOPLE, 3) + rng.sample(THINGS, 2)))
    while True:
        first = rng.randint(2, FACTORS if plan[0] == "groups" else NUMBERS)
        steps = [(k, rng.randint(2, FACTORS if MOVES[k].op in "*/" else NUMBERS)) for k in plan]
        label, amounts = solve(first, steps)
        numbers = {first, *(u for _, u in steps)}
        if None not in amounts and len(numbers) == len(amounts):
            break
    parts = [(MOVES[kind].tell, u) for kind, u in steps]
    if plan[0] not in OPENERS:
        parts.insert(0, (OTHER["open"], None))
    distractor = None
    if rng.random() < DISTRACTED:
        distractor = rng.choice([d for d in range(2, NUMBERS + 1) if d not in numbers])
        parts.insert(rng.randint(0, len(parts)), (OTHER["distractor"], None))
    parts.append((OTHER[MOVES[plan[-1]].ask], None))
    told = []
    for phrases, u in parts:
        told.append(rng.choice(phrases).format(**words, s=first, u=u, d=distractor, t=TURN))
    text = " ".join(told[:-1]) + "\n" + told[-1]
    return Problem(text, label, first, tuple(steps), words, distractor)


@functools.cache
def demo_problems(split: str) -> tuple[Problem, ...]:
    """The problems of a split, always the same; no text is in two splits."""
    rng = random.Random(f"demo {split}")
    seen = {p.text for earlier in SPLITS[: SPLITS.index(split)] for p in demo_problems(earlier)}
    problems: dict[str, Problem] = {}
    while len(problems) < SIZES[split]:
        problem = make_problem(rng, DEMO_STEPS, taught=True)
        if problem.text not in seen:
            problems.setdefault(problem.text, problem)
    return tuple(problems.values())


# How often the teacher errs at temperature 0.7 on easy and on hard questions, and which part of
# the questions of one, two and three steps is hard. Set so that a vote of five comes near the
# paper's (3.87 positives a question, more than half of the questions with positives only).
EASY_ERRORS, HARD_ERRORS, HARD = 0.005, 0.52, {1: 0.2, 2: 0.55, 3: 0.7}
DISMISSALS = ("The {d} does not matter.", "We do not need the {d}.")


def mistakes(p: Problem) -> list[tuple[int, list[tuple[str, int]]]]:
    """Wrong solutions, as first amount and steps: a step is taken for another, the distractor's
    number is used, or a step is forgotten."""
    steps, found = list(p.steps), []
    for i, (kind, u) in enumerate(steps):
        changes = [[(MOVES[kind].wrong, u)]]
        if p.distractor:
            changes.append([(kind, p.distractor)])
        if len(steps) > 1:
            changes.append([])
        found += [(p.first, [*steps[:i], *change, *steps[i + 1 :]]) for change in changes]
    if p.distractor:
        found.append((p.distractor, steps))
    right = solve(p.first, steps)[1][-1]
    return [solution for solution in found if solve(*solution)[1][-1] not in (None, right)]


def explain(p: Problem, first: int, steps: Sequence, rng: random.Random) -> str:
    """A solution as the teacher writes it."""
    equation, amounts = solve(first, steps)
    said = []
    if p.distractor not in (None, first, *(u for _, u in steps)) and rng.random() < 0.4:
        said.append(rng.choice(DISMISSALS).format(d=p.distractor))
    for (kind, u), s, result in zip(steps, amounts, amounts[1:]):
        known = {"s": s, "u": u, "t": TURN, "than": "more than" if s > TURN else "at most"}
        known["sum"] = f"{s} {operation(kind, s)} {u} = {result}"
        said.append(rng.choice(MOVES[kind].why).format(**p.words, **known))
    return f"<Explanation>: {' '.join(said)} <Answer>: {equation}"


def teacher_answer(p: Problem, seed: int | None, temperature: float) -> str:
    """The teacher's answer, a function of question and seed; always right at temperature 0."""
    rng = random.Random(f"{p.text}|{seed if temperature else 'greedy'}")
    hard = random.Random(p.text).random() < HARD[len(p.steps)]  # the same for all samples
    errors = (HARD_ERRORS if hard else EASY_ERRORS) * min(temperature / 0.7, 1.5)
    solutions = mistakes(p) if rng.random() < errors else []
    return explain(p, *rng.choice(solutions or [(p.first, p.steps)]), rng)


# What made weights/demo/: see weights/README.md. A mixture like T5 1.0's, in small: span
# corruption and supervised pairs.
SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4}
SHAPE |= {"num_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0}
PRETRAINING = {"steps": 9000, "batch": 32, "lr": 1.5e-3, "share": 0.9, "max_length": 96}
COUNTS = {"stories": 20000, "equations": 30000, "explanations": 90000, "chains": 70000}
FRAMES = ["{x}: {sum}.", "{x}, so {sum}.", "Because {x}, {sum}.", "{x}. That makes {sum}."]
FRAMES += ["{x}, then {sum} {o}.", "{sum}."]


def plain_explanation(p: Problem, rng: random.Random) -> str:
    """A right solution in the words of the pretraining."""
    frame, amounts, said = rng.choice(FRAMES), solve(p.first, p.steps)[1], []
    for (kind, u), s, t in zip(p.steps, amounts, amounts[1:]):
        clause = rng.choice(MOVES[kind].plain).format(**p.words, s=s, u=u)
        said.append(frame.format(**p.words, x=clause, sum=f"{s} {MOVES[kind].op} {u} = {t}"))
    return " ".join(said)


def chain(rng: random.Random, length: int = 4) -> tuple[str, str]:
    """An equation of up to `length` operations without a story, and its sums one by one."""
    s = rng.randrange(2, LIMIT)
    equation, said = str(s), []
    for _ in range(length):
        op = rng.choice("+-*/")
        fits = [u for u in range(1 if op in "+-" else 2, LIMIT) if calculate(s, op, u)]
        if fits:
            u = rng.choice(fits)
            equation = f"( {equation} {op} {u} )"
            said.append(f"{s} {op} {u} = {calculate(s, op, u)}.")
            s = calculate(s, op, u)
    return equation, " ".join(said)


def pretraining_data() -> tuple[list[str], list[tuple[str, str]]]:
    """Texts for span corruption and (input, target) pairs, seeded. Not in them: problems of the
    demo and sentences of the teacher; not in the pairs: steps of a kind that the demo teaches."""
    rng = random.Random("pretraining")
    known = {p.text for split in SPLITS for p in demo_problems(split)}

    def problems(count: int, taught: bool | None) -> list[Problem]:
        drawn = [make_problem(rng, PRETRAINING_STEPS, taught) for _ in range(count)]
        return [p for p in drawn if p.text not in known]

    texts = [p.text for p in problems(COUNTS["stories"], None)]
    pairs = [(f"predict: {p.text}", p.label) for p in problems(COUNTS["equations"], False)]
    for p in problems(COUNTS["explanations"], False):
        pairs.append((f"explain: {p.text}", plain_explanation(p, rng)))
    for equation, sums in (chain(rng) for _ in range(COUNTS["chains"])):
        if sums:
            pairs.append((f"explain: {equation}", sums))
    return texts, pairs


def train_vocabulary(path: Path, texts: Iterable[str]) -> None:
    """A SentencePiece model of 1,100 pieces: the words of all tables, signs, each number below 100;
    other text is spelled by letters and bytes."""
    phrases = [*FRAMES, *DISMISSALS, *sum(OTHER.values(), []), "predict explain answer"]
    for kind in MOVES.values():
        phrases += [*kind.tell, *kind.why, *kind.plain]
    words = sorted(set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", " ".join(phrases)))))
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "bpe"}
    options |= {"vocab_size": 1100, "hard_vocab_limit": False, "byte_fallback": True}
    options |= {"user_defined_symbols": [f"▁{piece}" for piece in (*range(100), *"()+-*/=")]}
    options |= {"character_coverage": 1.0, "required_chars": "".join(map(chr, range(33, 127)))}
    lines = (text.replace("\n", " ") for text in [*texts, *50 * words])
    train = sentencepiece.SentencePieceTrainer.train
    with atomic(path) as temporary, open(temporary, "wb") as file:
        train(sentence_iterator=lines, model_writer=file, num_threads=1, minloglevel=2, **options)


def pretrain_demo(folder: Path = HERE / "weights" / "demo", steps: int = 0) -> Path:
    """Make the demo's student, in half precision: on one machine and as many threads always the
    same weights. steps: fewer, for a test."""
    texts, pairs = pretraining_data()
    train_vocabulary(folder / "spiece.model", texts)
    tokenizer = t5.Tokenizer(folder / "spiece.model")
    torch.manual_seed(0)
    model = t5.T5(t5.T5Config(vocab_size=tokenizer.size + 100, **SHAPE))
    for name, parameter in model.named_parameters():
        # T5 starts near 0 and learns slowly: for thousands of steps heads are blind to positions
        if name.endswith("relative_attention_bias.weight"):
            torch.nn.init.normal_(parameter, std=2.0)
    options = PRETRAINING | ({"steps": steps} if steps else {})
    t5.pretrain(model, tokenizer, texts, pairs=pairs, **options)
    model.save(folder, vocab=folder / "spiece.model", dtype=torch.float16)
    return folder


# -------------------------------------------------------------------------------- 7. Teacher server


class Handler(BaseHTTPRequestHandler):
    """The part of OpenAI's API that a client needs, around the demo's teacher."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for the header's acknowledgement

    def log_message(self, *args: object) -> None:
        """Log nothing: a run makes hundreds of requests."""

    def reply(self, status: int, body: dict) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "demo-teacher", "object": "model"}]})

    def do_POST(self) -> None:
        try:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply(200, complete(json.loads(raw), self.server.problems))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self.reply(400, {"error": {"message": f"{type(error).__name__} {error}"}})


def complete(request: dict, problems: dict[str, "Problem"]) -> dict:
    """A request's response, both in OpenAI's form; ValueError and its like. Choice i of seed s is
    choice 0 of seed s + i: asking for slots one by one changes nothing."""
    prompt = fold(request["messages"][-1]["content"])
    known = max((text for text in problems if text in prompt), key=prompt.rfind, default=None)
    n, limit = request.get("n") or 1, request.get("max_tokens") or 1 << 20
    temperature, seed = request.get("temperature", 1.0), request.get("seed")
    seed = random.randrange(2**62) if seed is None else seed
    if not (n in range(1, 129) and limit > 0 and 0 <= temperature <= 2 and type(seed) is int):
        raise ValueError("n: 1 to 128, temperature: 0 to 2, max_tokens: from 1, seed: an integer")
    if not known:
        raise ValueError("this teacher answers the demo's questions alone")
    choices, written, read = [], 0, len(prompt.split())
    for i in range(n):
        text = teacher_answer(problems[known], seed + i, temperature)
        tokens = list(re.finditer(r"\w+|[^\w\s]", text))
        finish = "stop" if len(tokens) <= limit else "length"
        message = {"role": "assistant", "content": text[: tokens[:limit][-1].end()]}
        choices.append({"index": i, "message": message, "finish_reason": finish})
        written += min(len(tokens), limit)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    head = {"id": "chatcmpl-demo", "object": "chat.completion", "created": int(time.time())}
    return head | {"model": "demo-teacher", "choices": choices, "usage": usage}


def demo_teacher(port: int = 0) -> tuple[str, ThreadingHTTPServer]:
    """Start the demo's teacher in a thread on 127.0.0.1 -> base URL, server (`shutdown()` ends it).
    It answers the last demo problem in the last message. InputError: the port cannot be used."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} cannot be used ({error}); choose another --port") from None
    server.handle_error = lambda *_: None  # a client that went away
    server.problems = {fold(p.text): p for split in SPLITS for p in demo_problems(split)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1", server


# ------------------------------------------------------------------------------------- 8. Students

# The published config.json; what is not named is Hugging Face's default.
T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "relu"}
STUDENTS = {
    "t5-small": T5 | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": T5 | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}


def ensure_student(name: str) -> Path:
    """weights/<name>/, downloaded and converted once. Raises InputError."""
    for folder in (HERE / "weights" / name, root() / "weights" / name):
        if (folder / "config.json").is_file() and (folder / "spiece.model").is_file():
            return folder
    require(name in STUDENTS, f"{name}: not one of {', '.join([*TASKS, *STUDENTS])}")
    vocab, weights = download("spiece.model"), download(f"{name}/model.safetensors")
    weights.with_name("config.json").write_text(json.dumps(STUDENTS[name]))
    t5.T5.load(weights.parent).save(folder, vocab=vocab)
    return folder


# --------------------------------------------------------------------------------- 9. Command line


def main() -> int:
    """-> exit code, 2 with one line on stderr for a mistake of the user's."""
    return t5.run_program(run_command)


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="tasks, students, serve-teacher, pretrain-demo")
    parser.add_argument("--archive", default="", help="datasets.zip to read tasks and PaLM from")
    parser.add_argument("--port", type=int, default=8000, help="of serve-teacher; 0: a free one")
    args = parser.parse_args(sys.argv[1:] or ["--help"])
    for name in args.names:
        if name == "pretrain-demo":
            print(pretrain_demo())
        elif name == "serve-teacher":
            print(demo_teacher(args.port)[0], " (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        else:
            print(ensure(name, args.archive))
            if args.archive and name in TASKS and name != "demo":
                print(palm_samples(name, args.archive))


if __name__ == "__main__":
    sys.exit(main())
