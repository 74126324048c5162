# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "sentencepiece==0.2.3", "numpy==2.4.6", "requests==2.34.2"]
# ///
"""QCRD, Quality-guided Contrastive Rationale Distillation (Wang et al., EMNLP
2025), in one file.

A large language model, the teacher, answers each question several times and
explains its answers. A small T5, the student, learns to answer (`predict: x`)
and to explain (`explain: x`). This file follows the paper, section by section:

    1 settings        every flag, its default, and where the default comes from
    2 teacher         K samples per question from a server with OpenAI's API
    3 vote            the majority's rationales are S_pos, the minority's S_neg
    4 student         a question as token ids; losses; what the student writes
    5 negatives       what the student of five iterations ago writes joins S_neg
    6 discriminator   s(x, r) and its loss L_D                    eq. (1), (2)
    7 loss            picks, margin, weights, the sum             eq. (3) to (8)
    8 training        iterations, run folder, resume, several GPUs
    9 evaluation      accuracies, --ask, --eval, --audit

Marks say where a choice comes from: [eq. n], [figure], [table] the paper's;
[abstract] its abstract; [review] a published review that reproduces it; [DSS]
Distilling Step-by-Step (Hsieh et al., 2023), whose protocol it follows; [ours]
where no source that we know says it.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
import torch.distributed as dist
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, InvalidHeader, JSONDecodeError
from torch import Tensor, nn
from urllib3.util import Retry

import fetch_data
import t5
from fetch_data import Example, Sample, Task
from t5 import T5, InputError, Tokenizer, pad, require, to_device, track

# ------------------------------------------------------------------------------------ 1. Settings


def option(default: Any, mark: str, help: str, choices: tuple = ()) -> Any:
    """A flag of the command line: its default, the source of the default, its help text."""
    return field(default=default, metadata={"mark": mark, "help": help, "choices": choices})


SOURCES = ("snapshot", "fixed", "sc", "none")
PRECISIONS = ("", "float32", "bfloat16", "float16")
SCHEMES = ("minmax", "maxmin", "sampling", "mean", "wmean", "minmin")


@dataclass
class Config:
    """Every setting; the command line is made from it."""

    # Task
    task: str = option("demo", "ours", "demo, svamp, cqa, anli1, esnli, or a folder of JSONL files")
    answer: str = option("text", "ours", "a folder's labels; numbers by value", ("text", "number"))
    labels: str = option("gold", "table", "the data's, or the vote's answers", ("gold", "teacher"))
    fraction: float = option(1.0, "figure", "part of the training questions used, from the first")
    # Teacher and vote
    teacher: str = option("", "ours", "URL of a server with OpenAI's API, or palm (see the end)")
    teacher_model: str = option("", "review", "gpt-3.5-turbo at OpenAI; ours: else the first")
    samples: int = option(5, "review", "K, samples a question")
    teacher_temperature: float = option(0.7, "review", "the teacher's sampling temperature")
    teacher_tokens: int = option(512, "ours", "longest sample, in the teacher's tokens")
    teacher_budget: int = option(0, "ours", "at most this many requests, retries apart (0: any)")
    teacher_fields: str = option("", "ours", "JSON merged into each request; null removes a field")
    concurrency: int = option(8, "ours", "requests under way at once")
    prompt: str = option("", "ours", "a file with a system message of yours")
    vote: str = option("majority", "abstract", "who is in S_pos", ("majority", "first", "all"))
    # Student
    method: str = option("qcrd", "table", "what is trained", ("qcrd", "dss", "finetune"))
    model: str = option("", "ours", "demo, t5-small (CPU), t5-base (GPU), or a Hugging Face T5")
    input_tokens: int = option(512, "ours", "longest input")
    rationale_tokens: int = option(256, "DSS", "longest rationale")
    label_tokens: int = option(64, "ours", "longest label")
    # Negatives
    negative_source: str = option("snapshot", "table", "who writes them; see the end", SOURCES)
    negative_model: str = option("", "ours", "folder of the fixed student (default: --model)")
    lag: int = option(5, "review", "j: iteration t samples from the student after t - j")
    student_temperature: float = option(1.5, "review", "the student's sampling temperature")
    student_temperature_end: float = option(0.0, "ours", "its last value, on a line (0: same)")
    student_samples: int = option(1, "review", "the student's samples a question")
    # Discriminator
    discriminator: bool = option(True, "review", "weights s and 1 - s (without: 1)")
    discriminator_pretrain: int = option(500, "review", "pretraining steps; at most, in the paper")
    discriminator_every: int = option(1, "ours", "update it before every n-th iteration (0: never)")
    discriminator_steps: int = option(20, "ours", "steps of an update")
    discriminator_questions: int = option(8, "ours", "questions a step, some 64 rationales")
    discriminator_lr: float = option(1e-4, "ours", "its learning rate")
    discriminator_noise: float = option(0.0, "ours", "part of its questions with swapped sets")
    # Loss
    scheme: str = option("minmax", "eq. 4, 5", "which of S_pos and S_neg count", SCHEMES)
    delta: float = option(3.0, "review", "δ: a negative with at least this loss adds nothing")
    beta: float = option(0.2, "review", "β: weight of the negative term")
    alpha_pred: float = option(0.5, "review", "α1: weight of L_pred")
    alpha_cl: float = option(0.5, "review", "α2: weight of L_cl")
    alpha_d: float = option(0.5, "review", "α3 in iteration 1; α3 / 0.5 scales D's rate")
    alpha_d_decay: float = option(0.9, "review", "α3 is multiplied by this after an iteration")
    # Training
    steps: int = option(10_000, "DSS", "optimizer steps, where --iterations is not given")
    iterations: int = option(0, "ours", "iterations (0: as many as --steps need)")
    iteration_steps: int = option(0, "ours", "optimizer steps an iteration (0: one pass)")
    batch: int = option(64, "DSS", "questions an optimizer step")
    micro_batch: int = option(0, "ours", "questions at once, less memory (0: 16, on CUDA all)")
    lr: float = option(5e-5, "DSS", "AdamW's learning rate, falling linearly to 0")
    seed: int = option(0, "ours", "initialisation, order, dropout, student's samples; never data")
    precision: str = option("", "ours", "default: float32; on CUDA bf16, else fp16", PRECISIONS)
    device: str = option("", "ours", "default: cuda where there is one", ("", "cpu", "cuda"))
    run: str = option("", "ours", "the run's folder (default: runs/<task>-<method>-<seed>)")
    stage: str = option("all", "ours", "teacher: only ask the teacher", ("all", "teacher"))


# An iteration ends with a validation and a checkpoint. A pass has 12 steps on svamp, too few for
# that, and 8,584 on esnli, too many: 10,000 steps would see no negative of their own past. [ours]
OTHER_DEFAULTS = {
    "svamp": {"iteration_steps": 100},
    "esnli": {"iteration_steps": 500},
    "demo": {"iterations": 10, "iteration_steps": 20, "batch": 32, "rationale_tokens": 48}
    | {"discriminator_pretrain": 100},
}
POSITIVE = "samples batch lag concurrency rationale_tokens student_samples lr fraction".split()
POSITIVE += ["student_temperature", "discriminator_questions"]
JUDGED = 100  # validation questions whose rationales D scores after each iteration [ours]
DEMO_STUDENT = {"lr": 1e-3, "discriminator_lr": 1e-3}  # 1M parameters learn at higher rates
FREE_ON_RESUME = ("device", "concurrency", "micro_batch")
GROUPS = {"task": "task", "teacher": "teacher and vote", "method": "student"}
GROUPS |= {"negative_source": "negatives from the student", "discriminator": "discriminator"}
GROUPS |= {"scheme": "loss", "steps": "training"}
RANK = int(os.environ.get("RANK", 0))  # torchrun's
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def flag(name: str) -> str:
    """A field of Config as the command line spells it."""
    return "--" + name.replace("_", "-")


def derive_seed(*purpose: object) -> int:
    """A 63-bit seed from what it is for: no draw depends on how many others came before it."""
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "little") >> 1


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def gather(items: list) -> list:
    """The items of all ranks, in rank order, on every rank; each waits for the others."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------------------------------- 2. Teacher

Slot = tuple[str, str] | None  # a sample's text and finish_reason; None: there is none
ATTEMPTS = 10  # at one question, with answers that hold no text
UNREADABLE = (ChunkedEncodingError, InvalidHeader, RecursionError)  # cut off; deeply nested
HINTS = {
    0: "is the server running, and does --teacher end in /v1?",
    200: "its answers hold no text; a model that thinks first needs more --teacher-tokens",
    400: """--teacher-fields '{"seed": null}' leaves out a field that the server does not know""",
    401: "set OPENAI_API_KEY to a key that this server accepts",
    429: "a quota, or a server in trouble: run again later; what was answered is kept",
    404: "is --teacher-model right, and does --teacher end in /v1?",
}
PALM = """teacher: PaLM-540B's published rationales, ONE a question: not the paper's setting. Name
  --teacher http://localhost:11434/v1 (Ollama, vLLM, llama.cpp) or set OPENAI_API_KEY for that."""


