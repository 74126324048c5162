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
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import re
import sys
import threading
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import requests

import t5
from t5 import InputError, Progress, atomic

HERE = Path(__file__).resolve().parent
TASKS = ("svamp", "cqa", "anli1", "esnli", "demo")
SPLITS = ("train", "valid", "test")


def root() -> Path:
    """The folder that data/ and weights/ lie in: the one of this file unless QCRD_HOME names another."""
    return Path(os.environ.get("QCRD_HOME") or HERE)


# ---------------------------------------------------------------- downloads

class Source(NamedTuple):
    """A pinned file. Of sha256 and git_blob at most one is set; with neither, the server's X-Linked-ETag names the sha256."""
    url: str
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None       # git's id of the content: sha1 of "blob <size>\0" + bytes


HUB = "https://huggingface.co/google-t5/"
SMALL, BASE = "t5-small/resolve/df1b051c49625cf57a3d0d8d3863ed4d13564fe4/", "t5-base/resolve/a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1/"
VOCABULARY_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
SOURCES = {
    "SVAMP.json": Source("https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
                         sha256="5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e"),
    # The archive of Distilling Step-by-Step (Hsieh et al., 2023): three datasets and PaLM-540B's rationales for four.
    "datasets.zip": Source("https://github.com/google-research/distilling-step-by-step/raw/ef944263c9ddfd40a9888557f3e7d17513fd1a7e/"
                           "datasets.zip", git_blob="fb9d88a0b44c2daac1ec1639f0bdae993e7e5bcd"),
    "t5-small/model.safetensors": Source(HUB + SMALL + "model.safetensors", size=242_043_056),
    "t5-small/spiece.model": Source(HUB + SMALL + "spiece.model", sha256=VOCABULARY_SHA256),
    "t5-base/model.safetensors": Source(HUB + BASE + "model.safetensors",
                                        sha256="a90903540cc02cbeb7ff9f823f1a80eb778c7e22426a0e620b01c77a5ec8f5b4"),
    "t5-base/spiece.model": Source(HUB + BASE + "spiece.model", sha256=VOCABULARY_SHA256),
}


def digest(path: Path, source: Source) -> str:
    """Hexadecimal digest of a file, of the kind that `source` pins."""
    h = hashlib.sha256() if not source.git_blob else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def mismatch(path: Path, source: Source) -> str | None:
    """What is wrong with a downloaded file, in words; None where it is what `source` pins."""
    size, expected = path.stat().st_size, source.git_blob or source.sha256
    if source.size is not None and size != source.size:
        return f"expected {source.size:,} bytes, got {size:,}"
    got = digest(path, source)
    if expected is None:
        print(f"{path.name}: the server named no digest; checked by size only, sha256 {got} (unverified)", file=sys.stderr)
    elif got != expected:
        return f"expected {'git blob' if source.git_blob else 'sha256'} {expected}, got {got}"
    return None