class Teacher:
    """A server with OpenAI's chat-completions API, and the file that keeps its samples."""

    def __init__(self, url: str, key: str, config: Config):
        self.url = url.rstrip("/")
        self.key = key
        self.config = config
        self.model = config.teacher_model
        try:
            self.fields = dict(**json.loads(config.teacher_fields or "{}"))
        except (ValueError, TypeError):
            raise InputError("""--teacher-fields: no JSON object like '{"seed": null}'""") from None
        self.cache = Path()
        self.lock = threading.Lock()
        self.max_n = config.samples
        self.budget = config.teacher_budget or math.inf
        self.answered = False  # whether this server ever gave a sample, in an earlier run too
        self.requests = self.filled = self.skipped = 0
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {key}" if key else None
        how = {"allowed_methods": None, "status_forcelist": (408, 409, 429, 500, 502, 503, 504)}
        how |= {"backoff_factor": 0.3, "backoff_jitter": 0.3, "backoff_max": 30}  # seconds
        retry = Retry(total=8, connect=3, raise_on_status=False, **how)
        adapter = HTTPAdapter(max_retries=retry, pool_maxsize=config.concurrency)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)

    def key_of(self, messages: list[dict]) -> str:
        """What decides a sample beside its slot: messages, model, settings."""
        config = self.config
        settings = [self.model, config.teacher_temperature, config.teacher_tokens, self.fields]
        return hashlib.sha256(json.dumps([messages, settings]).encode()).hexdigest()[:32]

    def call(self, path: str, body: dict | None) -> tuple[int, Any]:
        """GET, or POST a body -> status (0: nobody answered) and JSON (None: it was none)."""
        how = {"json": body, "timeout": (10, 180), "allow_redirects": False}
        try:
            reply = self.session.request("POST" if body else "GET", self.url + path, **how)
            return reply.status_code, reply.json()
        except UNREADABLE:
            return 200, None
        except JSONDecodeError:
            return reply.status_code, None
        except requests.RequestException as error:
            return 0, type(error).__name__

    def failure(self, status: int, body: Any) -> InputError:
        """Why this server cannot be used, and what to do: one line, without the key."""
        self.budget = 0  # the other threads stop
        words = fetch_data.fold(str(body)).replace(self.key or "no key", "***")[:200]
        like = {403: 401, 422: 400} | dict.fromkeys((408, 409, *range(500, 600)), 429)
        hint = HINTS.get(like.get(status, status), HINTS[404])
        return InputError(f"teacher {self.url}: status {status}, {words}: {hint}")

    def fill(self, messages: list[dict], slots: list[int]) -> None:
        """Asks until the slots are full. Raises InputError for what no repetition mends."""
        config, key = self.config, self.key_of(messages)
        max_n, failures = self.max_n, 0
        while slots:
            n = min(max_n, len(slots))
            body = {"model": self.model, "messages": messages, "n": n}
            body |= {"temperature": config.teacher_temperature, "max_tokens": config.teacher_tokens}
            body |= {"seed": derive_seed(key) % 2**30 + slots[0]} | self.fields
            body = {name: value for name, value in body.items() if value is not None}
            with self.lock:
                if self.requests >= self.budget:
                    return
                self.requests += 1
            status, answer = self.call("/chat/completions", body)
            kept = self.keep(key, slots, answer) if status == 200 else 0
            slots = slots[kept:]
            failures = 0 if kept else failures + 1
            if kept:
                self.max_n = max_n  # one by one, where that was what helped
            elif status in (400, 422) and n > 1:
                max_n = 1
            elif status == 200 and failures < ATTEMPTS:
                time.sleep(min(0.1 * 2**failures, 10) * random.uniform(0.5, 1.5))
            elif self.answered and status in (200, 400, 422):
                self.skipped += 1  # this question alone: a content filter, or its length
                return
            else:
                raise self.failure(status, answer)

    def keep(self, key: str, slots: list[int], answer: Any) -> int:
        """Fills the lowest slots with the choices that hold text, in one write -> how many."""
        lines: list[str] = []
        with contextlib.suppress(TypeError, AttributeError, KeyError):
            for choice in answer["choices"]:
                text = choice["message"]["content"]
                if isinstance(text, str) and text.strip() and len(lines) < len(slots):
                    sample = {"key": key, "slot": slots[len(lines)], "text": text[:200_000]}
                    sample["finish"] = str(choice.get("finish_reason"))
                    lines.append(json.dumps(sample) + "\n")
        if lines:
            with self.lock, open(self.cache, "ab", buffering=0) as file:
                file.write("".join(lines).encode())
                self.filled += len(lines)
                self.answered = True
        return len(lines)


def read_cache(path: Path, wanted: str = "key") -> dict[str, dict[int, Slot]]:
    """-> {key: {slot: (text, finish)}}; a line that a crash tore is passed over."""
    found: dict[str, dict[int, Slot]] = {}
    for line in open(path, "rb") if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            item = json.loads(line)
            sample = (str(item["text"]), str(item.get("finish")))
            found.setdefault(item[wanted], {}).setdefault(int(item["slot"]), sample)
    return found


def connect_teacher(config: Config, ask: bool) -> Teacher | None:
    """The teacher that flags or environment name (the URL palm: PaLM's published rationales), None
    where no sample is needed. ask: reach it before anything is paid for. Raises InputError."""
    if config.method == "finetune" and config.labels == "gold" and config.stage != "teacher":
        return None
    ask = ask and RANK == 0
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    default = "https://api.openai.com/v1" if key else "palm"
    url = config.teacher or os.environ.get("OPENAI_BASE_URL") or default
    if config.task == "demo" and not config.teacher:
        url = fetch_data.demo_teacher()[0] if ask else "http://127.0.0.1"
        key = ""
    else:
        config.teacher = url
    wanted = "must be palm or a URL like http://localhost:11434/v1; a key goes into OPENAI_API_KEY"
    require(re.fullmatch(r"palm|https?://[^@?#\s]+", url), f"--teacher: {wanted}")
    require(key.isascii() and key.isprintable(), "OPENAI_API_KEY: holds characters that no key has")
    if "//api.openai.com" in url:
        config.teacher_model = config.teacher_model or "gpt-3.5-turbo"
    if url == "palm":
        say(PALM)
    teacher = Teacher(url, key, config)
    if ask and url != "palm":
        status, body = teacher.call("/models", None)
        if status in (0, 401, 403):
            raise teacher.failure(status, body)
        with contextlib.suppress(TypeError, KeyError, IndexError):
            teacher.model = teacher.model or str(body["data"][0]["id"])
        require(teacher.model, f"teacher {url}: lists no model; name one with --teacher-model")
    teacher.model = config.teacher_model = gather([teacher.model])[0]
    return teacher


def prompts_of(task: Task, examples: list[Example], config: Config) -> list[list[dict]]:
    """The messages that ask for each example, --prompt instead of our system message."""
    own = Path(config.prompt).read_text("utf-8") if config.prompt else ""
    return [fetch_data.messages(task, example.input, own) for example in examples]


def teacher_samples(teacher: Teacher | None, task: Task, examples: list, ask: bool) -> list:
    """Every example's list of K slots. ask: rank 0 asks for those that are not on disk."""
    if teacher is None:
        return [[] for _ in examples]
    if teacher.url == "palm":
        kept = read_cache(fetch_data.palm_samples(task.name), "question")
        return [[kept.get(example.input, {}).get(0)] for example in examples]
    config = teacher.config
    prompts = prompts_of(task, examples, config)
    keys = [teacher.key_of(messages) for messages in prompts]
    slots = range(1 if config.vote == "first" else config.samples)
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", teacher.model)[:80]
    teacher.cache = task.folder / f"teacher-{name}.jsonl"
    kept = read_cache(teacher.cache)
    empty = {key: [k for k in slots if k not in kept.get(key, {})] for key in keys}
    jobs = {key: (messages, empty[key]) for key, messages in zip(keys, prompts) if empty[key]}
    if ask:
        if jobs and RANK == 0:
            teacher.answered = bool(kept)
            ask_teacher(teacher, list(jobs.values()))
        gather([])  # the other ranks wait for the samples
        kept = read_cache(teacher.cache)
    return [[kept.get(key, {}).get(k) for k in slots] for key in keys]


def ask_teacher(teacher: Teacher, jobs: list[tuple[list[dict], list[int]]]) -> None:
    """Fills the jobs' slots through `--concurrency` threads. Raises InputError."""
    total = sum(len(slots) for _, slots in jobs)
    characters = sum(len(message["content"]) for messages, _ in jobs for message in messages)
    tokens = (characters // 4 + 120 * total) // 1000
    say(f"teacher: {teacher.model} at {teacher.url}\n  samples kept in {teacher.cache}")
    say(f"  to ask for: {total} samples of {len(jobs)} questions, roughly {tokens:,} k tokens")
    teacher.cache.parent.mkdir(parents=True, exist_ok=True)
    with open(teacher.cache, "ab") as file:
        file.write(b"\n")  # ends a line that a crash tore
    progress = t5.Progress("  teacher", total)
    teacher.filled = teacher.skipped = 0
    before = teacher.requests
    try:
        with ThreadPool(teacher.config.concurrency) as pool:  # daemons: leaving waits for nobody
            for _ in pool.imap_unordered(lambda job: teacher.fill(*job), jobs):
                progress.update(teacher.filled)
    finally:
        progress.close()
        say(f"  {teacher.filled} samples, {teacher.requests - before} requests")
    if teacher.requests >= teacher.budget:
        say("  --teacher-budget is spent; run again, with another one, for the rest")
    if teacher.skipped:
        say(f"  {teacher.skipped} questions left out: refused, or never answered with text")


# ---------------------------------------------------------------------------------------- 3. Vote


def majority(keys: list[str | None]) -> tuple[str | None, list[int], list[int]]:
    """Self-consistency -> â, the slots of S_pos (a_k = â), the slots of S_neg (a_k ≠ â) [abstract].

    keys: the slots' answers; None, one that cannot be read, is in neither set. A tie goes to the
    answer of the lowest slot [ours].
    """
    counts = collections.Counter(key for key in keys if key is not None)
    best = max(counts, key=counts.__getitem__, default=None)  # the first of equals, in slot order
    positives = [slot for slot, key in enumerate(keys) if key is not None and key == best]
    negatives = [slot for slot, key in enumerate(keys) if key is not None and key != best]
    return best, positives, negatives


@dataclass
class Vote:
    """A question's samples after the vote."""

    slots: list[Slot]
    samples: list[Sample]  # rationale and answer of each slot
    keys: list[str | None]  # what the answers are compared by
    best: str | None  # â
    positives: list[int]  # slots
    negatives: list[int]


def vote_on(task: Task, question: str, slots: list[Slot]) -> Vote:
    """Reads a question's samples and lets them vote."""
    texts = [slot or ("", "") for slot in slots]
    samples = [fetch_data.read_sample(task, question, t, cut=end == "length") for t, end in texts]
    keys = [fetch_data.answer_key(task.kind, sample.answer) for sample in samples]
    return Vote(slots, samples, keys, *majority(keys))


def votes_on(teacher: Teacher | None, task: Task, examples: list, ask: bool) -> list[Vote]:
    """The vote on each question's samples, none where there is no teacher."""
    rows = teacher_samples(teacher, task, examples, ask)
    return [vote_on(task, e.input, row) for e, row in zip(examples, track("  vote", rows))]


def distinct(vote: Vote, slots: Iterable[int]) -> list[str]:
    """The slots' rationales; empty ones and repetitions are dropped [ours]."""
    return [r for r in dict.fromkeys(vote.samples[slot].rationale for slot in slots) if r]


def sets_of(vote: Vote, config: Config) -> tuple[list[str], list[str], str | None]:
    """-> the rationales of S_pos and S_neg, repetitions dropped [ours], and â as its lowest slot
    wrote it. Controls [ours]: --vote first, slot 0, right or wrong; --vote all, every slot."""
    positives, negatives = vote.positives, vote.negatives
    if config.vote != "majority":
        positives, negatives = range(len(vote.samples)), []
    voices = positives if config.vote == "first" else vote.positives
    pos = distinct(vote, positives)
    neg = [r for r in distinct(vote, negatives) if r not in pos]
    answer = vote.samples[voices[0]].answer if voices else None
    return pos, neg, answer


def report_votes(task: Task, examples: list[Example], votes: list[Vote]) -> None:
    """Prints the vote's statistics, counted before repetitions are dropped but for "distinct", and
    warns of a teacher that cannot be read. Raises InputError where no question has a positive."""
    n = len(votes)
    m = sum(len(vote.positives) for vote in votes)
    k = sum(len(vote.negatives) for vote in votes)
    unlike = sum(len(distinct(vote, vote.positives)) for vote in votes)
    voted = sum(bool(vote.positives) for vote in votes)
    alone = sum(bool(vote.positives) and not vote.negatives for vote in votes)
    gold = [fetch_data.answer_key(task.kind, example.label) for example in examples]
    right = sum(vote.best is not None and vote.best == key for vote, key in zip(votes, gold))
    unread = [slot[0] for v in votes for slot, key in zip(v.slots, v.keys) if slot and key is None]
    counts = f"{unlike / n:.2f} distinct; {k / n:.2f} negatives"
    say(f"vote: {m / n:.2f} positives per question (paper: 3.87), {counts}")
    say(f"  {alone / n:.0%} of {n} questions with positives only (paper: more than half),")
    say(f"  majority right on {right / n:.1%}, {len(unread)} samples cannot be read")
    asked = sum(any(vote.slots) for vote in votes)
    if len(unread) > (m + k + len(unread)) / 3 or voted <= asked / 2:
        say("warning: the teacher does not keep to the format, or its samples are cut off: look at")
        say("  --show-prompt, try --prompt FILE or more --teacher-tokens. One of its samples:")
        say(f"  {fetch_data.fold(unread[0])[:300]!r}" if unread else "  (there is none)")
    if right < voted / 20:
        say("warning: the majority is hardly ever right; do --answer, labels and prompt fit?")
    require(voted, "no question has a positive rationale: there is nothing to distil")


# ------------------------------------------------------------------------------------- 4. Student


@dataclass(slots=True, eq=False)
class Question:
    """A question with its sets of rationales as token ids; half a million of them must fit."""

    example: Example  # as text
    x: array  # without a prefix, </s> at the end
    label: array
    S_pos: list[array]
    minority: list[array]  # the vote's part of S_neg
    from_past: list[array] = field(default_factory=list)  # the student's part, this iteration


class Student:
    """A T5 with its tokenizer and precision."""

    def __init__(self, folder: Path, config: Config):
        self.config = config
        self.device = torch.device(config.device)
        self.model = T5.load(folder).to(self.device)
        self.vocab = folder / "spiece.model"
        self.tokenizer = Tokenizer(self.vocab)
        # the prefixes of the two tasks [DSS; the review: <Predict>, <Explain>]
        self.predict = self.tokenizer.encode("predict:")[:-1]
        self.explain = self.tokenizer.encode("explain:")[:-1]
        self.dtype = getattr(torch, config.precision)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def question(self, example: Example, *sets: list[str]) -> Question:
        """A question, its label and `sets`, the vote's two sets of rationales, as token ids."""

        def ids(text: str, limit: int) -> array:
            return array("i", self.tokenizer.encode(text, limit))

        x = ids(example.input, self.config.input_tokens)
        label = ids(example.label, self.config.label_tokens)
        longest = self.config.rationale_tokens
        S_pos, minority = ([ids(r, longest) for r in part] for part in sets or ((), ()))
        return Question(example, x, label, S_pos, minority)

    def inputs(self, prefix: list[int], questions: list[Question]) -> tuple[Tensor, Tensor]:
        """Prefix and x, cut to --input-tokens with </s> kept -> ids (B, S), mask (B, S)."""
        limit = self.config.input_tokens
        rows = [prefix + q.x.tolist() for q in questions]
        ids, mask = pad([row if len(row) <= limit else row[: limit - 1] + [t5.EOS] for row in rows])
        return to_device(ids, self.device), mask

    def loss(self, prefix: list[int], questions: list, targets: list, rows: list[int]) -> Tensor:
        """ℓ, the mean token cross-entropy [mean: ours] of each target given its question, (R,).

        rows: each target's place in `questions`. One encoding serves all targets of a question.
        """
        ids, mask = self.inputs(prefix, questions)
        target, target_mask = pad(targets)
        with self.autocast():
            memory = self.model.encode(ids, mask)
            return self.model.loss(None, mask, target, target_mask, memory, torch.tensor(rows))

    def write(self, prefix: list[int], questions: list, longest: int, tau=0.0, seed=()) -> list:
        """What the student writes for each question: ids, </s> only where it was written.

        Batches of like length, each with random numbers of its own, are shared out among the
        ranks: the same text whatever the number of ranks.
        """
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].x))
        batches = [order[i : i + 128] for i in range(0, len(order), 128)]
        written, size = [], self.tokenizer.size
        for number in track("  writing", range(RANK, len(batches), WORLD)):
            ids, mask = self.inputs(prefix, [questions[i] for i in batches[number]])
            draws = torch.Generator().manual_seed(derive_seed(*seed, number))
            with self.autocast():
                rows = self.model.generate(ids, mask, longest, tau, draws, limit=size).tolist()
            for i, row in zip(batches[number], rows):
                end = row.index(t5.EOS) + 1 if t5.EOS in row else len(row)
                written.append((i, array("i", row[:end])))
        return [row for _, row in sorted(gather(written), key=lambda pair: pair[0])]