@contextlib.contextmanager
def locked_part(target: Path) -> Iterator[io.BufferedRandom | None]:
    """Open `target`.part for appending, held by this process alone; None where another process finished `target` meanwhile.

    The lock is the kernel's, so that a killed process leaves none behind.
    """
    part = Path(f"{target}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    while not target.exists():
        with open(part, "a+b") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            # While this process waited, the other one may have renamed the file it has open: then look again.
            if part.exists() and os.path.samestat(os.fstat(f.fileno()), part.stat()):
                yield f
                return
    yield None


def download(name: str) -> Path:
    """Fetch SOURCES[name] into data/downloads/ once: resumed, checked, then renamed into place.

    Raises InputError (no connection, refused, cut, wrong digest), naming the remedy. Deletes no finished file.
    """
    source, target = SOURCES[name], root() / "data" / "downloads" / name
    with locked_part(target) as part:
        if part is None:
            if wrong := mismatch(target, source):
                raise InputError(f"{target}: {wrong}; move this file away and run again")
            return target
        mirror = os.environ.get("QCRD_MIRROR", "")
        url = source.url
        if mirror.startswith(("http://", "https://")):
            url = mirror.rstrip("/") + "/" + url.removeprefix("https://")
        if mirror and url == source.url:
            url = str(Path(mirror) / url.removeprefix("https://"))
            copy_file(Path(url), part)
        else:
            source = source._replace(sha256=stream(url, part, source, target) or source.sha256)
        if wrong := mismatch(Path(part.name), source):
            part.truncate(0)           # nothing in it can be trusted to resume from
            raise InputError(f"{url}: {wrong}; the download was dropped: run again, or get the file elsewhere and put it at {target}")
        part.flush()
        os.fsync(part.fileno())
        os.replace(part.name, target)
    return target


def copy_file(path: Path, part: io.BufferedRandom) -> None:
    """Write the mirror's file `path` to the open part file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file in the mirror that QCRD_MIRROR names; put it there, or unset QCRD_MIRROR")
    part.truncate(0)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            part.write(block)
    part.flush()


def stream(url: str, part: io.BufferedRandom, source: Source, target: Path, tries: int = 5) -> str | None:
    """Append what is missing of `url` to the open part file; return the sha256 that X-Linked-ETag names, if none is pinned.

    A connection that breaks is taken up where it broke, as long as each attempt brings something, `tries` times otherwise.
    """
    failures, linked = 0, None
    while True:
        offset = part.seek(0, os.SEEK_END)
        try:
            # Compressed transfer would make a byte range count compressed bytes.
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as r:
                if r.status_code == 416 and offset:       # the part is longer than the file, or whole: the digest tells
                    if f"*/{offset}" in r.headers.get("Content-Range", ""):
                        return linked
                    part.truncate(0)
                    continue
                if r.status_code >= 500 or r.status_code in (408, 429):
                    raise requests.ConnectionError(f"HTTP {r.status_code}")
                if r.status_code not in (200, 206):
                    raise InputError(f"{url}: HTTP {r.status_code} {r.reason}; get the file elsewhere and put it at {target}")
                if r.status_code == 200 or not r.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                    part.truncate(0)
                    offset = 0
                    if r.status_code == 206:              # a range, but not the one asked for: ask for the whole
                        continue
                if not (source.sha256 or source.git_blob):
                    # Hugging Face names a large file's sha256 on the redirect, before the storage answers.
                    tags = [h.headers.get("X-Linked-ETag", "").strip('W/"') for h in (*r.history, r)]
                    linked = next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), linked)
                length = int(r.headers.get("Content-Length") or 0)
                progress, done = Progress(f"download {target.name}", offset + length), offset
                for block in r.iter_content(1 << 18):
                    part.write(block)
                    done, failures = done + len(block), 0
                    progress.update(done)
                progress.close()
                part.flush()
                if length and done < offset + length:
                    raise requests.ConnectionError(f"cut after {done:,} of {offset + length:,} bytes")
                return linked
        except requests.RequestException as why:
            part.flush()
            failures += 1
            if failures == tries or isinstance(why, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema)):
                reason = " ".join(str(why).split())[:160]
                raise InputError(f"cannot fetch {url} ({reason}); check the connection and run again (it resumes), name a mirror with "
                                 f"QCRD_MIRROR, or put the file at {target}") from None
            time.sleep(min(0.2 * 2 ** failures, 5))


# ---------------------------------------------------------------- tasks

MEMBER_LIMIT = 1 << 30                # bytes of one unpacked member; e-SNLI's training file is the largest, well below this
NLI = ("entailment", "neutral", "contradiction")


class Archive:
    """Distilling Step-by-Step's datasets.zip: members by exact name, every record checked by content before it is used."""

    def __init__(self, path: str | Path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as why:
            raise InputError(f"{path}: not a readable zip file ({why}); give a copy of datasets.zip") from None
        self.names = set(self.zip.namelist())

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[io.TextIOWrapper]:
        """Open a member as UTF-8 text; whatever is wrong with its bytes becomes an InputError that names it."""
        if name not in self.names:
            raise InputError(f"{self.path}: has no {name}; this copy of the archive is incomplete")
        if self.zip.getinfo(name).file_size > MEMBER_LIMIT:
            raise InputError(f"{self.path}: {name} unpacks to more than {MEMBER_LIMIT >> 20} MiB; this is not the archive")
        try:
            with self.zip.open(name) as raw, io.TextIOWrapper(raw, encoding="utf-8") as text:
                yield text
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, UnicodeDecodeError) as why:
            raise InputError(f"{self.path}: {name} cannot be read ({why}); get the archive again") from None

    def questions(self, task: str, split: str) -> Iterator[dict[str, str]]:
        """Records {"input", "label"} of one split in the archive's order, streamed."""
        name = f"datasets/{task}/{task}_{split}.json"
        with self.member(name) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield RECORD[task](json.loads(line))
                except (ValueError, TypeError, KeyError, IndexError, RecursionError) as why:
                    raise InputError(f"{self.path}: {name} line {number}: {broken(why)}; get the archive again") from None

    def rationales(self, task: str, split: str) -> Iterator[str]:
        """PaLM's raw texts of one split, one a question, in the order of the questions: numbered members of JSON lists."""
        for i in range(1000):
            name = f"datasets/{task}/llm/{split}_CoT_{i}.json"
            if name not in self.names:
                return
            with self.member(name) as text:
                try:
                    texts = json.load(text)
                except (json.JSONDecodeError, RecursionError) as why:
                    raise InputError(f"{self.path}: {name}: {broken(why)}; get the archive again") from None
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise InputError(f"{self.path}: {name}: expected a list of texts; get the archive again")
            yield from texts

    def has(self, task: str, split: str) -> bool:
        return f"datasets/{task}/{task}_{split}.json" in self.names


def broken(why: Exception) -> str:
    """One phrase for what json or a record reader met."""
    if isinstance(why, KeyError):
        return f"the field {why} is missing"
    return f"not JSON ({why})" if isinstance(why, (json.JSONDecodeError, RecursionError)) else f"not a record of this task ({why})"


def text_of(record: dict, field: str) -> str:
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} is not a text")
    return value


def equation_record(r: dict) -> dict[str, str]:
    return {"input": text_of(r, "input"), "label": text_of(r, "label")}