# ----------------------------------------------------------------------------------- 5. Negatives


def past_student(run: "Run", t: int) -> Student | None:
    """Who writes negatives for iteration t: the student after t - j iterations [review], nobody
    while t ≤ j [ours]; --negative-source fixed: the student as it started [table], or another."""
    config, past = run.config, copy.copy(run.student)
    if config.negative_source == "fixed":
        past.model = T5.load(student_folder(config.negative_model or config.model))
    elif config.negative_source == "snapshot" and t > config.lag:
        past.model = copy.deepcopy(past.model)
        past.model.load_state_dict(t5.read_pt(run.folder / f"snapshots/{t - config.lag}.pt"))
    else:
        return None
    past.model.to(past.device)
    return past


def add_past_negatives(run: "Run", t: int, questions: list[Question]) -> None:
    """Before iteration t an earlier student writes a rationale for each question at τ = 1.5; it
    joins the question's S_neg [review]. Empty ones and ones equal to a positive do not [ours].
    `questions`: those that the iteration visits, and the validation questions that D judges."""
    config, past = run.config, past_student(run, t)
    if past is None:
        return
    tau, end = config.student_temperature, config.student_temperature_end
    if end:
        tau += (end - tau) * min(1, (t - 1) / max(1, config.iterations - 1))
    asked = [q for q in questions for _ in range(config.student_samples)]
    seed = (config.seed, "negatives", t)
    for q, r in zip(asked, past.write(past.explain, asked, config.rationale_tokens, tau, seed)):
        if set(r) - {t5.PAD, t5.EOS} and r not in q.S_pos + q.from_past:
            q.from_past.append(r)


# ------------------------------------------------------------------------------- 6. Discriminator


class Discriminator(nn.Module):
    """D, the judge of rationales: a T5 encoder, max-pooling, two linear layers [review]. The
    encoder is a copy of the student's pretrained one [ours; the review: T5-base's]."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student
        self.encoder = student.model.encoder_only()
        width = student.model.config.d_model
        torch.manual_seed(derive_seed(student.config.seed, "head"))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.to(student.device)

    def forward(self, pairs: list[tuple[array, array]]) -> Tensor:
        """s(x, r) = D(x, r) in [0, 1] [eq. 1; the sigmoid: ours] of the pairs (x, r), (R,) float32.
        The encoder reads the ids of x, whose </s> is the border, then those of r."""
        config, device = self.student.config, self.student.device
        limit = config.input_tokens + config.rationale_tokens
        ids, mask = pad([(x + r)[:limit] for x, r in pairs])
        with self.student.autocast():
            memory = self.encoder.encode(to_device(ids, device), mask)
            padding = ~to_device(mask, device)[..., None]
            logits = self.head(memory.masked_fill(padding, -torch.inf).amax(1))
        return logits.squeeze(-1).float().sigmoid()


def discriminator_loss(s_pos: list[Tensor], s_neg: list[Tensor]) -> Tensor:
    """L_D = E_x[ -log( Σ exp(s_pos) / Σ exp(s_neg) ) ] [eq. 2]: a question's m positives above the
    line, its k negatives, and they alone, below it. A tensor of scores a question in each list.
    It stays the same when all scores rise alike: their level, which weighs in eq. (6), is open."""
    terms = [neg.exp().sum().log() - pos.exp().sum().log() for pos, neg in zip(s_pos, s_neg)]
    return torch.stack(terms).mean()


def corrupt(words: list[str], others: list[str], rng: np.random.Generator) -> str:
    """A negative made of a positive: 30 % of its words, one at least, go or become words of other
    rationales [review: masking and replacement; 30 %, and no mask symbol to give it away: ours]."""
    hit = rng.random(len(words)) < 0.3
    if not hit.any():
        hit[rng.integers(len(words))] = True
    kept = []
    for word, changed in zip(words, hit):
        if not changed:
            kept.append(word)
        elif rng.random() < 0.5:
            kept.append(others[rng.integers(len(others))])
    return " ".join(kept)


def discriminator_sets(student: Student, q: Question, others: list[str], rng) -> list[list[array]]:
    """S_pos and S_neg as L_D sees them: S_neg is filled up to the size of S_pos with corrupted
    positives [review, of pretraining; in updates, and up to that size: ours];
    --discriminator-noise swaps the two."""
    config, S_neg = student.config, q.minority + q.from_past
    while len(S_neg) < len(q.S_pos):
        words = student.tokenizer.decode(q.S_pos[rng.integers(len(q.S_pos))]).split() or ["the"]
        text = corrupt(words, others, rng)
        S_neg.append(array("i", student.tokenizer.encode(text, config.rationale_tokens)))
    return [S_neg, q.S_pos] if rng.random() < config.discriminator_noise else [q.S_pos, S_neg]


def train_discriminator(run: "Run", t: int, questions: list, steps: int, alpha_d: float) -> None:
    """Pretraining (t = 0) or the update before iteration t, alike on every rank.

    D has an encoder of its own, so that a factor on L_D would cancel in Adam: α3 / 0.5 scales its
    learning rate instead [ours].
    """
    config, student, D = run.config, run.student, run.discriminator
    questions = [q for q in questions if q.S_pos]
    if not questions:
        return
    rng = np.random.default_rng(derive_seed(config.seed, "discriminator", t))
    torch.manual_seed(derive_seed(config.seed, "discriminator's dropout", t))
    D.train()
    total = torch.zeros((), device=student.device)
    for _ in track("  discriminator", range(steps)):
        drawn = rng.integers(len(questions), size=config.discriminator_questions)
        some = [questions[i] for i in drawn]
        others = " ".join(student.tokenizer.decode(r) for q in some for r in q.S_pos).split()
        sets = [discriminator_sets(student, q, others or ["the"], rng) for q in some]
        s = D([(q.x, r) for q, both in zip(some, sets) for part in both for r in part])
        parts = s.split([len(part) for both in sets for part in both])
        L_D = discriminator_loss(parts[0::2], parts[1::2])
        run.d_optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(L_D).backward()
        descend(run.d_optimizer, run.scaler, config.discriminator_lr * alpha_d / 0.5)
        total += L_D.detach()
    for parameter in D.parameters() if WORLD > 1 else []:
        dist.broadcast(parameter.data, 0)  # on CUDA the last digits of the ranks' steps may part
    run.L_D = total.item() / max(1, steps)


def judge_validation(run: "Run") -> dict[str, Any]:
    """What D makes of validation questions: mean s of the teacher's positives and negatives and of
    the student's samples, and how often a positive scores above a negative of its question."""
    scores: dict[str, list] = {"positives": [], "teacher": [], "student": []}
    pairs: dict[str, list] = {"teacher": [], "student": []}
    for q in run.judged:
        s = run.score([(q.x, r) for r in q.S_pos + q.minority + q.from_past]).tolist()
        m, k = len(q.S_pos), len(q.S_pos) + len(q.minority)
        scores["positives"] += s[:m]
        for name, negatives in (("teacher", s[m:k]), ("student", s[k:])):
            scores[name] += negatives
            pairs[name] += [(a > b) + 0.5 * (a == b) for a in s[:m] for b in negatives]
    means = {name: mean(values) for name, values in scores.items()}
    return {"s": means, "pair": mean(pairs["teacher"]), "pair_student": mean(pairs["student"])}


# ---------------------------------------------------------------------------------------- 7. Loss

NOT_A_NUMBER = "a loss became infinite or NaN; try a lower --lr, or --precision float32"


@dataclass(eq=False)
class Candidate:
    """A rationale of a question's S_pos or S_neg."""

    row: int  # its question's place among those at hand
    r: array
    positive: bool
    source: str  # "teacher" or "student"
    loss: float = math.nan  # ℓ(f(x), r) in eval mode
    share: float = 0.0  # 1 where it is picked, 1/count under a mean, else 0


def candidates_of(questions: list[Question], config: Config) -> list[Candidate]:
    """Each question's S_pos, then its S_neg as the loss sees it."""
    found = []
    for row, q in enumerate(questions):
        found += [Candidate(row, r, True, "teacher") for r in q.S_pos]
        if config.negative_source != "none":
            found += [Candidate(row, r, False, "teacher") for r in q.minority]
            found += [Candidate(row, r, False, "student") for r in q.from_past]
    return found


@torch.no_grad()
def measure(student: Student, questions: list[Question], candidates: list[Candidate]) -> None:
    """ℓ of the candidates in eval mode without gradient [ours]. Raises InputError for a NaN."""
    student.model.eval()
    targets, rows = [c.r for c in candidates], [c.row for c in candidates]
    losses = student.loss(student.explain, questions, targets, rows).tolist() if targets else []
    for c, loss in zip(candidates, losses):
        require(math.isfinite(loss), NOT_A_NUMBER)
        c.loss = loss


def chosen(losses: list[float], positive: bool, scheme: str, rng: random.Random) -> list[int]:
    """Which members of a set count, given their ℓ; the first on a tie [ours].

    minmax: r⁺ = argmin over S_pos of ℓ [eq. 4], r⁻ = argmax over S_neg of ℓ [eq. 5]; the margin
    keeps the order. Of the other schemes [table] the names are known, the rest is [ours].
    """
    if scheme in ("mean", "wmean"):
        return list(range(len(losses)))
    if scheme == "sampling":
        return [rng.randrange(len(losses))]
    best_of = {"minmax": (min, max), "maxmin": (max, min), "minmin": (min, min)}
    best = best_of[scheme][0 if positive else 1]
    return [losses.index(best(losses))]


def pick(candidates: list[Candidate], questions: list[Question], config: Config, step: int) -> None:
    """Gives those candidates a share that count in the loss."""
    for (row, positive), group in itertools.groupby(candidates, lambda c: (c.row, c.positive)):
        members = list(group)
        text = questions[row].example.input
        rng = random.Random(derive_seed(config.seed, "pick", step, text, positive))
        places = chosen([c.loss for c in members], positive, config.scheme, rng)
        for i in places:
            members[i].share = 1 / len(places)


def rationale_losses(student: Student, questions: list[Question], picks: list) -> Tensor:
    """ℓ of the picks with gradient, (P,). A negative that the eval pass finds beyond δ adds nothing
    and is not run again."""
    losses = to_device(torch.tensor([c.loss for c in picks]), student.device)
    again = [i for i, c in enumerate(picks) if c.positive or c.loss < student.config.delta]
    if not again:
        return losses
    targets, rows = [picks[i].r for i in again], [picks[i].row for i in again]
    with_gradient = student.loss(student.explain, questions, targets, rows)
    return losses.index_put((to_device(torch.tensor(again), student.device),), with_gradient)


def weights_of(s: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """What weighs a positive, s(x, r⁺) [eq. 6], and a negative, 1 - s(x, r⁻) [eq. 7], without
    gradient [ours]; 1 without a discriminator, and under `mean`, beside which W-mean stands."""
    if not config.discriminator or config.scheme == "mean":
        return torch.ones_like(s), torch.ones_like(s)
    return s.detach(), 1 - s.detach()


def contrastive_terms(losses, s, positive, share, config: Config) -> Tensor:
    """What each picked rationale adds to its question's part of L_cl [eq. 3]. All (P,)."""
    w_pos, w_neg = weights_of(s, config)
    l_S_pos = w_pos * losses  # [eq. 6]
    l_S_neg = w_neg * (losses - config.delta).clamp(max=0)  # [eq. 7], with the margin of eq. (5)
    return share * torch.where(positive, l_S_pos, -config.beta * l_S_neg)


def alphas_of(config: Config, t: int) -> tuple[float, float, float]:
    """α1, α2, α3 of iteration t: 0.5 each, α3 times 0.9 after each iteration [review]."""
    if config.method == "finetune":
        return 1.0, 0.0, 0.0
    alpha_d = config.alpha_d * config.alpha_d_decay ** (t - 1) if config.discriminator else 0.0
    return config.alpha_pred, config.alpha_cl, alpha_d


def total_loss(alphas: tuple, L_pred: Any, L_cl: Any, L_D: Any) -> Any:
    """L_total = α1 · L_pred + α2 · L_cl + α3 · L_D [eq. 8]."""
    return alphas[0] * L_pred + alphas[1] * L_cl + alphas[2] * L_D


def step_loss(run: "Run", questions: list[Question], n: int, t: int) -> Tensor:
    """α1 · L_pred + α2 · L_cl of these questions, out of n in the global batch [eq. 3 to 7, and 8
    without α3 · L_D, which has other parameters: see train_discriminator]."""
    config, student, alphas = run.config, run.student, alphas_of(run.config, t)
    candidates = candidates_of(questions, config) if alphas[1] else []
    if config.method == "qcrd":  # dss has one candidate a question
        measure(student, questions, candidates)
    pick(candidates, questions, config, run.step)
    picks = [c for c in candidates if c.share]
    positive = torch.tensor([c.positive for c in picks], dtype=torch.bool)
    positive = to_device(positive, student.device)
    share = to_device(torch.tensor([c.share for c in picks]), student.device)
    s = run.score([(questions[c.row].x, c.r) for c in picks])  # [eq. 1]

    student.model.train()
    labels, rows = [q.label for q in questions], list(range(len(questions)))
    L_pred = student.loss(student.predict, questions, labels, rows).sum() / n
    losses = rationale_losses(student, questions, picks)
    L_cl = contrastive_terms(losses, s, positive, share, config).sum() / n

    pos, neg = share * positive, share * ~positive
    run.note("L_pred", L_pred, len(questions) / n)
    run.note("L_cl", L_cl, len(questions) / n)
    run.note("l_pos", (pos * losses).sum(), pos.sum())
    run.note("l_neg", (neg * losses).sum(), neg.sum())
    run.note("zero", (neg * (losses >= config.delta)).sum(), neg.sum())
    if run.discriminator:
        run.note("s_pos", (pos * s).sum(), pos.sum())
        run.note("s_neg", (neg * s).sum(), neg.sum())
    return total_loss(alphas, L_pred, L_cl, 0.0)


# ------------------------------------------------------------------------------------ 8. Training


def all_reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Adds up the ranks' gradients, whose losses are divided by the global batch already."""
    if WORLD > 1:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)


def descend(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float) -> None:
    """A step, the gradient's norm clipped at 1 [DSS]. The scaler, which does nothing but for fp16,
    skips one whose gradients overflowed."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    scaler.step(optimizer)
    scaler.update()


SAVED = ("lines", "step", "L_D", "digest")


class Run:
    """A run: settings, data, student, discriminator, folder, and what checkpoint.pt keeps."""

    def __init__(self, config: Config, task: Task | None, student: Student, folder: Path):
        self.config = config
        self.task = task
        self.student = student
        self.folder = folder
        self.train: list[Question] = []
        self.valid: list[Question] = []
        self.judged: list[Question] = []  # validation questions whose rationales D scores
        self.digest = ""  # of the data: a run goes on with what it began with
        self.lines: list[dict] = []  # metrics.jsonl, one of each completed iteration
        self.step = 0
        self.L_D = 0.0  # of the last training of the discriminator
        self.sums: dict[str, list] = {}
        adamw = {"lr": 0.0, "weight_decay": 0.0, "fused": True}  # no weight decay [DSS]
        self.optimizer = torch.optim.AdamW(student.model.parameters(), **adamw)
        fp16 = student.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=fp16)
        self.parts = {"student": student.model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.discriminator = Discriminator(student) if config.discriminator else None
        if self.discriminator is not None:
            self.d_optimizer = torch.optim.AdamW(self.discriminator.parameters(), **adamw)
            self.parts |= {"discriminator": self.discriminator, "d_optimizer": self.d_optimizer}

    @property
    def iteration(self) -> int:
        """Completed iterations."""
        return len(self.lines)

    @property
    def best(self) -> dict[str, Any]:
        """The line of the best validation, of the later iteration on a tie [ours]."""
        return max(self.lines, key=lambda line: (line["valid"], line["iteration"]))

    @torch.no_grad()
    def score(self, pairs: list[tuple[array, array]]) -> Tensor:
        """s of each pair (x, r) in eval mode [eq. 1], (R,); 1 without a discriminator."""
        if self.discriminator is None or not pairs:
            return torch.ones(len(pairs), device=self.student.device)
        self.discriminator.eval()
        parts = [self.discriminator(pairs[i : i + 128]) for i in range(0, len(pairs), 128)]
        return torch.cat(parts)

    def note(self, name: str, amount: Tensor, count: Tensor | float) -> None:
        """Adds to a mean of the iteration's line, on the device and without waiting for it."""
        total, counted = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = [total + amount.detach(), counted + count]

    def save(self) -> None:
        """What an iteration leaves on disk. checkpoint.pt comes last: a crash before it costs the
        iteration. It holds no random state: every draw is seeded by what it is for."""
        folder, t = self.folder, self.iteration
        if self.best["iteration"] == t:
            self.student.model.save(folder / "student", vocab=self.student.vocab)
            if self.discriminator is not None:
                t5.write_pt(folder / "student/discriminator.pt", self.discriminator.state_dict())
        if self.config.negative_source == "snapshot":
            t5.write_pt(folder / f"snapshots/{t}.pt", self.student.model.state_dict())
            # t - j stays: iteration t reads it once more where a crash repeats it
            (folder / f"snapshots/{t - self.config.lag - 1}.pt").unlink(missing_ok=True)
        fetch_data.write_lines(folder / "metrics.jsonl", self.lines)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        t5.write_pt(folder / "checkpoint.pt", state | {name: getattr(self, name) for name in SAVED})

    def restore(self) -> None:
        """Reads checkpoint.pt. Raises InputError where the data are others now."""
        state = t5.read_pt(self.folder / "checkpoint.pt")
        same = state["digest"] == self.digest
        require(same, f"{self.folder}: was made with other questions or samples; start a new run")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name in SAVED:
            setattr(self, name, state[name])