def choice_record(r: dict) -> dict[str, str]:
    """CQA: five choices lettered (a) to (e) below the question; the label is the choice's text [DSS]."""
    if len(r["choices"]) != 5 or text_of(r, "answer") not in r["choices"]:
        raise ValueError("expected five choices, the answer among them")
    choices = "".join(f"\n({letter}) {choice}" for letter, choice in zip("abcde", r["choices"]))
    return {"input": f"{text_of(r, 'question')}\nAnswer Choices:{choices}", "label": r["answer"]}


def inference_record(r: dict) -> dict[str, str]:
    """ANLI and e-SNLI: premise and hypothesis joined by T5's end-of-sequence token [DSS]."""
    if type(r["label"]) is not int or r["label"] not in (0, 1, 2):
        raise ValueError(f"label {str(r['label'])[:20]} is not 0, 1 or 2")
    return {"input": text_of(r, "premise") + "</s>" + text_of(r, "hypothesis"), "label": NLI[r["label"]]}


RECORD: dict[str, Callable[[dict], dict[str, str]]] = {
    "svamp": equation_record, "cqa": choice_record, "anli1": inference_record, "esnli": inference_record}


def svamp_questions(path: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """SVAMP.json -> 800 training and 200 test records, split and joined as in Distilling Step-by-Step."""
    rows = [{"input": f"{r['Body']}\n{r['Question']}", "label": r["Equation"]} for r in json.loads(path.read_text(encoding="utf-8"))]
    order = np.random.RandomState(0).permutation(len(rows))
    return [rows[i] for i in order[:800]], [rows[i] for i in order[800:]]


def write_lines(path: Path, records: Iterable[dict]) -> int:
    """Write records as JSON lines, atomically and streaming; return their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for count, record in enumerate(records, 1):
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


def hold_out(task: str, folder: Path, train: Callable[[], Iterable[dict]]) -> None:
    """Write train.jsonl and valid.jsonl; the last tenth of the training records is the validation set.

    [DSS] draws a tenth at random where a dataset has no validation set; the last tenth needs no seed [ours]. `train` is read
    twice, so that e-SNLI's half million questions are never in memory at once.
    """
    total = sum(1 for _ in train())
    kept = total - total // 10
    write_lines(folder / "valid.jsonl", (r for i, r in enumerate(train()) if i >= kept))
    write_lines(folder / "train.jsonl", (r for i, r in enumerate(train()) if i < kept))


def open_archive(archive: str | Path | None) -> Archive:
    """The user's own copy (unverified: its sha256 is printed) or the pinned one, fetched once."""
    if archive is None:
        return Archive(download("datasets.zip"))
    opened = Archive(archive)
    print(f"{archive}: sha256 {digest(Path(archive), Source(''))} (unverified: contents are checked instead)", file=sys.stderr)
    return opened


def ensure(name: str, archive: str | Path | None = None) -> Path:
    """Make a task or a student ready and return its folder; at once where it is complete.

    name: svamp, cqa, anli1, esnli, demo -> data/<name>/ with train.jsonl, valid.jsonl and test.jsonl, one {"input", "label"} a line;
    demo's student and t5-small, t5-base -> weights/<name>/ are `ensure_student`'s, which this calls for the last two.
    archive: a datasets.zip to read instead of the pinned one. Raises InputError.
    """
    if name not in TASKS:
        return ensure_student(name)
    folder = root() / "data" / name
    if all((folder / f"{split}.jsonl").is_file() for split in SPLITS):
        return folder
    if name == "demo":
        for split in SPLITS:
            write_lines(folder / f"{split}.jsonl", ({"input": p.text, "label": p.label} for p in demo_problems(split)))
        return folder
    if name == "svamp" and archive is None:
        train, test = svamp_questions(download("SVAMP.json"))
        write_lines(folder / "test.jsonl", test)
        hold_out(name, folder, lambda: train)
        return folder
    source = open_archive(archive)
    found = [split for split in SPLITS if source.has(name, split)]
    for split in found:
        if split != "train" or "valid" in found:
            write_lines(folder / f"{split}.jsonl", source.questions(name, split))
    if "train" in found and "valid" not in found:
        hold_out(name, folder, lambda: source.questions(name, "train"))
    if missing := [split for split in ("train", "test") if split not in found]:
        raise InputError(f"{name}: {' and '.join(missing)} missing in {source.path} (datasets/{name}/{name}_{missing[0]}.json)"
                         f"{f'; {folder} has its ' + ' and '.join(found) if found else ''}; get the whole datasets.zip")
    return folder


def ensure_palm(task: str, archive: str | Path | None = None) -> Path:
    """data/<task>/teacher-palm.jsonl: the PaLM-540B rationales that Distilling Step-by-Step published, raw, one a question.

    Lines {"question", "slot": 0, "text", "finish": "stop"} for the training questions (validation's, where they were held out of
    them, are among these) and for a published validation set. Raises InputError.
    """
    path = root() / "data" / task / "teacher-palm.jsonl"
    if path.is_file():
        return path
    if task not in RECORD:
        raise InputError(f"{task}: PaLM's rationales were published for {', '.join(RECORD)} only; name another teacher with --teacher")
    source = open_archive(archive)

    def records() -> Iterator[dict]:
        for split in ("train", "valid"):
            if split == "train" or source.has(task, split):
                texts = source.rationales(task, split)
                for count, row in enumerate(source.questions(task, split)):
                    if (text := next(texts, None)) is None:
                        raise InputError(f"{source.path}: {task} {split} has only {count} rationales for more questions; get the archive again")
                    yield {"question": row["input"], "slot": 0, "text": text, "finish": "stop"}
                if next(texts, None) is not None:
                    raise InputError(f"{source.path}: {task} {split} has more rationales than questions; get the archive again")
    write_lines(path, records())
    return path


# ---------------------------------------------------------------- the demo's task

PEOPLE = "Ana Ben Carla Dev Emma Finn Grace Hugo Iris Jonas Kira Leo Maya Noah Olga Pablo Rosa Sam Tara Umar".split()
THINGS = ("apples balls beads books buttons cards coins cookies crayons cups eggs flowers hats keys lemons marbles mugs pears pencils "
          "photos plates ribbons rocks shells spoons stamps stickers tickets toys").split()


class Kind(NamedTuple):
    """One move of a story. {s} is the amount so far, {u} and {v} the move's own numbers, {t} the amount after it.

    Of `tell`, the story's sentences for it, the last one is kept for the test set. `why` is what the teacher says.
    """
    op: str                # how {s} and {u} meet, left to right: "s - u"; {s} is absent in the moves that open a story
    wrong: str             # the move that a person takes it for
    tell: tuple[str, ...]
    why: tuple[str, ...]
    ask: str = "now"       # which of QUESTIONS a story that ends with this move asks


QUESTIONS = {
    "now": ("How many {o} does {a} have now?", "How many {o} are there with {a} in the end?", "{a} owns how many {o} after this?"),
    "first": ("How many {o} did {a} have at first?", "How many {o} did {a} start with?", "What was {a}'s number of {o} in the beginning?"),
    "b": ("How many {o} does {b} have?", "How many {o} are {b}'s?", "What number of {o} does {b} own?"),
    "friend": ("How many {o} does each friend get?", "How many {o} are there for each friend?", "What does each friend receive in {o}?"),
    "gap": ("How many more {o} does {a} have than {b}?", "{a} has how many {o} more than {b}?", "By how many {o} is {a} ahead of {b}?"),
    "both": ("How many {o} do {a} and {b} have together?", "How many {o} do {a} and {b} have in all?", "What is the sum of {a}'s and {b}'s {o}?"),
}
OTHER_ONE = ("{b} has {u} {o}.", "{b} owns {u} {o}.", "{u} {o} belong to {b}.")
GAIN = ("{a} finds {u} more {o}.", "{b} gives {a} {u} {o}.", "Then {a} buys {u} {o}.", "{u} {o} arrive for {a} by mail.")
LOSS = ("{a} gives {u} {o} to {b}.", "{a} loses {u} {o}.", "Then {a} sells {u} {o}.", "{b} borrows {u} {o} from {a}.")
KINDS = {
    "have": Kind("u", "have", ("{a} has {u} {o}.", "There are {u} {o} in {a}'s room.", "{a} collects {u} {o}.", "{a}'s shelf holds {u} {o}."),
                 ("{a} has {u} {o}.", "We start with {u} {o}.")),
    "groups": Kind("u * v", "parts", ("{a} has {u} boxes with {v} {o} in each.", "{a} fills {u} bags with {v} {o} each.",
                                      "In each of {a}'s {u} baskets lie {v} {o}."),
                   ("{u} groups of {v} {o} are {u} * {v} = {t}.", "{a} has {u} times {v} {o}, {u} * {v} = {t}.")),
    "parts": Kind("u + v", "groups", ("{a} has {u} {o} at home and {v} {o} at school.", "{a} picks {u} {o} on Monday and {v} {o} on Tuesday.",
                                      "{a} keeps {u} {o} upstairs and {v} {o} downstairs."),
                  ("Both parts make {u} + {v} = {t} {o}.", "{a} has {u} and {v} {o}, {u} + {v} = {t}.")),
    "gain": Kind("s + u", "loss", GAIN, ("{a} gets {u} more, {s} + {u} = {t}.", "{u} {o} come in, {s} + {u} = {t}.")),
    "loss": Kind("s - u", "gain", LOSS, ("{u} of the {o} go away, {s} - {u} = {t}.", "{a} is left with {s} - {u} = {t}.")),
    "ungain": Kind("s - u", "gain", GAIN, ("Before the {u} came there were {s} - {u} = {t}.", "Without the {u} new ones: {s} - {u} = {t}."), "first"),
    "unloss": Kind("s + u", "loss", LOSS, ("Before the {u} went there were {s} + {u} = {t}.", "Put the {u} back: {s} + {u} = {t}."), "first"),
    "packs": Kind("s + ( u * v )", "each", ("{a} buys {u} packs of {v} {o}.", "{a} gets {u} bags of {v} {o} each.",
                                            "{u} parcels with {v} {o} each reach {a}."),
                  ("{u} times {v} {o} come in, {s} + {u} * {v} = {t}.", "{a} gets {u} * {v} more, {s} + {u} * {v} = {t}.")),
    "each": Kind("s - ( u * v )", "packs", ("{a} gives {v} {o} to each of {u} friends.", "{a} hands {v} {o} each to {u} children.",
                                            "Each of {u} friends takes {v} {o} from {a}."),
                 ("{u} times {v} {o} go away, {s} - {u} * {v} = {t}.", "{a} gives away {u} * {v}, {s} - {u} * {v} = {t}.")),
    "share": Kind("s / u", "loss", ("{a} shares the {o} equally among {u} friends.", "{u} friends split the {o} of {a} equally.",
                                    "{a} deals the {o} out evenly to {u} friends."),
                  ("Each of {u} friends gets {s} / {u} = {t}.", "Split in {u} equal shares: {s} / {u} = {t}."), "friend"),
    "times": Kind("s * u", "more", ("{b} has {u} times as many {o} as {a}.", "{b} owns {u} times the {o} of {a}.",
                                    "For every one of {a}'s {o} there are {u} of {b}'s."),
                  ("{b} has {u} times that, {s} * {u} = {t}.", "{u} times as many are {s} * {u} = {t}."), "b"),
    "more": Kind("s + u", "fewer", ("{b} has {u} more {o} than {a}.", "{b} owns {u} {o} more than {a}.", "{b} beats {a} by {u} {o}."),
                 ("{b} has {u} more, {s} + {u} = {t}.", "{u} more than that are {s} + {u} = {t}."), "b"),
    "fewer": Kind("s - u", "more", ("{b} has {u} fewer {o} than {a}.", "{b} owns {u} {o} fewer than {a}.", "{b} trails {a} by {u} {o}."),
                  ("{b} has {u} fewer, {s} - {u} = {t}.", "{u} fewer than that are {s} - {u} = {t}."), "b"),
    "gap": Kind("s - u", "both", OTHER_ONE, ("{b} has {u}, the difference is {s} - {u} = {t}.", "{a} is ahead of {u} by {s} - {u} = {t}."), "gap"),
    "both": Kind("s + u", "gap", OTHER_ONE, ("{b} has {u}, together {s} + {u} = {t}.", "With the {u} of {b} there are {s} + {u} = {t}."), "both"),
}
# A sentence whose number {d} the answer does not need: about other things {p}, another person {c}, or another time.
DISTRACTORS = ("{a} also has {d} {p}.", "{c} has {d} {o}.", "{b} gives {c} {d} {p}.", "{a} buys {d} {p}.", "{c} loses {d} {o}.",
               "Last year {a} had {d} {o}.", "{b} has {d} {p}.", "{d} {p} belong to {c}.")
STARTS, CHANGES = ("have", "groups", "parts"), ("gain", "loss")
ENDS = ("gain", "loss", "share", "times", "more", "fewer", "gap", "both")
PLANS = {1: [("have", e) for e in ENDS] + [("groups",), ("parts",), ("have", "ungain"), ("have", "unloss")],
         2: [("have", c, e) for c in CHANGES for e in ENDS] + [(s, e) for s in ("groups", "parts") for e in ENDS]
            + 2 * [("have", "packs"), ("have", "each")] + [("have", x, y) for x in ("ungain", "unloss") for y in ("ungain", "unloss")]}
Step = tuple[str, tuple[int, ...]]     # a move and its numbers


class Problem(NamedTuple):
    text: str                          # body, newline, question, as in SVAMP
    label: str                         # the equation, spaced as in SVAMP; numbers as the text has them
    steps: tuple[Step, ...]            # the moves in the order of the solution
    words: dict[str, str]              # who and what: the story's {a} {b} {c} {o} {p}
    distractor: int | None


def apply(step: Step, equation: str, amount: int | None) -> tuple[str, int | None]:
    """Equation and amount after a move; the amount is None where it is not a natural number."""
    kind, numbers = step
    u, v = (*numbers, 0)[:2]
    op = KINDS[kind].op
    s = 0 if amount is None else amount
    after = {"u": u, "u * v": u * v, "u + v": u + v, "s + u": s + u, "s - u": s - u, "s * u": s * u, "s / u": s / max(u, 1),
             "s + ( u * v )": s + u * v, "s - ( u * v )": s - u * v}[op]
    natural = (amount is not None or not equation) and after > 0 and after == int(after)
    equation = op.replace("s", equation).replace("u", str(u)).replace("v", str(v))
    return f"( {equation} )" if op != "u" else equation, int(after) if natural else None


def solve(steps: Iterable[Step]) -> tuple[str, int | None]:
    """Equation and amount of a whole story."""
    equation, amount = "", None
    for step in steps:
        equation, amount = apply(step, equation, amount)
    return equation, amount


def make_problem(rng: random.Random, steps: int | None = None, distract: bool | None = None, unseen: bool = False) -> Problem:
    """Draw a word problem of one or two steps (None: 3 in 10 have one), with or without a distractor (None: 7 in 10 have one).

    unseen: at least one sentence is of the phrasings that are kept for the test set; else none is.
    """
    steps = steps or rng.choice((1, 1, 1, 2, 2, 2, 2, 2, 2, 2))
    distract = rng.random() < 0.7 if distract is None else distract
    plan = rng.choice(PLANS[steps])
    a, b, c = rng.sample(PEOPLE, 3)
    o, p = rng.sample(THINGS, 2)
    words = {"a": a, "b": b, "c": c, "o": o, "p": p}
    while True:
        moves = [(k, tuple(rng.randint(2, 9 if "*" in KINDS[k].op or "/" in KINDS[k].op else 50) for _ in range(1 + ("v" in KINDS[k].op))))
                 for k in plan]
        numbers = [n for _, ns in moves for n in ns]
        amounts = [solve(moves[:i + 1])[1] for i in range(len(moves))]
        if None not in amounts and max(amounts) < 100 and len(set(numbers)) == len(numbers):
            break
    d = rng.choice([n for n in range(2, 51) if n not in numbers]) if distract else None
    ask = KINDS[plan[-1]].ask
    parts = [(KINDS[k].tell, dict(zip("uv", ns))) for k, ns in moves]
    if ask == "first":                 # told forward, solved backward: the last change of the story is undone first
        had = ("{a} has some {o}.", "{a} has a number of {o}.", "{a} has {o}, we do not know how many.")
        left = ("Now {a} has {u} {o}.", "{a} has {u} {o} now.", "That makes {u} {o} for {a}.")
        parts = [(had, {}), *reversed(parts[1:]), (left, parts[0][1])]
    elif ask in ("b", "gap", "both") and len(plan) == 2 and rng.random() < 0.4:
        parts.reverse()                # a comparison may be told before what it compares with
    if distract:
        parts.insert(rng.randint(0, len(parts)), (DISTRACTORS, {"d": d}))
    parts.append((QUESTIONS[ask], {}))
    special = rng.randrange(len(parts)) if unseen else -1
    told = []
    for i, (tell, names) in enumerate(parts):
        known = len(tell) - (not unseen)
        told.append((tell[-1] if i == special else tell[rng.randrange(known)]).format(**words, **names))
    return Problem(" ".join(told[:-1]) + "\n" + told[-1], solve(moves)[0], tuple(moves), words, d)


SIZES = {"train": 600, "valid": 100, "test": 1000}


@functools.cache
def demo_problems(split: str) -> tuple[Problem, ...]:
    """The demo's problems of one split, always the same: 600 train, 100 valid, 1,000 test, no text in two of them.

    More than a quarter of the test problems have a sentence in a phrasing that no other split has.
    """
    rng = random.Random(f"demo {split}")
    seen = {p.text for earlier in SPLITS[:SPLITS.index(split)] for p in demo_problems(earlier)}
    problems: list[Problem] = []
    while len(problems) < SIZES[split]:
        problem = make_problem(rng, unseen=split == "test" and rng.random() < 0.28)
        if problem.text not in seen:
            seen.add(problem.text)
            problems.append(problem)
    return tuple(problems)


# ---------------------------------------------------------------- the demo's teacher

# How people go wrong on a hard question, how often on easy and on hard ones, and how many are hard: chosen so that a vote of five
# comes near what the paper saw of gpt-3.5-turbo (3.87 of 5 samples with the majority, more than half of the questions unanimous).
EASY_ERRORS, HARD_ERRORS = 0.02, 0.55
HARD = {1: 0.25, 2: 0.55}              # share of hard questions by number of steps


def fold(text: str) -> str:
    return " ".join(text.split())


def mistakes(problem: Problem) -> list[tuple[Step, ...]]:
    """Every wrong solution a person could reach here: a wrong move, a wrong number, a move forgotten. All differ in equation."""
    steps, found = list(problem.steps), []
    for i, (kind, numbers) in enumerate(steps):
        if KINDS[kind].wrong != kind:
            found.append(steps[:i] + [(KINDS[kind].wrong, numbers)] + steps[i + 1:])
        if problem.distractor is not None:
            for j in range(len(numbers)):
                found.append(steps[:i] + [(kind, numbers[:j] + (problem.distractor,) + numbers[j + 1:])] + steps[i + 1:])
    if len(steps) > 2 or (len(steps) > 1 and steps[0][0] != "have"):
        found += [steps[:-1], steps[:-2] + steps[-1:]] if len(steps) > 2 else [steps[:-1]]
    if steps[-1][0] in ("packs", "each"):
        found.append(steps[:-1] + [("gain" if steps[-1][0] == "packs" else "loss", steps[-1][1][1:])])
    right = problem.label
    return [tuple(wrong) for wrong in found if solve(wrong)[0] != right]


def explain(problem: Problem, steps: tuple[Step, ...], rng: random.Random, swap: bool = False) -> str:
    """A solution in words that ends in its equation. swap: the last step's operands are exchanged, as in "5 - 12"."""
    said, equation, amount = [], "", None
    if problem.distractor is not None and problem.distractor not in [n for _, ns in steps for n in ns] and rng.random() < 0.6:
        said.append(rng.choice(("The {d} does not matter.", "We do not need the {d}.", "The {d} is about something else."))
                    .format(d=problem.distractor))
    for i, step in enumerate(steps):
        before = "the rest" if amount is None else amount
        equation, amount = apply(step, equation, amount)
        names = dict(zip("uv", step[1]), s=before, t=amount)
        why = rng.choice(KINDS[step[0]].why)
        if amount is None:             # a mistake led out of the natural numbers: leave the result unsaid
            why = why.replace(" = {t}", "")
        if swap and i == len(steps) - 1:
            why = re.sub(r"(\{s\}|\{u\}) ([-/]) (\{s\}|\{u\})", r"\3 \2 \1", why)
            equation = re.sub(r"^\( (.+) ([-/]) (\d+) \)$", r"( \3 \2 \1 )", equation)
        said.append(why.format(**problem.words, **names))
    return " ".join(said) + f" The answer is {equation}."


def teacher_answer(problem: Problem, seed: int | None, temperature: float) -> str:
    """What the rule-based teacher says: a function of question and seed alone. It errs at temperature > 0, on hard questions mostly."""
    rng = random.Random(f"{problem.text}|{seed if temperature else 'greedy'}")
    about = random.Random(problem.text)          # what is hard about a question stays so from sample to sample
    hard = about.random() < HARD[min(len(problem.steps) - (problem.steps[0][0] == "have"), 2) or 1]
    tempting = about.choice(mistakes(problem))
    if rng.random() >= (HARD_ERRORS if hard else EASY_ERRORS) * min(temperature / 0.7, 1.5):
        return explain(problem, problem.steps, rng)
    if rng.random() < 0.4:
        return explain(problem, tempting, rng)
    if KINDS[problem.steps[-1][0]].op in ("s - u", "s / u") and rng.random() < 0.3:
        return explain(problem, problem.steps, rng, swap=True)
    return explain(problem, rng.choice(mistakes(problem)), rng)


class Teacher(BaseHTTPRequestHandler):
    """OpenAI's chat-completions API, as much of it as a client of this project or a curious person needs."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True     # headers and body leave in two writes; Nagle would hold the second back for 40 ms

    def log_message(self, *args: object) -> None:
        """Stay silent: hundreds of requests a run."""

    def reply(self, status: int, body: dict) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def refuse(self, status: int, message: str, param: str | None = None) -> None:
        self.reply(status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}})

    def do_GET(self) -> None:
        if self.path.rstrip("/") != "/v1/models":
            return self.refuse(404, f"Unknown path {self.path}; there are GET /v1/models and POST /v1/chat/completions")
        self.reply(200, {"object": "list", "data": [{"id": "demo-teacher", "object": "model", "created": 0, "owned_by": "qcrd"}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self.refuse(404, f"Unknown path {self.path}; there are GET /v1/models and POST /v1/chat/completions")
        try:
            asked = json.loads(raw)
            prompt = asked["messages"][-1]["content"]
            prompt = prompt if isinstance(prompt, str) else " ".join(part.get("text", "") for part in prompt)
            n, seed, limit = asked.get("n") or 1, asked.get("seed"), asked.get("max_tokens") or asked.get("max_completion_tokens")
            temperature = 1.0 if asked.get("temperature") is None else asked["temperature"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as why:
            return self.refuse(400, f"The body must be JSON with a list of messages ({type(why).__name__})", "messages")
        for name, value, good in (("n", n, type(n) is int and 1 <= n <= 128), ("seed", seed, seed is None or type(seed) is int),
                                  ("max_tokens", limit, limit is None or type(limit) is int and limit > 0),
                                  ("temperature", temperature, type(temperature) in (int, float) and 0 <= temperature <= 2)):
            if not good:
                return self.refuse(400, f"Invalid value for {name}: {str(value)[:40]}", name)
        prompt = fold(prompt)
        question = max((q for q in self.server.questions if q in prompt), key=lambda q: (prompt.rfind(q), len(q)), default=None)
        choices, spent = [], 0
        for i in range(n):
            if question is None:
                text = "I cannot tell: I only know the problems of the demo."
            else:
                one = random.randrange(2 ** 62) if seed is None else seed + i   # slots filled one by one equal slots asked at once
                text = teacher_answer(self.server.questions[question], one, temperature)
            tokens = list(re.finditer(r"\w+|[^\w\s]", text))
            cut = limit is not None and len(tokens) > limit
            text, count = (text[:tokens[limit - 1].end()], limit) if cut else (text, len(tokens))
            spent += count
            choices.append({"index": i, "message": {"role": "assistant", "content": text}, "logprobs": None,
                            "finish_reason": "length" if cut else "stop"})
        known = len(re.findall(r"\w+|[^\w\s]", prompt))
        self.reply(200, {"id": "chatcmpl-demo", "object": "chat.completion", "created": int(time.time()), "model": "demo-teacher",
                         "choices": choices,
                         "usage": {"prompt_tokens": known, "completion_tokens": spent, "total_tokens": known + spent}})


def demo_teacher(port: int = 0) -> tuple[str, ThreadingHTTPServer]:
    """Start the rule-based teacher in a daemon thread on 127.0.0.1; return its base URL and the server (`shutdown()` ends it).

    It knows the demo's problems by their text and finds the last one in the last message. Raises InputError where the port is taken.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Teacher)
    except (OSError, OverflowError) as why:
        raise InputError(f"port {port} cannot be used ({why}); choose another with --port") from None
    server.daemon_threads = True
    server.questions = {fold(p.text): p for split in SPLITS for p in demo_problems(split)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1", server


# ---------------------------------------------------------------- students

def ensure_student(name: str) -> Path:
    """weights/<name>/ with config.json, model.pt and spiece.model; t5-small and t5-base are downloaded and converted once.

    Raises InputError for an unknown name, and for a download that fails.
    """
    folder = (HERE if name == "demo" else root()) / "weights" / name
    if all((folder / file).is_file() for file in ("config.json", "model.pt", "spiece.model")):
        return folder
    if name not in PUBLISHED:
        raise InputError(f"{name}: neither a task ({', '.join(TASKS)}) nor a student ({', '.join(PUBLISHED)}) of this project; "
                         "a checkpoint of your own comes in with --from-hf FOLDER")
    for file in ("spiece.model", "model.safetensors"):
        downloaded = download(f"{name}/{file}").parent
    with atomic(downloaded / "config.json") as temporary:
        temporary.write_text(json.dumps(PUBLISHED[name], indent=1), encoding="utf-8")
    return convert(downloaded, name)


# The published shapes, so that config.json needs no download.
PUBLISHED = {
    name: {"model_type": "t5", "vocab_size": 32128, "d_model": d, "d_kv": 64, "d_ff": 4 * d, "num_layers": layers,
           "num_decoder_layers": layers, "num_heads": heads, "relative_attention_num_buckets": 32, "dropout_rate": 0.1,
           "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu", "tie_word_embeddings": True,
           "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    for name, d, layers, heads in (("t5-small", 512, 6, 8), ("t5-base", 768, 12, 12))}


def convert(source: str | Path, name: str | None = None, vocab: str | Path | None = None) -> Path:
    """A Hugging Face T5 folder -> weights/<name>/ (its own name where none is given); vocab: a spiece.model, where it has none."""
    source = Path(source)
    name = name or source.resolve().name
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name) or name in ("demo", "golden"):
        raise InputError(f"--name {name!r}: letters, digits, '.', '_' and '-' make a name, and demo and golden are taken; choose another")
    vocab = Path(vocab or source / "spiece.model")
    if not vocab.is_file():
        raise InputError(f"{vocab}: no such file; name the checkpoint's SentencePiece model with --vocab FILE")
    folder = root() / "weights" / name
    model = t5.T5.from_hf(source)
    size = t5.Tokenizer(vocab).size
    if size > model.config.vocab_size:
        raise InputError(f"{vocab}: {size:,} pieces, but {source} has {model.config.vocab_size:,} embeddings; this vocabulary is another model's")
    model.save(folder, vocab=vocab)
    return folder


# What made weights/demo/. The mixture is T5 1.0's in small: span corruption of texts, and supervised pairs of easier kinds.
SHAPE = dict(d_model=128, d_kv=32, d_ff=512, num_layers=2, num_decoder_layers=2, num_heads=4)


def pretraining_data() -> tuple[list[str], list[tuple[str, str]]]:
    """Texts for span corruption and (input, label) pairs, seeded. No problem and no test phrasing of the demo is in them.

    The texts are stories of every kind, without their answers; the pairs are problems of one step without a distractor.
    """
    rng = random.Random("pretraining")
    known = {p.text for split in SPLITS for p in demo_problems(split)}
    stories = [make_problem(rng) for _ in range(20000)]
    easy = [make_problem(rng, steps=1, distract=False) for _ in range(20000)]
    return [p.text for p in stories if p.text not in known], [("predict: " + p.text, p.label) for p in easy if p.text not in known]


def train_vocabulary(texts: list[str], path: Path) -> None:
    """A SentencePiece model for the demo: words of the stories, numbers 0 to 99 as one piece each, any other text byte by byte."""
    import sentencepiece
    words = " ".join(" ".join(k.tell + k.why) for k in KINDS.values()) + " " + " ".join(sum(QUESTIONS.values(), DISTRACTORS))
    words = sorted({word for word in re.findall(r"[A-Za-z']+", re.sub(r"\{\w\}", " ", words))} | {"predict", "explain", "answer", "matter"})
    lines = [fold(text) for text in texts] + 50 * words
    with atomic(path) as temporary:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=open(temporary, "wb"), model_type="bpe", vocab_size=1100, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, byte_fallback=True, character_coverage=1.0, required_chars="".join(map(chr, range(33, 127))),
            user_defined_symbols=[f"▁{n}" for n in range(100)], hard_vocab_limit=False, num_threads=1, minloglevel=2)


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
            if name == "serve-teacher":
                serve(args.port)
            elif name == "pretrain-demo":
                pretrain_demo()
            else:
                print(ensure(name, args.archive))
                if args.archive and name in RECORD:
                    print(ensure_palm(name, args.archive))
    except InputError as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def serve(port: int) -> None:
    """Run the demo's teacher until Ctrl-C."""
    url, server = demo_teacher(port)
    question = json.dumps(demo_problems("train")[0].text)
    print(f"{url}   (Ctrl-C ends it) try:\n  curl -s {url}/chat/completions -H 'Content-Type: application/json' "
          f"-d '{{\"n\": 2, \"messages\": [{{\"role\": \"user\", \"content\": {question}}}]}}'", flush=True)
    try:
        threading.Event().wait()
    finally:
        server.shutdown()


if __name__ == "__main__":
    sys.exit(main())