def visits(config: Config, n: int, t: int) -> list[int]:
    """The questions of iteration t in order: one pass, or --iteration-steps batches of an endless
    stream of shuffled passes [ours]."""
    count = config.iteration_steps * config.batch or n
    start = (t - 1) * count
    stream: list[int] = []
    for number in range(start // n, (start + count - 1) // n + 1):
        rng = np.random.default_rng(derive_seed(config.seed, "order", number))
        stream += rng.permutation(n).tolist()
    return stream[start % n : start % n + count]


def train_step(run: Run, batch: list[Question], t: int, total: int) -> None:
    """One of `total` optimizer steps; the gradient adds up over micro-batches of like length."""
    config, student = run.config, run.student
    mine = sorted(batch[RANK::WORLD], key=lambda q: sum(map(len, q.S_pos + q.minority)))
    size = config.micro_batch or (len(batch) if student.device.type == "cuda" else 16)
    run.optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(mine), size):
        loss = step_loss(run, mine[start : start + size], len(batch), t)
        run.scaler.scale(loss).backward()
    all_reduce_gradients(list(student.model.parameters()))
    descend(run.optimizer, run.scaler, config.lr * (1 - run.step / total))
    run.step += 1


def train_iteration(run: Run) -> None:
    """Negatives, discriminator, steps, validation; then everything is on disk."""
    config, t, start = run.config, run.iteration + 1, time.perf_counter()
    order = visits(config, len(run.train), t)
    visited = [run.train[i] for i in sorted(set(order))]
    for q in run.train + run.valid:
        q.from_past = []
    add_past_negatives(run, t, visited + run.judged)
    every = config.discriminator_every
    if run.discriminator and every and t % every == 0:
        train_discriminator(run, t, visited, config.discriminator_steps, alphas_of(config, t)[2])

    torch.manual_seed(derive_seed(config.seed, "dropout", t, RANK))
    run.sums = {}
    batches = [order[i : i + config.batch] for i in range(0, len(order), config.batch)]
    for batch in track(f"  iteration {t}/{config.iterations}", batches):
        train_step(run, [run.train[i] for i in batch], t, config.iterations * len(batches))

    line = metrics(run, t, visited)
    line["valid"] = mean([row["right"] for row in evaluate(run, run.valid)])
    line["seconds"] = time.perf_counter() - start
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # no Ctrl-C in the middle of a file
    run.lines.append(line)
    say(table_row(line) + ("*" if run.best is line else ""))
    if RANK == 0:
        run.save()
    signal.signal(signal.SIGINT, before)
    gather([])  # the others wait for what rank 0 has written


def metrics(run: Run, t: int, visited: list[Question]) -> dict[str, Any]:
    """An iteration's line: the means of what its loss was made of. Raises InputError for a NaN."""
    alphas = alphas_of(run.config, t)
    line: dict[str, Any] = {"iteration": t, "alphas": alphas, "L_D": run.L_D}
    for name, sums in run.sums.items():
        total, count = map(sum, zip(*gather([[float(x) for x in sums]])))
        require(math.isfinite(total), NOT_A_NUMBER)
        line[name] = total / count if count else None
    line["L"] = total_loss(alphas, line["L_pred"], line["L_cl"], run.L_D)
    from_past = [(q, r) for q in visited for r in q.from_past]
    line["minor"] = mean([len(q.minority) for q in visited])
    line["past"] = len(from_past) / len(visited)
    line["right"] = mean([rationale_right(run, q, r) for q, r in from_past])
    return line | judge_validation(run)


COLUMNS = """iteration:9d L:6.3f L_pred:6.3f L_cl:6.3f L_D:6.3f l_pos:5.2f l_neg:5.2f zero:5.0%
s_pos:5.2f s_neg:5.2f pair:5.0% minor:5.2f past:5.2f right:5.0% valid:6.1% seconds:7.1f"""
WIDE = ("l_pos", "l_neg", "s_pos", "s_neg", "minor")  # left out on narrower terminals
LEGEND = """l_pos, l_neg: ℓ of r⁺ and r⁻; zero: part of the negative terms that are 0;
s_pos, s_neg: their s; pair: how often a positive scores above a negative of its
validation question; minor, past: negatives per question of the vote's minority
and of the student's past; right: part of the latter that end in the right
answer; *: the best validation so far"""


def table_row(line: dict[str, Any] | None = None) -> str:
    """A line of metrics.jsonl in at most 110 columns, or 80; None: the heading."""
    narrow = shutil.get_terminal_size((110, 0)).columns < 110
    cells = []
    for name, form in (column.split(":") for column in COLUMNS.split()):
        if narrow and name in WIDE:
            continue
        value = name if line is None else line.get(name)
        text = isinstance(value, str | None)
        cells.append(f"{value or '-':>{form[0]}}" if text else format(value, form))
    return " ".join(cells)


def student_folder(model: str) -> Path:
    """--model as a Hugging Face folder; a published student is fetched once. Raises InputError."""
    if model in ("t5-small", "t5-base"):
        return fetch_data.ensure(model)
    folder = fetch_data.HERE / "weights/demo" if model == "demo" else Path(model)
    there = (folder / "config.json").is_file() and (folder / "spiece.model").is_file()
    kinds = "--model takes demo, t5-small, t5-base or a Hugging Face T5 folder"
    require(there, f"{folder}: no config.json and spiece.model there; {kinds}")
    return folder


def prepare(config: Config, folder: Path, ask: bool) -> Run | None:
    """Everything before training; what is missing is said before anything is paid for.

    ask False: with the samples on disk, for a run that has begun. None: --stage teacher is done.
    """
    teacher = connect_teacher(config, ask)
    for model in (config.model, config.negative_model):
        if model and not model.startswith("t5-"):
            student_folder(model)  # before the task is fetched
    if RANK > 0:
        gather([])  # rank 0 downloads what is missing before the others look for it
    task = fetch_data.load_task(config.task, config.answer)
    task.train[:] = task.train[: max(1, round(len(task.train) * config.fraction))]
    run = None
    if config.stage != "teacher":
        run = Run(config, task, Student(student_folder(config.model), config), folder)
    if RANK == 0:
        gather([])
    digest = hashlib.sha256()
    for name, examples in (("train", task.train), ("valid", task.valid)):
        asked = teacher if name == "train" or config.discriminator else None
        votes = votes_on(asked, task, examples if name == "train" else examples[:JUDGED], ask)
        votes += [vote_on(task, e.input, []) for e in examples[len(votes) :]]
        if asked and name == "train":
            report_votes(task, examples, votes)
        if run is None:
            continue
        for example, vote in zip(examples, votes):
            S_pos, minority, answer = sets_of(vote, config)
            if config.labels == "teacher" and name == "train":
                example = Example(example.input, answer)
            if example.label is not None:  # without an answer of the teacher it is left out
                q = run.student.question(example, S_pos, minority)
                getattr(run, name).append(q)
                digest.update(repr([q.x, q.label, q.S_pos, q.minority]).encode())
    if run is not None:
        run.digest = digest.hexdigest()
        run.judged = run.valid[:JUDGED] if run.discriminator else []
    return run


def train(config: Config, folder: Path, resumed: bool) -> None:
    """A whole run, new or resumed."""
    run = prepare(config, folder, ask=not resumed)
    if run is None:
        return say("the teacher is done; without --stage teacher its samples are trained on")
    steps = config.iteration_steps or math.ceil(len(run.train) / config.batch)
    config.iterations = config.iterations or math.ceil(config.steps / steps)
    if (folder / "checkpoint.pt").exists():
        run.restore()
    if RANK == 0:
        for path in folder.rglob("*.tmp"):  # what a killed process was writing
            path.unlink()
        fetch_data.write_lines(folder / "config.json", [dataclasses.asdict(config)])
    size = sum(p.numel() for p in run.student.model.parameters()) / 1e6
    say(f"student: {config.model}, {size:.1f}M parameters, {config.precision} on {config.device}")
    say(f"  {len(run.train)} questions, {config.iterations} iterations of {steps} steps")
    say(f"run folder: {folder}" + (f", after iteration {run.iteration}" if resumed else ""))
    try:
        if run.discriminator and run.iteration == 0:
            train_discriminator(run, 0, run.train, config.discriminator_pretrain, alpha_d=0.5)
            say(f"discriminator: L_D {run.L_D:.3f} after {config.discriminator_pretrain} steps")
        say(f"{LEGEND}\n{table_row()}")
        first = run.iteration + 1
        while run.iteration < config.iterations:
            train_iteration(run)
            hours = (config.iterations - run.iteration) * run.lines[-1]["seconds"] / 3600
            if run.iteration == first and hours > 0.2:
                say(f"  {hours:.1f} h to go; fewer --iterations or --iteration-steps take less")
        test(run)
    except KeyboardInterrupt:
        say(f"stopped; python qcrd.py --resume {folder} goes on after iteration {run.iteration}")
        raise


# ---------------------------------------------------------------------------------- 9. Evaluation


def rationale_right(run: Run, q: Question, r: array) -> bool:
    """Whether a rationale, read like a teacher's sample, names the right answer."""
    text = run.student.tokenizer.decode(r)
    answer = fetch_data.read_sample(run.task, q.example.input, text).answer
    return fetch_data.is_right(run.task.kind, answer, q.example.label)


def evaluate(run: Run, questions: list[Question], rationales: bool = False) -> list[dict]:
    """Greedy answers -> {input, gold, answer, right} a question; with `rationales` also {rationale,
    rationale_right, quality}, quality being s(x, r), None without a discriminator."""
    student, config = run.student, run.config
    read = student.tokenizer.decode
    rows = []
    for q, ids in zip(questions, student.write(student.predict, questions, config.label_tokens)):
        answer, gold = read(ids), q.example.label
        right = fetch_data.is_right(run.task.kind, answer, gold)
        rows.append({"input": q.example.input, "gold": gold, "answer": answer, "right": right})
    if rationales and config.method != "finetune":
        written = student.write(student.explain, questions, config.rationale_tokens)
        quality = run.score([(q.x, r) for q, r in zip(questions, written)]).tolist()
        for row, q, r, s in zip(rows, questions, written, quality):
            row["rationale"] = read(r)
            row["rationale_right"] = rationale_right(run, q, r)
            row["quality"] = s if run.discriminator else None
    return rows


def accuracies(rows: list[dict]) -> dict[str, float | None]:
    """Of `evaluate`'s rows; None where no rationales were written."""
    keys = {"test_accuracy": "right", "rationale_accuracy": "rationale_right"}
    return {name: mean([row[key] for row in rows if key in row]) for name, key in keys.items()}


def test(run: Run) -> None:
    """The student that was best on validation, and the last one, on the test questions ->
    predictions.jsonl, result.json."""
    questions = [run.student.question(example) for example in run.task.test]
    rows = evaluate(run, questions, rationales=True)
    last = accuracies(rows)
    if run.best["iteration"] != run.iteration:
        rows = evaluate(load_trained(run.folder, run.config, run.task), questions, rationales=True)
    result = accuracies(rows) | {f"{name}_last": value for name, value in last.items()}
    result |= {"questions": len(rows), "valid_accuracy": run.best["valid"]}
    result["best_iteration"] = run.best["iteration"]
    if RANK == 0:
        fetch_data.write_lines(run.folder / "predictions.jsonl", rows)
        fetch_data.write_lines(run.folder / "result.json", [result])
    print_result(run.folder, result)


def print_result(folder: Path, result: dict[str, Any]) -> None:
    n = result["questions"]
    say(f"test, {n} questions; student of iteration {result['best_iteration']}, best on validation")
    for name in ("test_accuracy", "rationale_accuracy"):
        if result[name] is not None:
            last = f"last student {result[f'{name}_last']:.1%}"
            say(f"  {name:18s} {interval(result[name], n)}, {last}")
    say(f"run folder: {folder}")
    say(f'  python qcrd.py --ask {folder} "a question"')
    say(f"  python qcrd.py --audit {folder} 1")


def interval(p: float, n: int) -> str:
    """An accuracy p on n questions with Wilson's 95 % interval."""
    z = 1.96
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = abs(center - half), center + half  # abs: of -0.0
    return f"{p:6.1%} (95 % interval {low:.1%} to {high:.1%})"


def load_trained(folder: Path, config: Config, task: Task) -> Run:
    """A run's selected student with its discriminator. Raises InputError."""
    run = Run(config, task, Student(folder / "student", config), folder)
    if run.discriminator is not None:
        run.discriminator.load_state_dict(t5.read_pt(folder / "student/discriminator.pt"))
    return run


def use(folder: Path, config: Config, texts: list[str], file: str) -> None:
    """Answers and explains `texts`, or evaluates a JSONL file, by default the test questions:
    predictions on stdout, accuracies on stderr. Raises InputError."""
    task = fetch_data.load_task(config.task, config.answer)
    examples = fetch_data.read_split(Path(file), task.kind) if file else task.test
    examples = [Example(text, "") for text in texts] or examples
    run = load_trained(folder, config, task)
    rows = evaluate(run, [run.student.question(example) for example in examples], rationales=True)
    for row in rows:
        if not texts:
            print(json.dumps(row, ensure_ascii=False))
            continue
        for title, name in (("label", "answer"), ("rationale",) * 2, ("quality",) * 2):
            print(f"{title + ':':10s} {safe(str(row.get(name)))}")
    for name, value in accuracies(rows).items():
        if value is not None and not texts:
            print(f"{name} {interval(value, len(rows))} on {len(rows)} questions", file=sys.stderr)


def audit(folder: Path, config: Config, count: int, as_json: bool) -> None:
    """The first `count` questions of the next iteration with its negatives and the checkpoint's
    weights (D's before its update), without dropout, by the functions that train: text or JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        run = prepare(config, folder, ask=False)
        run.restore()
        t = run.iteration + 1
        order = visits(config, len(run.train), t)
        questions = [run.train[i] for i in order[:count]]
        add_past_negatives(run, t, [run.train[i] for i in sorted(set(order))] + run.judged)
        teacher = connect_teacher(config, ask=False)
        votes = votes_on(teacher, run.task, [q.example for q in questions], ask=False)
        items = [audit_question(run, q, vote, t) for q, vote in zip(questions, votes)]
    if as_json:
        return print(json.dumps(items, ensure_ascii=False, indent=1))
    print(f"{folder}: student and D after {run.iteration} iterations, D before its next update, no")
    print("dropout. L_D is eq. (2) on the candidates shown, without the fillers of training.")
    for item in items:
        audit_text(item)


@torch.no_grad()
def audit_question(run: Run, q: Question, vote: Vote, t: int) -> dict[str, Any]:
    """What `step_loss` computes for one question, L_D, and all that they are made of."""
    config, student, alphas = run.config, run.student, alphas_of(run.config, t)
    candidates = candidates_of([q], config) if alphas[1] else []
    measure(student, [q], candidates)
    pick(candidates, [q], config, run.step)
    s = run.score([(q.x, c.r) for c in candidates]).cpu()
    positive = torch.tensor([c.positive for c in candidates], dtype=torch.bool)
    weights = torch.where(positive, *weights_of(s, config))
    losses, share = (torch.tensor([getattr(c, a) for c in candidates]) for a in ("loss", "share"))
    L_cl = contrastive_terms(losses, s, positive, share, config).sum().item()
    L_pred = student.loss(student.predict, [q], [q.label], [0]).item()
    L_D = 0.0
    if run.discriminator and 0 < positive.sum() < len(s):
        L_D = discriminator_loss([s[positive]], [s[~positive]]).item()
    item = {"question": q.example.input, "label": q.example.label, "iteration": t, "alphas": alphas}
    item |= {"beta": config.beta, "delta": config.delta, "scheme": config.scheme}
    item |= {"majority": vote.best, "samples": [], "candidates": []}
    for k, sample in enumerate(vote.samples):
        side = "positive" if k in vote.positives else "negative" if k in vote.negatives else "none"
        row = {"slot": k, "answer": sample.answer, "vote": side, "rationale": sample.rationale}
        item["samples"].append(row)
    for c, score, weight in zip(candidates, s.tolist(), weights.tolist()):
        row = {"set": "positive" if c.positive else "negative", "source": c.source, "loss": c.loss}
        row |= {"score": score, "weight": weight, "share": c.share, "picked": c.share > 0}
        item["candidates"].append(row | {"rationale": student.tokenizer.decode(c.r)})
    L_total = total_loss(alphas, L_pred, L_cl, L_D)
    return item | {"L_pred": L_pred, "L_cl": L_cl, "L_D": L_D, "L_total": L_total}


def safe(text: str) -> str:
    """A model's text on one line, without what would control the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def audit_text(item: dict[str, Any]) -> None:
    """One audited question with all that its sum is made of."""
    print("\nquestion: {question}\nlabel: {label}   majority: {majority}".format(**item))
    for sample in item["samples"]:
        print(safe("  slot {slot}: answer {answer}, {vote}: {rationale}".format(**sample)))
    terms = []
    for c in item["candidates"]:
        mark = "->" if c["picked"] else "  "
        line = "{set} of the {source}, ℓ {loss:.4f}, s {score:.4f}: {rationale}".format(**c)
        print(mark, safe(line))
        term = "+ {weight:.4f} · {loss:.4f}"
        if c["set"] == "negative":
            term = "- {beta:g} · {weight:.4f} · min({loss:.4f} - {delta:g}, 0)"
        if c["share"] < 1:
            term += " · {share:.4f}"
        if c["picked"]:
            terms.append(term.format(**c, **item))
    print(f"L_cl = {' '.join(terms).removeprefix('+ ') or 0} = {item['L_cl']:.4f}")
    line = "L_total = {:g} · L_pred {L_pred:.4f} + {:g} · L_cl {L_cl:.4f} + {:.4f} · L_D {L_D:.4f}"
    print(line.format(*item["alphas"], **item), f"= {item['L_total']:.4f}")


# ---------------------------------------------------------------------------------- Command line

EPILOG = """Teacher by default: OPENAI_BASE_URL and OPENAI_API_KEY, else palm, which is
PaLM's published rationales. Negatives: snapshot, of the student j iterations
ago; fixed, of the student at the start; sc, of the vote alone; none at all.
QCRD_MIRROR: a folder or URL instead of https:// for downloads.
Defaults that differ by task:"""


def parser() -> argparse.ArgumentParser:
    """A flag for each field of Config, and the commands that use a run."""
    lines = [EPILOG]
    for name, defaults in (OTHER_DEFAULTS | {"--model demo": DEMO_STUDENT}).items():
        shown = ", ".join(f"{flag(k)} {v}" for k, v in defaults.items())
        lines.append(textwrap.fill(f"{name}: {shown}", 78, initial_indent="  "))
    how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    how |= {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    how |= {"usage": "python qcrd.py [--task TASK] [flags]"}
    p = argparse.ArgumentParser(description=__doc__, epilog="\n".join(lines), **how)
    group = p.add_argument_group("use a run, a folder under runs/")
    add = group.add_argument
    add("--resume", nargs=1, metavar="RUN", help="go on after a crash or Ctrl-C")
    add("--ask", nargs="+", metavar=("RUN", "QUESTION"), help="label, rationale, quality")
    add("--audit", nargs=2, metavar=("RUN", "N"), help="N questions: votes, ℓ, s, picks, sums")
    add("--eval", nargs="+", metavar=("RUN", "FILE"), help="accuracies on a JSONL file or the test")
    add("--json", action="store_true", help="with --audit: data instead of text")
    add("--show-prompt", action="store_true", help="what the teacher would be asked")
    for setting in dataclasses.fields(Config):
        group = p.add_argument_group(GROUPS[setting.name]) if setting.name in GROUPS else group
        kind, choices = type(setting.default), setting.metadata["choices"] or None
        shown = "|".join(filter(None, choices or [])) or kind.__name__
        how = {"type": kind, "choices": choices, "metavar": shown}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        shown = f"({setting.default}) " if setting.default != "" else ""
        text = f"{setting.metadata['help']} {shown}[{setting.metadata['mark']}]"
        group.add_argument(flag(setting.name), help=text.replace("%", "%%"), **how)
    return p


def resolve(config: Config) -> Config:
    """Fills in what depends on machine and method, and refuses what would waste hours."""
    for name in POSITIVE:
        require(getattr(config, name) > 0, f"{flag(name)} {getattr(config, name)}: not above 0")
    require(config.batch >= WORLD, f"--batch {config.batch}: fewer questions than ranks")
    require(config.fraction <= 1, f"--fraction {config.fraction}: above 1")
    require(config.micro_batch >= 0, f"--micro-batch {config.micro_batch}: below 0")
    require(not config.prompt or Path(config.prompt).is_file(), f"{config.prompt}: no such file")
    cuda = torch.cuda.is_available()
    require(cuda or config.device != "cuda", "--device cuda: there is none here; cpu works")
    config.device = config.device or ("cuda" if cuda else "cpu")
    if config.device == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        require(local < count, f"torchrun: {count} GPUs here; start no more ranks than that")
        torch.cuda.set_device(local)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        config.precision = config.precision or ("bfloat16" if bf16 else "float16")
    config.precision = config.precision or "float32"
    large = "t5-base" if config.device == "cuda" else "t5-small"
    config.model = config.model or ("demo" if config.task == "demo" else large)
    require(config.iterations >= 0 and config.steps > 0, "--iterations, --steps: must be above 0")
    if config.method == "dss":  # L_pred, and ℓ of slot 0's rationale
        config.vote = "first"
        config.scheme = "mean"  # of one
    if config.method != "qcrd":
        config.negative_source = "none"
    config.discriminator &= config.method == "qcrd"
    return config


def start(given: dict[str, Any], show_prompt: bool) -> None:
    """A new run: the flags over the defaults of their task and student. Raises InputError."""
    task = given.get("task", Config.task)
    model = given.get("model", "demo" if task == "demo" else "")
    defaults = OTHER_DEFAULTS.get(task, {}) | (DEMO_STUDENT if model == "demo" else {})
    if "steps" in given:
        defaults.pop("iterations", None)
    if task not in fetch_data.TASKS:
        given["task"] = str(Path(task).resolve())  # --ask works from other folders too
    config = resolve(Config(**defaults | given))
    if show_prompt:
        task = fetch_data.load_task(config.task, config.answer)
        for message in prompts_of(task, task.train[:1], config)[0]:
            print(f"[{message['role']}]\n{message['content']}")
        asked = f"{len(task.train)} questions and {min(JUDGED, len(task.valid))} of validation"
        return say(f"{asked}, {config.samples} samples of {config.teacher_tokens} tokens at most")
    name = f"runs/{Path(config.task).name}-{config.method}-{config.seed}"
    names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2)))
    folder = Path(config.run or next(name for name in names if not Path(name).exists()))
    require(not folder.exists(), f"--run {folder}: exists; name another, or --resume {folder}")
    train(config, gather([folder])[0], resumed=False)


def reopen(named: list[str], given: dict[str, Any], as_json: bool) -> None:
    """--resume, --ask, --audit or --eval, under the run's own settings. Raises InputError."""
    require(len(named) == 1, f"--{' and --'.join(named)}: one at a time")
    folder, *rest = given.pop(named[0])
    others = " ".join(flag(other) for other in given if other not in FREE_ON_RESUME)
    free = " ".join(map(flag, FREE_ON_RESUME))
    require(not others, f"--{named[0]} keeps the run's settings: {free} may change, not {others}")
    folder = Path(folder)
    try:
        saved = json.loads((folder / "config.json").read_text("utf-8"))
        config = resolve(Config(**saved | given))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder}: no run, which is a folder like runs/demo-qcrd-0") from None
    if named[0] == "audit":
        require(rest[0].isdecimal(), f"--audit RUN N: N is {rest[0]!r}, not a number")
        audit(folder, config, int(rest[0]), as_json)
    elif named[0] == "ask":
        require(rest, "--ask RUN QUESTION: the question is missing")
        use(folder, config, rest, "")
    elif named[0] == "eval":
        require(len(rest) < 2, "--eval RUN FILE: one file at a time")
        use(folder, config, [], "".join(rest))
    elif (folder / "result.json").exists():
        print_result(folder, json.loads((folder / "result.json").read_text("utf-8")))
    else:
        train(config, folder, resumed=True)


def main() -> int:
    """-> exit code: 0; 2 after one line for a user's mistake; 130 when stopped."""
    given = vars(parser().parse_args())
    as_json, show_prompt = given.pop("json", False), given.pop("show_prompt", False)
    named = [name for name in ("resume", "ask", "audit", "eval") if name in given]
    try:
        require("audit" in named or not as_json, "--json: only with --audit RUN N")
        if WORLD > 1:  # rank 0 may ask a teacher for hours
            dist.init_process_group(timeout=datetime.timedelta(hours=12))
        if named:
            reopen(named, given, as_json)
        else:
            start(given, show_prompt)
        if WORLD > 1:
            dist.destroy_process_group()
        return 0
    except (InputError, torch.OutOfMemoryError) as error:
        memory = "out of GPU memory; a smaller --micro-batch needs less"
        print("error:", error if isinstance(error, InputError) else memory, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
