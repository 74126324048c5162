# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "sentencepiece==0.2.3", "numpy==2.4.6", "requests==2.34.2"]
# ///
"""QCRD, Quality-guided Contrastive Rationale Distillation (Wang et al., EMNLP
2025), in one file.

A large language model, the teacher, answers each question several times and
explains its answers. A small T5, the student, learns to answer (`predict: x`)
and to explain (`explain: x`). The first half is the method, in the paper's
order; the second half is what a run needs (the first borrows a few of its
functions).

    1 settings         every flag, its default, range and source
    2 vote             the majority's rationales are S_pos, the minority's S_neg
    3 student          questions as token ids; losses; what it writes; a run
    4 negatives        what an earlier student writes joins S_neg
    5 discriminator    s(x, r) and its loss L_D                  eq. (1), (2)
    6 loss             picks, margin, weights, the sum           eq. (3) to (8)
    7 one iteration    all of it, on one screen
    8 teacher client   K samples a question over HTTP, each kept on disk
    9 run              data, folder, checkpoint, several GPUs
   10 evaluation       accuracies, --ask, --eval, --audit
   11 command line

The paper's own text was not at hand: its equations, settings and tables are
taken from a published review that reproduces them (named in README). Marks say
where a choice comes from: [eq. n], [figure], [table] the paper's, as reproduced
there; [review] told by that review; [abstract]; [overview] a published
overview's open questions; [DSS] Distilling Step-by-Step (Hsieh et al., 2023)
where the paper's own value is not known; [ours] where nothing known says it.
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
import sys
import threading
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fetch_data
import t5
from fetch_data import Example, Sample, Task
from t5 import T5, InputError, Tokenizer, pad, require, to_device, track

# ================================ THE METHOD ================================
# ---------------------------------------------------------------------------------- 1. Settings


def option(default: Any, mark: str, help: str, allowed: str = "") -> Any:
    """A flag. mark: the default's source; allowed: an interval, (0, 1], or words, gold|teacher."""
    return field(default=default, metadata={"mark": mark, "help": help, "allowed": allowed})


COUNT, NUMBER, WEIGHT = "[1, 100000]", "[0, 1e9]", "[0, 1000]"
SOURCES = "snapshot|fixed|static|sc|none"
SCHEMES = "minmax|maxmin|sampling|mean|wmean|minmin"
PRECISIONS = "|float32|bfloat16|float16"


@dataclass
class Config:
    """Every setting; the command line is made from it."""

    # Task
    task: str = option("demo", "ours", "demo, svamp, cqa, anli1, esnli, or a folder of JSONL files")
    answer: str = option("text", "ours", "a folder's labels; numbers by value", "text|number")
    labels: str = option("gold", "table", "the data's, or the vote's answers", "gold|teacher")
    fraction: float = option(1.0, "table", "part of the training data, from the first", "(0, 1]")
    # Teacher and vote
    teacher: str = option("", "ours", "URL of a server with OpenAI's API, or palm (see below)")
    teacher_model: str = option("", "review", "gpt-3.5-turbo at OpenAI; ours: else the first")
    samples: int = option(5, "review", "K, samples a question", "[1, 128]")
    teacher_temperature: float = option(0.7, "review", "the teacher's temperature", "[0, 5]")
    teacher_tokens: int = option(512, "ours", "longest sample, in its tokens", "[1, 1e6]")
    teacher_budget: int = option(0, "ours", "at most this many requests (0: any)", NUMBER)
    teacher_timeout: float = option(180.0, "ours", "longest silence, in seconds", "(0, 86400]")
    teacher_fields: str = option("", "ours", "JSON merged into each request; null removes a field")
    concurrency: int = option(8, "ours", "requests under way at once", "[1, 256]")
    prompt: str = option("", "ours", "a file with a system message of yours")
    vote: str = option("majority", "review", "who is in S_pos", "majority|first|all")
    # Student
    method: str = option("qcrd", "table", "what is trained", "qcrd|dss|single|finetune")
    model: str = option("", "ours", "demo, t5-small (CPU), t5-base (GPU), or a Hugging Face T5")
    input_tokens: int = option(512, "ours", "longest input", "[8, 10000]")
    rationale_tokens: int = option(256, "DSS", "longest rationale", "[2, 10000]")
    label_tokens: int = option(64, "ours", "longest label", "[3, 10000]")
    # Negatives
    negative_source: str = option("snapshot", "table", "who writes them; see below", SOURCES)
    negative_model: str = option("", "ours", "folder of the fixed student (default: --model)")
    lag: int = option(5, "review", "j: iteration t samples from the student after t - j", COUNT)
    student_temperature: float = option(1.5, "review", "the student's temperature", "(0, 100]")
    student_temperature_end: float = option(0.0, "overview", "its last (0: the same)", "[0, 100]")
    student_samples: int = option(1, "review", "the student's samples a question", "[1, 100]")
    # Discriminator
    discriminator: bool = option(True, "review", "weights s and 1 - s (without: 1)")
    discriminator_model: str = option("", "review, ours", "its encoder; see below")
    discriminator_loss: str = option("eq2", "eq. 2", "L_D; ce: the figure's CE", "eq2|ce")
    discriminator_pretrain: int = option(500, "review", "pretraining steps, at most there", NUMBER)
    discriminator_every: int = option(1, "ours", "n: updates at t = 1 + n, ...; 0: never", NUMBER)
    discriminator_steps: int = option(20, "ours", "steps of an update", COUNT)
    discriminator_questions: int = option(8, "ours", "questions a step of it", "[1, 4096]")
    discriminator_lr: float = option(1e-4, "ours", "its learning rate", "(0, 1]")
    discriminator_noise: float = option(0.0, "overview", "part with swapped sets", "[0, 1]")
    # Loss
    scheme: str = option("minmax", "eq. 4, 5", "which of S_pos and S_neg count", SCHEMES)
    delta: float = option(3.0, "review", "δ: a negative with this loss adds nothing", WEIGHT)
    beta: float = option(0.2, "review", "β: weight of the negative term", WEIGHT)
    alpha_pred: float = option(0.5, "review", "α1: weight of L_pred", WEIGHT)
    alpha_cl: float = option(0.5, "review", "α2: weight of L_cl", WEIGHT)
    alpha_d: float = option(0.5, "review", "α3 in iteration 1: weight of L_D", WEIGHT)
    alpha_d_decay: float = option(0.9, "review", "α3 is multiplied by it each iteration", "[0, 1]")
    # Training
    steps: int = option(10_000, "DSS", "optimizer steps in all", "[0, 1e8]")
    iterations: int = option(20, "ours", "equal parts that the steps are divided into", COUNT)
    batch: int = option(64, "DSS", "questions an optimizer step", COUNT)
    micro_batch: int = option(0, "ours", "questions at once (0: 16, on a large GPU all)", NUMBER)
    lr: float = option(5e-5, "DSS", "AdamW's learning rate, falling linearly to 0", "(0, 1]")
    seed: int = option(0, "ours", "of the student's and D's randomness; never of data", NUMBER)
    precision: str = option("", "ours", "default: float32; on CUDA bf16, else fp16", PRECISIONS)
    device: str = option("", "ours", "default: cuda where there is one", "|cpu|cuda")
    run: str = option("", "ours", "the run's folder (default: runs/<task>-<method>-<seed>)")
    stage: str = option("all", "ours", "teacher: only ask the teacher", "all|teacher")


# Set instead by the demo and its student of 1M parameters [ours], and by a method [DSS, ours].
DEMO = {"steps": 200, "iterations": 10, "batch": 32, "rationale_tokens": 56}
DEMO_STUDENT = {"lr": 1e-3, "discriminator_lr": 3e-4, "discriminator_pretrain": 100}
METHODS: dict[str, dict[str, Any]] = {
    "qcrd": {},
    "dss": {"vote": "first", "scheme": "mean", "negative_source": "none"},  # mean: of one
    "single": {"vote": "first", "negative_source": "none"},
    "finetune": {"negative_source": "none"},
}
NOT_A_NUMBER = "a loss became infinite or NaN; check --lr, --discriminator-lr and --precision"
JUDGED = 100  # validation questions that the rationales and D are watched on [ours]
RANK, WORLD = 0, 1  # torchrun's, where it started this process
with contextlib.suppress(ValueError, KeyError):  # all are there; some clusters leave RANK around
    rank, world, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank < world and "MASTER_ADDR" in os.environ:
        RANK, WORLD = rank, world


def flag(name: str) -> str:
    """A field of Config as the command line spells it."""
    return "--" + name.replace("_", "-")


def check(config: Config, where: str = "") -> None:
    """Refuses values of a wrong type, NaN, infinities, and what is not allowed. InputError."""
    for setting in dataclasses.fields(Config):
        value, allowed = getattr(config, setting.name), setting.metadata["allowed"]
        shown = f"{where}{flag(setting.name)} {str(value)[:80]}"
        kind = type(setting.default)
        good = type(value) is kind or (kind is float and type(value) is int)
        require(good, f"{shown}: not of type {kind.__name__}")
        if "|" in allowed:
            require(value in allowed.split("|"), f"{shown}: not one of {allowed.strip('|')}")
        elif allowed:
            low, high = map(float, allowed[1:-1].split(","))
            above = low <= value if allowed[0] == "[" else low < value
            require(above and value <= high, f"{shown}: not in {allowed}")
        setattr(config, setting.name, kind(value))  # 1 of a float is 1.0


def derive_seed(*purpose: object) -> int:
    """A 63-bit seed from what it is for: no draw depends on how many others came before it."""
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "little") >> 1


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def say(text: str) -> None:
    if RANK == 0:
        print(t5.safe(text), flush=True)


# -------------------------------------------------------------------------------------- 2. Vote

Slot = tuple[str, str] | None  # a sample's text and finish_reason; None: there is none


def majority(answers: list[str | None]) -> tuple[str | None, list[int], list[int]]:
    """Self-consistency -> â, the slots of S_pos (a_k = â) [abstract], of S_neg (a_k ≠ â) [review].
    answers: each slot's a_k; None, one that cannot be read, is in neither set. A tie goes to the
    answer of the lowest slot [ours]."""
    counts = collections.Counter(a for a in answers if a is not None)
    best = max(counts, key=counts.__getitem__, default=None)  # the first of equals, in slot order
    positives = [slot for slot, a in enumerate(answers) if a is not None and a == best]
    negatives = [slot for slot, a in enumerate(answers) if a is not None and a != best]
    return best, positives, negatives


@dataclass
class Vote:
    """A question's samples after the vote."""

    slots: list[Slot]
    samples: list[Sample]  # rationale and answer of each slot
    answers: list[str | None]  # in the form that they are compared in
    best: str | None  # â
    positives: list[int]  # slots
    negatives: list[int]

    def rationales(self, slots: Iterable[int]) -> list[str]:
        """Those of some slots; empty ones and repetitions are dropped [ours]."""
        return [r for r in dict.fromkeys(self.samples[slot].rationale for slot in slots) if r]


def vote_on(task: Task, question: str, slots: list[Slot]) -> Vote:
    """Reads a question's samples and lets them vote."""
    texts = [slot or ("", "") for slot in slots]
    samples = [fetch_data.read_sample(task, question, t, cut=end == "length") for t, end in texts]
    answers = [fetch_data.answer_key(task.kind, sample.answer) for sample in samples]
    return Vote(slots, samples, answers, *majority(answers))


def sets_of(vote: Vote, rule: str) -> tuple[list[str], list[str], str | None]:
    """-> the rationales of S_pos and of S_neg, and the teacher's answer as the lowest slot that
    gave it wrote it. rule: majority; first: slot 0's rationale, right, wrong or unreadable [DSS];
    all: every slot's is a positive [ours]."""
    slots = range(len(vote.samples))
    members = {"majority": vote.positives, "first": slots[:1], "all": slots}[rule]
    others = vote.negatives if rule == "majority" else []
    speakers = slots[:1] if rule == "first" else vote.positives
    answer = vote.samples[speakers[0]].answer if speakers else None
    return vote.rationales(members), vote.rationales(others), answer


# ------------------------------------------------------- 3. Student, and what a run keeps of it


@dataclass(slots=True, eq=False)
class Question:
    """A question with its sets of rationales as token ids; half a million of them must fit."""

    example: Example  # as text
    place: str  # "train 17": what its random numbers are seeded by
    x: array  # without a prefix, </s> at the end
    target: array  # what L_pred trains: the label; under --method single rationale and label
    S_pos: list[array] = field(default_factory=list)
    minority: list[array] = field(default_factory=list)  # the vote's part of S_neg
    from_past: list[array] = field(default_factory=list)  # the student's part, this iteration

    @property
    def S_neg(self) -> list[array]:
        return self.minority + self.from_past


def is_large(device: str) -> bool:
    """Whether it is a GPU of more than 24 GB."""
    return device == "cuda" and torch.cuda.get_device_properties(device).total_memory > 26e9


class Student:
    """A T5 with its tokenizer, limits, device and precision: it reads, writes, and has losses."""

    def __init__(self, folder: Path, config: Config):
        self.config = config
        self.device = torch.device(config.device)
        self.vocab = folder / "spiece.model"
        self.tokenizer = Tokenizer(self.vocab)
        self.model = self.load(folder)
        # the prefixes of the two tasks [DSS; the review: <Predict>, <Explain>]; one target: none
        self.predict_prefix = self.tokenizer.encode("predict:")[:-1]
        self.explain_prefix = self.tokenizer.encode("explain:")[:-1]
        if config.method == "single":
            self.predict_prefix = []
        self.dtype = getattr(torch, config.precision)

    def load(self, folder: Path) -> T5:
        """The student's, D's or a past one's T5, all of one vocabulary. Raises InputError."""
        model = T5.load(folder)
        pieces, rows = self.tokenizer.size, model.config.vocab_size
        require(pieces <= rows, f"{self.vocab}: {pieces} pieces, but {folder} embeds {rows}")
        same = (folder / self.vocab.name).read_bytes() == self.vocab.read_bytes()
        require(same, f"{folder}: its {self.vocab.name} is not that of {self.vocab.parent}")
        return model.to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def rows_at_once(self) -> int:
        """How many rows are written, or scored by D, together; fewer under --micro-batch."""
        rows = 128
        if self.device.type == "cuda":  # a step costs its kernel launches, whatever the batch
            rows = 512 if is_large(self.config.device) else 256
        return min(rows, 8 * self.config.micro_batch or rows)

    def ids(self, text: str, limit: int = sys.maxsize) -> array:
        return array("i", self.tokenizer.encode(text, limit))

    def question(self, example: Example, place: str = "", S_pos=(), minority=()) -> Question:
        """A question and its rationales as token ids."""
        config = self.config
        x = self.ids(example.input, config.input_tokens)
        target = self.ids(example.label, config.label_tokens)
        if config.method == "single":  # rationale, "answer:", label [DSS, from memory; form: ours]
            longest = config.rationale_tokens + config.label_tokens
            label = self.ids(f"answer: {example.label}", longest)
            rationale = self.ids(S_pos[0] if S_pos else "")[:-1]
            target = rationale[: longest - len(label)] + label
        positives = self.distinct(S_pos)
        negatives = self.distinct(minority, positives)
        return Question(example, place, x, target, positives, negatives)

    def distinct(self, rationales: Iterable[str], others: Iterable[array] = ()) -> list[array]:
        """Rationales as token ids, cut; those that are then like another one are dropped [ours]."""
        found: list[array] = []
        for r in rationales:
            r = self.ids(r, self.config.rationale_tokens)
            if r not in found and r not in others:
                found.append(r)
        return found

    def inputs(self, prefix: list[int], questions: list[Question]) -> tuple[Tensor, Tensor]:
        """Prefix and x, cut to --input-tokens with </s> kept -> ids (B, S), mask (B, S)."""
        limit = self.config.input_tokens - 1
        return pad([(prefix + q.x.tolist()[:-1])[:limit] + [t5.EOS] for q in questions])

    def losses(self, prefix: list[int], questions: list, targets: list, rows: list) -> Tensor:
        """ℓ, the mean token cross-entropy [mean: ours] of each target given its question, (R,).
        rows: each target's place in `questions`. One encoding serves all targets of a question."""
        if not targets:
            return torch.empty(0, device=self.device)
        ids, mask = self.inputs(prefix, questions)
        target, target_mask = pad(targets)
        with self.autocast():
            memory = self.model.encode(ids, mask)
            return self.model.loss(None, mask, target, target_mask, memory, torch.tensor(rows))

    def write(self, prefix: list[int], questions: list, longest: int, tau=0.0, seeds=()) -> list:
        """What the student writes for each question: ids, </s> only where it was written. The ranks
        share the batches out. seeds: of each row's random numbers where τ > 0, so that a text does
        not depend on how questions are batched."""
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].x))
        size = self.rows_at_once()
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        written = []
        for batch in track("  writing", batches[RANK::WORLD]):
            x = self.inputs(prefix, [questions[i] for i in batch])
            uniforms = None
            if tau:
                draws = [torch.Generator().manual_seed(seeds[i]) for i in batch]
                uniforms = torch.stack([torch.rand(longest, generator=draw) for draw in draws])
            with self.autocast():
                rows = self.model.generate(
                    *x, longest, tau, limit=self.tokenizer.size, uniforms=uniforms
                )
            for i, row in zip(batch, rows.tolist()):
                end = row.index(t5.EOS) + 1 if t5.EOS in row else len(row)
                written.append((i, array("i", row[:end])))
        return [row for _, row in sorted(gather(written))]


class Run:
    """A run in progress: what an iteration reads and changes."""

    def __init__(self, config: Config, student: Student, D: "Discriminator | None", folder: Path):
        self.config = config
        self.student = student
        self.discriminator = D
        self.folder = folder
        self.task: Task | None = None
        self.teacher: Teacher | None = None
        self.train: list[Question] = []
        self.valid: list[Question] = []
        self.digest = ""  # of the data: a run goes on with what it began with
        self.lines: list[dict] = []  # metrics.jsonl: row zero, then one a completed iteration
        self.step = 0  # optimizer steps done
        self.L_D = 0.0  # of D's last training; 0 where that did nothing
        self.sums: dict[str, list] = {}  # this iteration's statistics
        adamw = {"lr": 0.0, "weight_decay": 0.0, "fused": True}  # no weight decay [DSS]
        self.optimizer = torch.optim.AdamW(student.model.parameters(), **adamw)
        fp16 = student.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=fp16)
        if D is not None:
            self.d_optimizer = torch.optim.AdamW(D.parameters(), **adamw)
            self.d_scaler = torch.amp.GradScaler(student.device.type, enabled=fp16)

    @property
    def iteration(self) -> int:
        """Completed iterations."""
        return max(0, len(self.lines) - 1)


# --------------------------------------------------------------------------------- 4. Negatives


def past_student(run: Run, t: int) -> Student | None:
    """Who writes negatives for iteration t: the student after t - j iterations, nobody while t ≤ j
    [review: of j before; so counted: ours]; fixed [table; in the review's text one trained with
    DSS], static [overview]: as it started, or --negative-model; sc, none: nobody."""
    config = run.config
    past = copy.copy(run.student)
    if config.negative_source in ("fixed", "static"):
        past.model = past.load(student_folder(config.negative_model or config.model))
    elif config.negative_source == "snapshot" and t > config.lag:
        past.model = copy.deepcopy(past.model)
        load_weights(run, t - config.lag, past.model)
    else:
        return None
    return past


def temperature_of(config: Config, t: int) -> float:
    """τ of the student in iteration t: 1.5 [review], or on a line to another [overview]."""
    start = config.student_temperature
    end = config.student_temperature_end or start
    progress = min(1, (t - 1) / max(1, config.iterations - 1))
    return start + progress * (end - start)


def add_past_negatives(run: Run, t: int, questions: list[Question]) -> None:
    """Before iteration t an earlier student writes a rationale for each question at τ = 1.5; it
    joins the question's S_neg [review]. Empty ones and ones equal to a positive do not [ours]."""
    config = run.config
    for q in run.train + run.valid:
        q.from_past = []
    past = past_student(run, t)
    if past is None:
        return
    if run.discriminator is not None:
        questions = questions + run.valid[:JUDGED]  # D is watched on these
    like = 1 if config.negative_source == "static" else t  # static: as in iteration 1, each time
    tau = temperature_of(config, like)
    draws = list(itertools.product(questions, range(config.student_samples)))
    seeds = [derive_seed(config.seed, "negatives", like, q.place, k) for q, k in draws]
    asked = [q for q, _ in draws]
    written = past.write(past.explain_prefix, asked, config.rationale_tokens, tau, seeds)
    for q, r in zip(asked, written):
        empty = not set(r) - {t5.PAD, t5.EOS}
        if not empty and r not in q.S_pos and r not in q.from_past:
            q.from_past.append(r)


# ----------------------------------------------------------------------------- 5. Discriminator


class Discriminator(nn.Module):
    """D: a T5 encoder, max-pooling and two linear layers [review]; hidden width, ReLU: ours."""

    def __init__(self, student: Student, encoder: T5):
        super().__init__()
        self.student = student  # its precision, device and limits
        self.encoder = encoder
        width = encoder.config.d_model
        torch.manual_seed(derive_seed(student.config.seed, "head"))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.to(student.device)

    def forward(self, pairs: list[tuple[array, array]]) -> Tensor:
        """The logits of pairs (x, r), (R,) float32. The encoder reads x without a prefix, whose
        </s> is the border, then r [ours]."""
        ids, mask = pad([x + r for x, r in pairs])
        padding = to_device(~mask[..., None], self.student.device)
        with self.student.autocast():
            memory = self.encoder.encode(ids, mask)
            logits = self.head(memory.masked_fill(padding, -torch.inf).amax(1))
        return logits.squeeze(-1).float()

    @torch.no_grad()
    def score(self, pairs: list[tuple[array, array]]) -> Tensor:
        """s(x, r) = D(x, r) in [0, 1] [eq. 1; sigmoid and eval mode: ours], (R,)."""
        self.eval()
        size = self.student.rows_at_once()
        longest = max([320] + [len(x) + len(r) for x, r in pairs])  # tokens
        size = max(1, size * 320**2 // longest**2)  # a row's memory grows as its square
        parts = [self(pairs[i : i + size]).sigmoid() for i in range(0, len(pairs), size)]
        return torch.cat(parts) if parts else torch.empty(0, device=self.student.device)


def L_D_eq2(s_pos: list[Tensor], s_neg: list[Tensor]) -> Tensor:
    """L_D = E_x[ -log( Σ exp(s_pos) / Σ exp(s_neg) ) ] [eq. 2]: a question's m positives over its k
    negatives alone. A tensor of scores a question in each list. It stays the same when all scores
    rise alike: their level, which weighs in eq. (6), is open."""
    terms = [neg.exp().sum().log() - pos.exp().sum().log() for pos, neg in zip(s_pos, s_neg)]
    return torch.stack(terms).mean()


def L_D_ce(logits_pos: list[Tensor], logits_neg: list[Tensor]) -> Tensor:
    """The "CE" that the overview figure draws between s and L_D [figure]: a question's mean binary
    cross-entropy over S_pos plus that over S_neg [its form: ours]. It fixes the level of s."""
    pairs = zip(logits_pos, logits_neg)
    terms = [F.softplus(-pos).mean() + F.softplus(neg).mean() for pos, neg in pairs]
    return torch.stack(terms).mean()


def L_D_of(logits_pos: list[Tensor], logits_neg: list[Tensor], config: Config) -> Tensor:
    """L_D as --discriminator-loss names it: eq. (2) of s, the CE of the logits [ours]."""
    if config.discriminator_loss == "ce":
        return L_D_ce(logits_pos, logits_neg)
    return L_D_eq2([x.sigmoid() for x in logits_pos], [x.sigmoid() for x in logits_neg])


def corrupt(words: list[str], others: list[str], rng: np.random.Generator) -> str:
    """A negative made of a positive: 30 % of its words, one at least, go or become some of `others`
    [review: masking and replacement; 30 %, and no mask symbol to give it away: ours]."""
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


def balanced_sets(student: Student, q: Question, others: list[str], rng) -> tuple[list, list]:
    """S_pos and S_neg as L_D sees them: S_neg is filled up to the size of S_pos with corrupted
    positives [review, of pretraining; in updates, and up to that size: ours]."""
    config = student.config
    S_neg = q.S_neg  # a new list: fillers are not kept
    while len(S_neg) < len(q.S_pos):
        words = student.tokenizer.decode(q.S_pos[rng.integers(len(q.S_pos))]).split() or ["the"]
        S_neg.append(student.ids(corrupt(words, others, rng), config.rationale_tokens))
    swapped = rng.random() < config.discriminator_noise  # label noise [overview]
    return (S_neg, q.S_pos) if swapped else (q.S_pos, S_neg)


def updates_discriminator(config: Config, t: int) -> bool:
    """Whether D is trained before iteration t, at regular intervals [review]: 1 + n, 1 + 2n, …
    [ours]."""
    n = config.discriminator_every
    return n > 0 and t > 1 and (t - 1) % n == 0


def alphas_of(config: Config, t: int) -> tuple[float, float, float]:
    """α1, α2, α3 of iteration t: 0.5 each, α3 times 0.9 after each iteration [review]."""
    if config.method in ("finetune", "single"):  # one target: L_pred alone
        return 1.0, 0.0, 0.0
    alpha_d = config.alpha_d * config.alpha_d_decay ** (t - 1) if config.discriminator else 0.0
    return config.alpha_pred, config.alpha_cl, alpha_d


def descend(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float) -> None:
    """A step, the gradient's norm clipped at 1 [DSS]. The scaler acts under fp16 alone."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    scaler.step(optimizer)  # none where fp16's gradients overflowed
    scaler.update()


def train_discriminator(run: Run, t: int, questions: list[Question]) -> None:
    """Pretraining (t = 0) or the update before iteration t: D descends α3 · L_D [eq. 8], alike on
    every rank, with an AdamW of its own [ours], whose steps stay the same when the loss is
    multiplied by a constant: α3, which falls slowly, hardly acts. Its rate falls with the student's
    to 0; in pretraining, before its first step, it is constant [ours]."""
    config, student, D = run.config, run.student, run.discriminator
    steps = config.discriminator_steps if t else config.discriminator_pretrain
    alpha_d = alphas_of(config, t)[2] if t else config.alpha_d or 1  # 0 stops the updates alone
    rate = config.discriminator_lr * (1 - run.step / config.steps)
    questions = [q for q in questions if q.S_pos]  # drawn with replacement [ours]
    run.L_D = 0.0
    if not questions or not alpha_d:
        return
    rng = np.random.default_rng(derive_seed(config.seed, "discriminator", t))
    torch.manual_seed(derive_seed(config.seed, "discriminator's dropout", t))
    D.train()
    total = torch.zeros((), device=student.device)
    for _ in track("  discriminator", range(steps)):
        places = rng.integers(len(questions), size=config.discriminator_questions)
        drawn = [questions[i] for i in places]
        others = " ".join(student.tokenizer.decode(r) for q in drawn for r in q.S_pos).split()
        sets = [balanced_sets(student, q, others or ["the"], rng) for q in drawn]
        pairs = [(q.x, r) for q, (S_pos, S_neg) in zip(drawn, sets) for r in S_pos + S_neg]
        sizes = [len(members) for both in sets for members in both]
        logits = D(pairs).split(sizes)  # S_pos, S_neg of each question in turn
        L_D = L_D_of(logits[0::2], logits[1::2], config)
        run.d_optimizer.zero_grad(set_to_none=True)
        run.d_scaler.scale(alpha_d * L_D).backward()
        descend(run.d_optimizer, run.d_scaler, rate)
        total += L_D.detach()
    if WORLD > 1:  # on CUDA the last digits of the ranks' steps may part
        for parameter in D.parameters():
            dist.broadcast(parameter.data, 0)
    run.L_D = total.item() / max(1, steps)
    require(math.isfinite(run.L_D), NOT_A_NUMBER)


# -------------------------------------------------------------------------------------- 6. Loss


@dataclass(eq=False)
class Candidate:
    """A rationale of a question's S_pos or S_neg."""

    row: int  # its question's index in the micro-batch
    r: array
    positive: bool
    source: str  # "teacher" or "student"
    loss: float = math.nan  # ℓ(f(x), r) in eval mode


def candidates_of(questions: list[Question], config: Config) -> list[Candidate]:
    """Each question's S_pos, then its S_neg as the loss sees it; none where it has no L_cl."""
    found: list[Candidate] = []
    if not alphas_of(config, 1)[1]:  # α2, in every iteration
        return found
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
    losses = student.losses(student.explain_prefix, questions, targets, rows).tolist()
    for c, loss in zip(candidates, losses):
        require(math.isfinite(loss), NOT_A_NUMBER)
        c.loss = loss


def by_set(candidates: list[Candidate]) -> list[tuple[tuple[int, bool], list[Candidate]]]:
    """((row, positive), members) of each question's sets, whose members are neighbours."""
    groups = itertools.groupby(candidates, lambda c: (c.row, c.positive))
    return [(key, list(members)) for key, members in groups]


def pick(candidates: list[Candidate], questions: list[Question], config: Config, step: int) -> list:
    """The candidates that count in the loss. minmax: r⁺ = argmin over S_pos of ℓ [eq. 4], r⁻ =
    argmax over S_neg of ℓ [eq. 5], whose order the margin keeps; the first on a tie [ours]. maxmin
    and minmin likewise; sampling: one at random; mean, wmean: all [table: the names, but minmin's;
    what they mean: ours]."""
    extremes = {"minmax": (min, max), "maxmin": (max, min), "minmin": (min, min)}  # S_pos, S_neg
    picks = []
    for (row, positive), members in by_set(candidates):
        if config.scheme in ("mean", "wmean"):
            picks += members
        elif config.scheme == "sampling":
            seed = derive_seed(config.seed, "pick", step, questions[row].place, positive)
            picks.append(random.Random(seed).choice(members))
        else:
            extreme = extremes[config.scheme][0 if positive else 1]
            picks.append(extreme(members, key=lambda c: c.loss))
    return picks


def score_picks(D: Discriminator | None, questions: list[Question], picks: list) -> Tensor | None:
    """s(x, r) of the picks [eq. 1]; None without a discriminator."""
    return D.score([(questions[c.row].x, c.r) for c in picks]) if D is not None else None


def label_losses(student: Student, questions: list[Question]) -> Tensor:
    """Cross-entropy of each question's target with gradient, (B,)."""
    targets, rows = [q.target for q in questions], list(range(len(questions)))
    return student.losses(student.predict_prefix, questions, targets, rows)


def rationale_losses(student: Student, questions: list[Question], picks: list) -> Tensor:
    """ℓ of the picks, (P,), with gradient; a negative that `measure` found beyond δ keeps that ℓ,
    since its term is 0."""
    losses = to_device(torch.tensor([c.loss for c in picks]), student.device)
    again = [i for i, c in enumerate(picks) if c.positive or c.loss < student.config.delta]
    targets, rows = [picks[i].r for i in again], [picks[i].row for i in again]
    with_gradient = student.losses(student.explain_prefix, questions, targets, rows)
    index = to_device(torch.tensor(again, dtype=torch.long), student.device)
    return losses.index_put((index,), with_gradient)


def positive_mask(picks: list[Candidate], device: torch.device | str) -> Tensor:
    """(P,) bool: which of them are positives."""
    return to_device(torch.tensor([c.positive for c in picks], dtype=torch.bool), device)


def weights_of(picks: list[Candidate], s: Tensor | None, device: torch.device | str) -> Tensor:
    """What weighs a pick, (P,): s(x, r⁺) of a positive [eq. 6], 1 - s(x, r⁻) of a negative [eq. 7],
    without gradient [ours]; 1 without a discriminator."""
    if s is None:
        return torch.ones(len(picks), device=device)
    return torch.where(positive_mask(picks, device), s, 1 - s)


def shares_of(picks: list[Candidate], weight: Tensor, scheme: str) -> Tensor:
    """The factor that makes one term of a set's weighted terms, (P,): 1 for a single pick, 1/count
    under mean, 1/Σ weight under wmean, 0 where Σ weight = 0 [ours]."""
    amount = weight if scheme == "wmean" else torch.ones_like(weight)
    sizes = [len(members) for _, members in by_set(picks)]
    total = torch.cat([weight[:0], *(part.sum().expand_as(part) for part in amount.split(sizes))])
    return torch.where(total > 0, 1 / total, 0.0)


def contrastive(losses: Tensor, s: Tensor | None, picks: list[Candidate], config: Config) -> Tensor:
    """What each pick adds to its question's part of L_cl [eq. 3], (P,)."""
    weight = weights_of(picks, s, losses.device)
    l_pos = weight * losses  # s(r⁺) · ℓ(r⁺) [eq. 6]
    l_neg = weight * (losses - config.delta).clamp(max=0)  # [eq. 7], margin δ [review]
    positive = positive_mask(picks, losses.device)
    terms = torch.where(positive, l_pos, -config.beta * l_neg)
    return shares_of(picks, weight, config.scheme) * terms


def total_loss(alphas: tuple, L_pred: Any, L_cl: Any, L_D: Any) -> Any:
    """L_total = α1 · L_pred + α2 · L_cl + α3 · L_D [eq. 8], as it is shown: the student descends
    the first two terms, D the third [ours]."""
    return alphas[0] * L_pred + alphas[1] * L_cl + alphas[2] * L_D


# ----------------------------------------------------------------------------- 7. One iteration


def iterate(run: Run, t: int) -> None:
    """Iteration t of QCRD, whole: the negatives, then D, then the student [order: ours]."""
    config, student, D = run.config, run.student, run.discriminator
    α1, α2, _ = alphas_of(config, t)  # α3 is D's
    order = order_of(config, len(run.train), t)
    questions = questions_of(run, order)
    run.sums = {}

    add_past_negatives(run, t, questions)  # the student after t - j writes; S_neg grows
    if D is not None and updates_discriminator(config, t):
        train_discriminator(run, t, questions)  # D descends α3 · L_D                [eq. 1, 2, 8]

    torch.manual_seed(derive_seed(config.seed, "dropout", t, RANK))
    batches = [order[i : i + config.batch] for i in range(0, len(order), config.batch)]
    for batch in track(f"  iteration {t}/{config.iterations}", batches):
        run.optimizer.zero_grad(set_to_none=True)
        for part in micro_batches([run.train[i] for i in batch], config):
            candidates = candidates_of(part, config)  # S_pos, S_neg of each question
            if config.method == "qcrd":  # DSS has one candidate a question: nothing to choose
                measure(student, part, candidates)  # ℓ(f(x), r) in eval mode, no gradient
            picks = pick(candidates, part, config, run.step)  # r⁺ = argmin, r⁻ = argmax [eq. 4, 5]
            s = score_picks(D, part, picks)  # s(x, r)                                   [eq. 1]

            student.model.train()
            L_pred = label_losses(student, part).sum() / len(batch)
            losses = rationale_losses(student, part, picks)  # ℓ of the picks, with gradient
            L_cl = contrastive(losses, s, picks, config).sum() / len(batch)  #         [eq. 3, 6, 7]
            run.scaler.scale(α1 * L_pred + α2 * L_cl).backward()  # the student's part of [eq. 8]
            take_statistics(run, len(part) / len(batch), picks, losses, s, L_pred, L_cl)
        all_reduce_gradients(student.model)
        descend(run.optimizer, run.scaler, config.lr * (1 - run.step / config.steps))
        run.step += 1


def take_statistics(run: Run, share: float, picks: list, losses: Tensor, s, L_pred, L_cl) -> None:
    """Adds to the sums and counts whose means the iteration's line holds. share: these questions'
    of the batch. l_pos is the training pass's ℓ; l_neg and zero are of the pass that picked."""
    positive = positive_mask(picks, losses.device)
    negatives = [c.loss for c in picks if not c.positive]
    k = len(negatives)
    m = len(picks) - k
    found = {"L_pred": (L_pred.detach(), share), "L_cl": (L_cl.detach(), share)}
    found["l_pos"] = (losses.detach() * positive).sum(), m
    found["l_neg"] = sum(negatives), k
    found["zero"] = sum(loss >= run.config.delta for loss in negatives), k
    if s is not None:
        found["s_pos"] = (s * positive).sum(), m
        found["s_neg"] = (s * ~positive).sum(), k
    for name, (amount, count) in found.items():  # tensors stay on the GPU: nobody waits for it
        total, counted = run.sums.get(name, (0.0, 0.0))
        run.sums[name] = [total + amount, counted + count]


def order_of(config: Config, n: int, t: int) -> list[int]:
    """Which questions iteration t trains on, in order: a slice of an endless stream of shuffled
    passes over n, up to optimizer step ⌊t · steps / iterations⌋ [ours]."""
    start = (t - 1) * config.steps // config.iterations * config.batch
    end = t * config.steps // config.iterations * config.batch
    stream: list[int] = []
    for number in range(start // n, (end - 1) // n + 1):
        rng = np.random.default_rng(derive_seed(config.seed, "order", number))
        stream += rng.permutation(n).tolist()
    return stream[start % n : start % n + end - start]


def questions_of(run: Run, order: list[int]) -> list[Question]:
    """The questions of an iteration's order, each once, as they stand in the data."""
    return [run.train[i] for i in sorted(set(order))]


def micro_batches(batch: list[Question], config: Config) -> list[list[Question]]:
    """This rank's share of a batch in parts of like length; the gradient adds up over them."""
    own = sorted(batch[RANK::WORLD], key=lambda q: sum(map(len, q.S_pos + q.minority)))
    size = config.micro_batch or (len(batch) if is_large(config.device) else 16)
    return [own[i : i + size] for i in range(0, len(own), size)]


# ================================= THE RUN =================================
# ---------------------------------------------------------------------------- 8. Teacher client

BACKOFF = 0.5  # seconds before the first repetition; doubled for each further one, up to 30
REPETITIONS = 7  # of a request that the server is too busy for
IN_A_ROW = 5  # refusals that end the asking; 3 before the first answer
PATIENCE = 300  # seconds; a server that asks for a longer pause ends the run
QUIET = 10  # seconds without an answer after which the user reads what is waited for
TIMED_OUT, NO_ANSWER = -1, 0  # in place of a status
BUSY = (408, 409, 429, *range(500, 600))
TROUBLE = {  # status -> how often a request is repeated, what the user can do
    TIMED_OUT: (1, "--teacher-timeout SECONDS waits longer"),
    NO_ANSWER: (3, "is the server running, and at this address?"),
    200: (2, "no text in its answers; a model that thinks first needs more --teacher-tokens"),
    404: (0, "is --teacher-model right, and does --teacher end in /v1?"),
}
TROUBLE |= dict.fromkeys((401, 403), (0, "set OPENAI_API_KEY to a key that this server accepts"))
REDIRECTED = (0, "name the address that it redirects to")
TROUBLE |= dict.fromkeys(requests.models.REDIRECT_STATI, REDIRECTED)
TROUBLE |= dict.fromkeys(BUSY, (REPETITIONS, "run again later: what was answered is kept"))
PALM = """teacher: PaLM-540B's published rationales, ONE a question: not the paper's setting. Name
  --teacher http://localhost:11434/v1 (Ollama, vLLM, llama.cpp) or set OPENAI_API_KEY for that."""


class Teacher:
    """A server with OpenAI's chat-completions API, and the file that keeps its samples."""

    def __init__(self, url: str, api_key: str, config: Config):
        self.url = url.rstrip("/")
        self.api_key = api_key
        self.config = config
        self.cache = Path()
        self.lock = threading.Lock()
        self.stopped = threading.Event()  # no further request; sleepers wake up
        self.choices = config.samples  # asked for in one request; 1 where a server refuses more
        self.budget = config.teacher_budget or math.inf  # requests
        self.requests = 0
        self.filled = 0  # slots
        self.refusals: collections.Counter[str] = collections.Counter()  # the server's words
        self.tolerance = 3  # further refusals in a row that end the asking
        self.refused: set[str] = set()  # in an earlier run: questions that alone were refused
        self.progress = t5.Progress("  teacher", 0)
        self.trouble: dict[str, str] = {}  # a question's, while it waits to be asked again
        with t5.reading("--teacher-fields", """no JSON object like '{"seed": null}'"""):
            fields = json.loads(config.teacher_fields or "{}")
            json.dumps(fields, allow_nan=False)
            self.fields = dict(sorted(fields.items()))
        with t5.reading(f"--teacher {url}", "{}"):
            self.session = fetch_data.anonymous_session(url)
        if api_key:
            self.session.headers["Authorization"] = f"Bearer {api_key}"
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=config.concurrency)
        self.session.mount(self.url, adapter)

    def sample_id(self, messages: list[dict]) -> str:
        """What decides a sample beside its slot: messages, model, settings."""
        config = self.config
        settings = [config.teacher_model, config.teacher_temperature, config.teacher_tokens]
        text = json.dumps([messages, [*settings, self.fields]])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def request(self, path: str, body: dict | None = None) -> tuple[int, Any, str, float]:
        """GET, or POST a body -> status, JSON or text, the same in words, seconds to wait."""
        how = {"timeout": (10, self.config.teacher_timeout), "allow_redirects": False}
        verb = "POST" if body else "GET"
        try:
            reply = self.session.request(verb, self.url + path, json=body, **how)
        except (requests.RequestException, ValueError) as error:  # ValueError: a broken header
            if "Read timed out" in str(error):
                return TIMED_OUT, None, f"no answer in {self.config.teacher_timeout:g} s", 0
            return NO_ANSWER, None, type(error).__name__, 0
        words = answer = self.hide(reply.content.decode("utf-8-sig", "replace"))
        with contextlib.suppress(ValueError, RecursionError):
            words = answer = json.loads(answer)
        wait = reply.headers.get("Retry-After", "")
        wait = float(wait) if wait.isdecimal() else 0
        with contextlib.suppress(TypeError, KeyError):
            words = answer["error"]
            words = words["message"]
        words = words if isinstance(words, str) else json.dumps(words)
        words = fetch_data.fold(re.sub(r"<[^>]*>", " ", words[:20_000]))[:200]
        said = f"status {reply.status_code}, {words}" + (f" (wait {wait:.0f} s)" if wait else "")
        if reply.is_redirect:
            said += f" (to {self.hide(reply.headers['Location'])[:200]})"
        return reply.status_code, answer, said, wait

    def hide(self, text: str) -> str:
        """What a server said, without the key."""
        return text.replace(self.api_key, "***") if self.api_key else text

    def fill_or_stop(self, job: tuple[str, list[dict], list[int]]) -> None:
        """`fill`; whatever it raises ends the asking of all threads."""
        try:
            self.fill(job)
        except BaseException:
            self.stopped.set()
            raise

    def fill(self, job: tuple[str, list[dict], list[int]]) -> None:
        """Asks until a question's slots are full: again where the server is busy, drops the line or
        writes no text; one by one where it refuses n. Raises InputError."""
        name, messages, slots = job
        config, choices, repetition = self.config, self.choices, 0
        while slots:
            with self.lock:
                if self.stopped.is_set() or self.requests == self.budget:
                    return
                self.requests += 1
            body = {"model": config.teacher_model, "messages": messages}
            body["n"] = min(choices, len(slots))
            body["temperature"] = config.teacher_temperature
            body["max_tokens"] = config.teacher_tokens
            body["seed"] = derive_seed(name) % 2**30 + slots[0]
            body = {k: v for k, v in (body | self.fields).items() if v is not None}
            status, answer, said, wait = self.request("/chat/completions", body)
            kept = self.keep(job, slots, answer) if status == 200 else 0
            slots = slots[kept:]
            if kept:
                self.choices = choices  # one by one, where that was what helped
                repetition = 0
            elif status in (400, 422) and min(choices, len(slots)) > 1:
                choices = 1
            elif repetition < TROUBLE.get(status, (0, ""))[0] and wait <= PATIENCE:
                pause = wait or min(BACKOFF * 2**repetition, 30) * random.uniform(0.5, 1.5)
                self.trouble[name] = f"{said}, again in {pause:.0f} s"
                self.stopped.wait(pause)
                del self.trouble[name]
                repetition += 1
            else:
                return self.refuse(job, status, said, body)

    def keep(self, job: tuple, slots: list[int], answer: Any) -> int:
        """Fills the lowest slots with the choices that hold text -> how many."""
        found = [(slot, *sample) for slot, sample in zip(slots, texts_of(answer))]
        if found:
            with self.lock:
                self.write(job, found)
                self.filled += len(found)
                self.progress.update(self.filled)
                self.tolerance = IN_A_ROW
        return len(found)

    def write(self, job: tuple, samples: list[tuple[int, str, str]]) -> None:
        """Adds slot, text and finish_reason of a question's samples to the file. InputError."""
        name, messages, _ = job
        prompt = messages[-1]["content"][:200_000]  # for who reads the file
        lines = b""
        for slot, text, finish in samples:
            sample = {"key": name, "prompt": prompt, "slot": slot}
            sample |= {"text": text[:200_000], "finish": finish}
            lines += json.dumps(sample).encode() + b"\n"
        try:
            with open(self.cache, "ab+") as file:
                file.seek(max(0, file.tell() - 1))
                torn = file.read() not in (b"", b"\n")  # by a crash or a full disk
                file.write(b"\n" * torn + lines)
        except OSError as error:
            raise InputError(f"{self.cache}: {error.strerror}; the answer is lost") from None

    def refuse(self, job: tuple, status: int, said: str, body: dict) -> None:
        """Leaves a question out that alone is refused, and keeps that as its slot -1. Raises
        InputError for what would meet every question."""
        if status in (200, 400, 413, 422):
            with self.lock:
                self.refusals[said] += 1
                if job[0] in self.refused:
                    return
                self.tolerance -= 1
                if self.tolerance > 0:
                    return self.write(job, [(-1, said, "refused")])
        optional = [name for name in body if name not in ("model", "messages", "n")]
        named = [name for name in optional if re.search(rf"\b{re.escape(name)}\b", said)]
        if status in (400, 422) and named:
            said += f"""; --teacher-fields '{{"{named[0]}": null}}' leaves that field out"""
        raise self.failure(status, said)

    def failure(self, status: int, said: str) -> InputError:
        """Why this server cannot be used, and what to do where that is known: one line."""
        hint = f"; {TROUBLE[status][1]}" if status in TROUBLE else ""
        return InputError(f"teacher {self.url}: {said}{hint}")


def texts_of(answer: Any) -> list[tuple[str, str]]:
    """Text and finish_reason of each choice that holds text, wherever the API puts it."""
    found = []
    choices = answer.get("choices") if isinstance(answer, dict) else None
    for choice in choices if isinstance(choices, list) else []:
        with contextlib.suppress(TypeError, KeyError, AttributeError):  # not what the API promises
            content = choice["message"]["content"] if "message" in choice else choice["text"]
            if isinstance(content, list):  # parts
                texts = [part.get("text") for part in content if isinstance(part, dict)]
                content = "".join(text for text in texts if isinstance(text, str))
            if content.strip():
                found.append((content, str(choice.get("finish_reason"))))
    return found


def read_cache(path: Path, named_by: str = "key") -> dict[str, dict[int, Slot]]:
    """-> {key: {slot: (text, finish)}}; a line that a crash tore is passed over."""
    found: dict[str, dict[int, Slot]] = {}
    for line in open(path, "rb") if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            item = json.loads(line)
            sample = (str(item["text"]), str(item.get("finish")))
            found.setdefault(item[named_by], {}).setdefault(int(item["slot"]), sample)
    return found


def connect_teacher(config: Config) -> Teacher | None:
    """The teacher that flags or environment name (the URL palm: PaLM's published rationales), None
    where no sample is needed; config gets its address and model. Raises InputError."""
    if config.method == "finetune" and config.labels == "gold" and config.stage != "teacher":
        return None
    api_key = os.environ.get("OPENAI_API_KEY", "").strip()
    if config.task == "demo" and not config.teacher:
        api_key = ""
        url = fetch_data.demo_teacher()[0]
    else:
        default = "https://api.openai.com/v1" if api_key else "palm"
        url = config.teacher or os.environ.get("OPENAI_BASE_URL") or default
        config.teacher = url
    wanted = "must be palm or a URL like http://localhost:11434/v1; a key goes into OPENAI_API_KEY"
    require(re.fullmatch(r"palm|https?://[^@?#\s]+", url), f"--teacher: {wanted}")
    good = api_key.isascii() and api_key.isprintable()
    require(good, "OPENAI_API_KEY: holds characters that no key has")
    if "//api.openai.com" in url:
        config.teacher_model = config.teacher_model or "gpt-3.5-turbo"
    teacher = Teacher(url, api_key, config)
    if url == "palm":
        known = config.task in fetch_data.TASKS[1:]
        require(known, f"no teacher for {config.task}: name --teacher URL, or set OPENAI_API_KEY")
        say(PALM)
    elif RANK == 0 and not config.teacher_model:
        with ThreadPool(1) as pool:
            call = pool.apply_async(teacher.request, ("/models",))
            status, answer, said, _ = wait_for(call, teacher)
        with contextlib.suppress(TypeError, KeyError, IndexError):
            first = answer["data"][0]["id"]
            config.teacher_model = first if isinstance(first, str) else ""
        cause = NO_ANSWER if status == 200 else status  # a page of some other server
        if not config.teacher_model:
            raise teacher.failure(cause, f"{said} from /models; or name a --teacher-model")
    config.teacher_model = gather([config.teacher_model])[0]
    return teacher


def prompts_of(task: Task, examples: list[Example], config: Config) -> list[list[dict]]:
    """The messages that ask for each example, --prompt instead of our system message."""
    with t5.reading(config.prompt, "no text in UTF-8"):
        own = Path(config.prompt).read_text("utf-8") if config.prompt else ""
    return [fetch_data.messages(task, example.input, own) for example in examples]


def votes_of(teacher: Teacher | None, task: Task, examples: list, ask=False) -> list[Vote]:
    """Every example's K samples after the vote. ask: rank 0 asks for those that are not on disk.
    Raises InputError."""
    if teacher is None:
        rows: list[list[Slot]] = [[] for _ in examples]
    elif teacher.url == "palm":
        kept = read_cache(fetch_data.palm_samples(task.name), "question")
        rows = [[kept.get(example.input, {}).get(0)] for example in examples]
    else:
        config = teacher.config
        prompts = prompts_of(task, examples, config)
        names = [teacher.sample_id(messages) for messages in prompts]
        model = re.sub(r"[^A-Za-z0-9.-]+", "_", config.teacher_model)[:80]
        teacher.cache = task.folder / f"teacher-{model}.jsonl"
        kept = None
        if ask and RANK == 0:
            kept = ask_teacher(teacher, dict(zip(names, prompts)))
        barrier()  # the other ranks wait for the samples
        if kept is None:
            kept = read_cache(teacher.cache)
        rows = [[kept.get(name, {}).get(k) for k in range(config.samples)] for name in names]
    pairs = zip(track("  vote", rows), examples)  # track first: it sees the end
    return [vote_on(task, example.input, row) for row, example in pairs]


def ask_teacher(teacher: Teacher, prompts: dict[str, list[dict]]) -> dict:
    """Fills the slots that the cache lacks, through `--concurrency` threads -> the cache's samples.
    One process asks, the others wait. Raises InputError; whatever ends it, answers under way are
    kept."""
    teacher.cache.parent.mkdir(parents=True, exist_ok=True)
    with t5.lock(f"{teacher.cache}.lock"):
        kept = read_cache(teacher.cache)
        jobs = []
        for name, messages in prompts.items():
            missing = [k for k in range(teacher.config.samples) if k not in kept.get(name, {})]
            if missing:
                jobs.append((name, messages, missing))
        if not jobs:
            return kept
        total = sum(len(missing) for _, _, missing in jobs)
        characters = sum(len(part["content"]) for _, messages, _ in jobs for part in messages)
        tokens = (characters // 4 + 120 * total) // 1000
        say(f"teacher: {teacher.config.teacher_model} at {teacher.url}")
        say(f"  samples kept in {teacher.cache}")
        say(f"  to ask for: {total} samples of {len(jobs)} questions, roughly {tokens:,} k tokens")
        open(teacher.cache, "ab").close()  # where it cannot be written, nothing is asked
        teacher.refused = {name for name in prompts if -1 in kept.get(name, {})}
        if any(name in kept for name in prompts):
            teacher.tolerance = IN_A_ROW
        try:
            run_jobs(teacher, jobs, total)
        finally:
            say(f"  {teacher.filled} samples, {teacher.requests} requests")
            for said, count in teacher.refusals.items():
                say(f"  {count} questions refused: {said}")
    if teacher.requests == teacher.budget and teacher.filled < total:
        say("  --teacher-budget is spent; ask for the rest before you train, since a run")
        say("  started now could not be resumed once there are more samples")
    most = sum(teacher.refusals.values()) > len(prompts) / 2
    require(not most, f"teacher {teacher.url}: refused most questions, see above")
    return read_cache(teacher.cache)


def wait_for(result: AsyncResult, teacher: Teacher) -> Any:
    """What threads return or raise; the user reads every ten seconds what is waited for."""
    waited = 0.0
    while not result.ready():
        before = teacher.filled
        result.wait(QUIET)
        waited = waited + QUIET if teacher.filled == before else 0.0
        if waited and not result.ready():
            why = [*teacher.trouble.values(), "no answer yet"][0]
            say(f"  waiting for {teacher.url} for {waited:.0f} s: {why}")
    return result.get()


def run_jobs(teacher: Teacher, jobs: list, total: int) -> None:
    """Whoever stops, by an error or by Ctrl-C, waits for the answers under way."""
    teacher.progress = t5.Progress("  teacher", total)
    with ThreadPool(teacher.config.concurrency) as pool:
        result = pool.map_async(teacher.fill_or_stop, jobs, chunksize=1)
        try:
            wait_for(result, teacher)
        except BaseException:
            teacher.stopped.set()
            teacher.progress.close()
            if not result.ready():
                with contextlib.suppress(OSError):  # nobody may read it
                    say("  stopping; answers under way are waited for (Ctrl-C ends the waiting)")
                result.wait()
            raise
    teacher.progress.close()


def report_votes(task: Task, examples: list[Example], votes: list[Vote]) -> None:
    """Prints the vote's statistics, counted before repetitions are dropped but for "distinct", and
    warns of a teacher that cannot be read."""
    n = len(votes)
    sizes = [[len(v.positives), len(v.negatives), len(v.rationales(v.positives))] for v in votes]
    m, k, distinct = np.sum(sizes, axis=0)
    voted = [vote for vote in votes if vote.positives]
    alone = sum(not vote.negatives for vote in voted)
    gold = [fetch_data.answer_key(task.kind, example.label) for example in examples]
    right = sum(vote.best == label for vote, label in zip(votes, gold))
    pairs = [pair for vote in votes for pair in zip(vote.slots, vote.answers)]
    unread = [slot[0] for slot, answer in pairs if slot and answer is None]
    counts = f"{distinct / n:.2f} distinct; {k / n:.2f} negatives"
    say(f"vote: {m / n:.2f} positives per question (paper: 3.87), {counts}")
    say(f"  {alone / n:.0%} of {n} questions with positives only (paper: more than half),")
    say(f"  majority right on {right / n:.1%}, {len(unread)} samples cannot be read")
    if 2 * len(unread) > m + k:
        say("warning: the teacher does not keep to the format, or its samples are cut off: look at")
        say("  --show-prompt, try --prompt FILE or more --teacher-tokens. One of its samples:")
        say(f"  {fetch_data.fold(unread[0])[:300]!r}")
    if right < len(voted) / 20:
        say("warning: the majority is hardly ever right; do --answer, labels and prompt fit?")


# --------------------------------------------------------------- 9. Data, folder, checkpoint, ranks


def gather(items: list) -> list:
    """The items of all ranks, in rank order, on every rank; each waits for the others."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier() -> None:
    """Waits for all ranks."""
    gather([])


def all_reduce_gradients(model: nn.Module) -> None:
    """Adds up the ranks' gradients, whose losses are divided by the global batch already."""
    if WORLD > 1:
        grads = [p.grad for p in model.parameters()]
        flat = nn.utils.parameters_to_vector(grads)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, grads)


def student_folder(model: str) -> Path:
    """--model as a Hugging Face folder; a published student is fetched once. Raises InputError."""
    if model in ("t5-small", "t5-base"):
        return fetch_data.ensure(model)
    folder = fetch_data.HERE / "weights/demo" if model == "demo" else Path(model)
    there = (folder / "config.json").is_file() and (folder / "spiece.model").is_file()
    kinds = "--model takes demo, t5-small, t5-base or a Hugging Face T5 folder"
    require(there, f"{folder}: no config.json and spiece.model there; {kinds}")
    return folder


def hold(folder: Path) -> contextlib.AbstractContextManager:
    """Keeps other processes out of a run's folder; rank 0 does so for all. Raises InputError."""
    if RANK > 0:
        return contextlib.nullcontext()
    return t5.lock(folder / "lock", f"{folder}: another process has it")


def claim(config: Config) -> tuple[Path, contextlib.AbstractContextManager]:
    """A new run's folder, held while this process lives: --run, or the first free default name. One
    without a checkpoint that nobody holds is taken again. Raises InputError."""
    if RANK > 0:
        return gather([None])[0], contextlib.nullcontext()  # rank 0 claims for all
    begun = {"config.json", "task.json", "metrics.jsonl", "snapshots", "lock"}
    name = f"runs/{Path(config.task).name}-{config.method}-{config.seed}"
    for number in itertools.count(1):
        folder = Path(config.run or (name if number == 1 else f"{name}-{number}"))
        try:
            names = {path.name for path in set(folder.glob("*")) - temporaries(folder)}
            free = names <= begun and not folder.is_file()
            require(free, f"--run {folder}: exists; name another, or --resume {folder}")
            if names - {"lock"}:
                read_config(folder, {})  # refuses a folder that is not a run's
            held = hold(folder)
        except InputError:
            if config.run:
                raise
            continue
        return gather([folder])[0], held


def temporaries(folder: Path) -> set[Path]:
    """What a killed process was writing."""
    return {path for path in folder.rglob("*.tmp") if re.fullmatch(r".+\.\d+\.tmp", path.name)}


def write_config(folder: Path, config: Config) -> None:
    if RANK == 0:
        fetch_data.write_lines(folder / "config.json", [dataclasses.asdict(config)])


def load_data(run: Run, task: Task, votes: list[Vote]) -> None:
    """Questions with their sets as token ids. votes: of the training questions, then of as many
    validation questions as were asked."""
    config = run.config
    run.task = task
    places = [("train", i, example) for i, example in enumerate(task.train)]
    places += [("valid", i, example) for i, example in enumerate(task.valid)]
    votes = votes + [vote_on(task, "", [])] * (len(places) - len(votes))
    digest = hashlib.sha256(repr(task.test).encode())
    for (split, i, example), vote in zip(places, votes, strict=True):
        S_pos, minority, answer = sets_of(vote, config.vote)
        if config.labels == "teacher" and split == "train":
            if answer is None:
                continue  # nothing to learn from
            example = Example(example.input, answer)
        q = run.student.question(example, f"{split} {i}", S_pos, minority)
        (run.train if split == "train" else run.valid).append(q)
        digest.update(repr([q.x, q.target, q.S_pos, q.minority]).encode())
    require(run.train, "no training question is left: the teacher answered none")
    taught = config.method == "finetune" or any(q.S_pos for q in run.train)
    require(taught, "no question has a positive rationale: there is nothing to distil")
    run.digest = digest.hexdigest()


def report_data(run: Run) -> None:
    """What the data lose on the way in, an example each. What all questions lose is a warning, and
    so are test questions among them."""
    config, questions = run.config, run.train + run.valid
    longest_prefix = max(len(run.student.predict_prefix), len(run.student.explain_prefix))
    labels = collections.defaultdict(set)
    for q in questions:
        labels[q.example.input].add(q.example.label)
    tested = {example.input for example in run.task.test}
    long_label = math.inf if config.method == "single" else config.label_tokens
    found = collections.defaultdict(list)
    for q in questions:
        lengths = [len(r) for r in q.S_pos + q.minority]
        for what, lost in {
            "reach --input-tokens": longest_prefix + len(q.x) > config.input_tokens,
            "have labels that reach --label-tokens": len(q.target) >= long_label,
            "have rationales that reach --rationale-tokens": config.rationale_tokens in lengths,
            "hold what the student's vocabulary lacks": t5.UNK in q.x or t5.UNK in q.target,
            "stand there with different labels": len(labels[q.example.input]) > 1,
            "are test questions too": q.example.input in tested,
        }.items():
            if lost:
                found[what].append(q.example.input)
    for what, inputs in found.items():
        wrong = what == "are test questions too" or len(inputs) == len(questions)
        shown = f"{len(inputs)} of {len(questions)} questions {what}"
        say(f"{'warning' if wrong else 'note'}: {shown}, as {fetch_data.fold(inputs[0])[:60]!r}")


def discriminator_of(student: Student, config: Config) -> Discriminator | None:
    """A new D with the pretrained encoder of --discriminator-model. Raises InputError."""
    if not config.discriminator:
        return None
    folder = student_folder(config.discriminator_model)
    return Discriminator(student, student.load(folder).encoder_only())


def prepare(config: Config, task: Task, folder: Path) -> Run | None:
    """Everything before training. A run with a checkpoint goes on with the samples on disk. None:
    --stage teacher is done. Raises InputError."""
    judged = task.valid[:JUDGED] if config.discriminator else []
    ask = config.stage == "teacher" or not (folder / "checkpoint.pt").exists()
    teacher = connect_teacher(config)
    if ask and config.stage != "teacher":
        write_config(folder, config)  # with the teacher's address and model, before it is paid
    if config.stage == "all":  # whatever is wrong with the models is said before that
        student = Student(student_folder(config.model), config)
        run = Run(config, student, discriminator_of(student, config), folder)
        run.teacher = teacher
        past_student(run, 1)  # reads --negative-model
    votes = votes_of(teacher, task, task.train + judged, ask)
    if any(vote.slots for vote in votes):
        report_votes(task, task.train, votes[: len(task.train)])
    if config.stage == "teacher":
        return None
    load_data(run, task, votes)
    if not ask:
        restore(run)
    return run


def load_weights(run: Run, t: int, model: T5, D: Discriminator | None = None) -> None:
    """Gives a student, and a discriminator, their weights after iteration t. Raises InputError."""
    path = run.folder / f"snapshots/{t}.pt"
    weights = t5.read_pt(path)
    with t5.reading(path, "no snapshot of this run: {}"):
        model.load_state_dict(weights["student"])
        if D is not None:
            D.load_state_dict(weights["discriminator"])


def parts_of(run: Run) -> dict[str, Any]:
    """What checkpoint.pt keeps beside the weights, which are in the last snapshot."""
    parts = {"optimizer": run.optimizer, "scaler": run.scaler}
    if run.discriminator is not None:
        parts |= {"d_optimizer": run.d_optimizer, "d_scaler": run.d_scaler}
    return parts


def save(run: Run) -> None:
    """What an iteration leaves on disk: its snapshot, then checkpoint.pt, which names it; a crash
    before that costs the iteration. No random state: every draw is seeded by what it is for."""
    folder, t, config = run.folder, run.iteration, run.config
    weights = {"student": run.student.model.state_dict()}
    if run.discriminator is not None:
        weights["discriminator"] = run.discriminator.state_dict()
    t5.write_pt(folder / f"snapshots/{t}.pt", weights)
    fetch_data.write_lines(folder / "metrics.jsonl", run.lines)
    state = {name: part.state_dict() for name, part in parts_of(run).items()}
    t5.write_pt(folder / "checkpoint.pt", state | {"lines": run.lines, "digest": run.digest})
    needed = {t, selected(run.lines)["iteration"]}
    if config.negative_source == "snapshot":
        needed |= set(range(max(1, t + 1 - config.lag), t))  # those of iterations t + 1, t + 2, …
    for path in (folder / "snapshots").glob("*.pt"):
        if path.stem.isdecimal() and int(path.stem) not in needed:
            path.unlink()


def restore(run: Run) -> None:
    """Reads checkpoint.pt and its snapshot. Raises InputError where the data are others now."""
    config, path = run.config, run.folder / "checkpoint.pt"
    state = t5.read_pt(path)
    with t5.reading(path, "no checkpoint of this run: {}"):
        same = state["digest"] == run.digest
        run.lines = state["lines"]
        run.step = run.iteration * config.steps // config.iterations
        run.L_D = run.lines[-1]["L_D"]
        for name, part in parts_of(run).items():
            part.load_state_dict(state[name])
    load_weights(run, run.iteration, run.student.model, run.discriminator)
    require(same, f"{run.folder}: was made with other questions or samples; start a new run")


def selected(lines: list[dict]) -> dict[str, Any]:
    """The line of the student that is tested: the latest iteration whose validation accuracy is
    within a standard error, √(p(1 − p)/n), of the best p [ours]; row zero where there is no other.
    On some hundred questions the best one alone is chance."""
    later = lines[1:] or lines
    best = max(line["valid"] for line in later)
    error = math.sqrt(best * (1 - best) / later[0]["questions"])
    return [line for line in later if line["valid"] >= best - error][-1]


def train(run: Run) -> None:
    """A whole run, new or resumed. Raises InputError."""
    config, folder = run.config, run.folder
    report_data(run)
    if RANK == 0:
        for path in temporaries(folder):
            path.unlink()
        options = {"name": run.task.name, "kind": run.task.kind, "options": run.task.options}
        fetch_data.write_lines(folder / "task.json", [options])
    size = sum(p.numel() for p in run.student.model.parameters()) / 1e6
    say(f"student: {config.model}, {size:.1f}M parameters, {config.precision} on {config.device}")
    say(f"  {len(run.train)} questions, {config.steps} steps in {config.iterations} iterations")
    say(f"run folder: {folder}" + (f", after iteration {run.iteration}" if run.lines else ""))
    on_disk = 0.0
    try:
        begin(run)
        while config.steps and run.iteration < config.iterations:
            start = time.perf_counter()
            iterate(run, run.iteration + 1)
            run.lines.append(metrics(run, run.iteration + 1, start))
            say(table_row(run.lines[-1]))
            written = time.perf_counter()
            if RANK == 0:
                save(run)
            on_disk += time.perf_counter() - written
            barrier()  # the others wait for what rank 0 has written
        test(run)
        say(f"seconds that checkpoints took: {on_disk:.1f}")
    except KeyboardInterrupt:
        say(f"stopped; python qcrd.py --resume {folder} goes on after the last iteration on disk")
        raise


def begin(run: Run) -> None:
    """What comes before the first iteration to do: row zero, D's pretraining, the table so far."""
    config = run.config
    if not run.lines:
        run.lines.append(metrics(run, 0, time.perf_counter()))
        if RANK == 0:
            fetch_data.write_lines(run.folder / "metrics.jsonl", run.lines)
    if config.steps:
        say(f"  {expected_minutes(run):.1f} minutes of optimizer steps to expect")
        if run.discriminator is not None and run.iteration == 0:
            say(f"discriminator: {config.discriminator_pretrain} steps before the first iteration")
            train_discriminator(run, 0, run.train)
            say(f"  L_D {run.L_D:.3f}")
    say(LEGEND)
    for line in run.lines:
        say(table_row(line))


def expected_minutes(run: Run) -> float:
    """Of the optimizer steps to come, from a forward and backward whose gradients go."""
    config, student = run.config, run.student
    parts = micro_batches((run.train * WORLD)[: config.batch], config)  # some for each rank
    part = parts[len(parts) // 2]  # of middle length
    for _ in range(2 if config.device == "cuda" else 1):  # the first one loads kernels
        start = time.perf_counter()
        candidates = candidates_of(part, config)
        if config.method == "qcrd":
            measure(student, part, candidates)
        picks = pick(candidates, part, config, 0)
        score_picks(run.discriminator, part, picks)
        loss = label_losses(student, part).sum() + rationale_losses(student, part, picks).sum()
        loss.backward()
        loss.item()  # waits for the GPU
        run.optimizer.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - start) * config.batch / WORLD / len(part)
    return seconds * (config.steps - run.step) / 60


# ------------------------------------------------------------------------------- 10. Evaluation


def rationale_right(run: Run, q: Question, text: str) -> bool:
    """Whether a rationale, read like a teacher's sample, names the right answer."""
    answer = fetch_data.read_sample(run.task, q.example.input, text).answer
    return fetch_data.is_right(run.task.kind, answer, q.example.label)


def evaluate(run: Run, questions: list[Question], explained: int | None = None) -> list[dict]:
    """Greedy answers -> {input, gold, answer, right} a question; the first `explained` ones also
    have {rationale, rationale_right, quality}: quality is s(x, r), None without a discriminator."""
    student, config, D = run.student, run.config, run.discriminator
    single = config.method == "single"
    longest = config.label_tokens + (config.rationale_tokens if single else 0)
    written = student.write(student.predict_prefix, questions, longest)
    answers = [student.tokenizer.decode(ids) for ids in written]
    asked = questions[:explained] if config.method != "finetune" else []
    if single:  # the answer is what follows the last "answer:"; without one there is none
        parts = [text.rpartition("answer:") for text in answers]
        rationales = [before if mark else after for before, mark, after in parts]
        answers = [after if mark else "" for _, mark, after in parts]
    else:
        written = student.write(student.explain_prefix, asked, config.rationale_tokens)
        rationales = [student.tokenizer.decode(ids) for ids in written]
    quality = [None] * len(asked)
    if D is not None:
        quality = D.score([(q.x, r) for q, r in zip(asked, written)]).tolist()
    rows = []
    for q, answer in zip(questions, map(str.strip, answers)):
        right = fetch_data.is_right(run.task.kind, answer, q.example.label)
        row = {"input": q.example.input, "gold": q.example.label, "answer": answer}
        rows.append(row | {"right": right})
    for row, q, text, s in zip(rows, asked, rationales, quality):
        right = rationale_right(run, q, text)
        row |= {"rationale": text.strip(), "rationale_right": right, "quality": s}
    return rows


def accuracies(rows: list[dict]) -> dict[str, float | None]:
    """Of `evaluate`'s rows; None where no rationales were written."""
    names = {"test_accuracy": "right", "rationale_accuracy": "rationale_right"}
    return {name: mean([row[k] for row in rows if k in row]) for name, k in names.items()}


def in_order(above: list[float], below: list[float]) -> list[float]:
    """Of each pair: 1 where the first is the higher one, 0.5 where they are equal, else 0."""
    return [(a > b) + 0.5 * (a == b) for a, b in itertools.product(above, below)]


def judge_validation(run: Run) -> dict[str, Any]:
    """What D makes of validation questions: mean s of the teacher's positives and negatives and of
    the student's samples, and how often a positive scores above a negative of its question."""
    questions = run.valid[:JUDGED]
    pairs = [(q.x, r) for q in questions for r in q.S_pos + q.S_neg]
    scores = iter(run.discriminator.score(pairs).tolist())
    s: dict[str, list] = {"positives": [], "teacher": [], "student": []}
    above: dict[str, list] = {"teacher": [], "student": []}
    for q in questions:
        sizes = {"positives": q.S_pos, "teacher": q.minority, "student": q.from_past}
        own = {kind: [next(scores) for _ in members] for kind, members in sizes.items()}
        for kind in s:
            s[kind] += own[kind]
        for kind in above:
            above[kind] += in_order(own["positives"], own[kind])
    means = {kind: mean(values) for kind, values in s.items()}
    return {"s": means, "pair": mean(above["teacher"]), "pair_student": mean(above["student"])}


def metrics(run: Run, t: int, start: float) -> dict[str, Any]:
    """An iteration's line: the means of what its loss was made of, and the accuracies on validation
    questions; row zero (t = 0): of the student before training. Raises InputError for a NaN."""
    line: dict[str, Any] = {"iteration": t}
    if t > 0:
        line |= {"alphas": alphas_of(run.config, t), "L_D": run.L_D}
        for name, sums in run.sums.items():
            total, count = map(sum, zip(*gather([[float(x) for x in sums]])))
            require(math.isfinite(total), NOT_A_NUMBER)
            line[name] = total / count if count else None
        for weight in run.student.model.parameters():  # the last step's, that no loss has seen
            require(bool(weight.isfinite().all()), NOT_A_NUMBER)
        line["L"] = total_loss(line["alphas"], line["L_pred"], line["L_cl"], run.L_D)
        questions = questions_of(run, order_of(run.config, len(run.train), t))
        from_past = [(q, run.student.tokenizer.decode(r)) for q in questions for r in q.from_past]
        line["past"] = len(from_past) / len(questions)
        line["right"] = mean([rationale_right(run, q, text) for q, text in from_past])
        if run.discriminator is not None:
            line |= judge_validation(run)
    rows = evaluate(run, run.valid, JUDGED)
    line["valid"], line["valid_rationale"] = accuracies(rows).values()
    return line | {"questions": len(rows), "seconds": time.perf_counter() - start}


LEGEND = """t: iteration, 0 before training; L: eq. (8) and its parts, L_D as last trained;
s_pos: s of r⁺; zero: negative terms that are 0; pair: how often a positive
scores above a negative of its question; past: negatives a question by the
student's past; right: those of them that end in the right answer; label,
rationale: greedy answers and rationales that are right, on validation
 t      L L_pred   L_cl    L_D s_pos zero pair past right label rationale    sec"""
COLUMNS = """iteration:2d L:6.3f L_pred:6.3f L_cl:6.3f L_D:6.3f s_pos:5.2f zero:4.0% pair:4.0%
past:4.2f right:5.0% valid:5.1% valid_rationale:9.1% seconds:6.1f"""


def table_row(line: dict[str, Any]) -> str:
    """A line of metrics.jsonl in 80 columns."""
    cells = []
    for column in COLUMNS.split():
        name, form = column.split(":")
        value = line.get(name)
        cells.append(f"{'-':>{form[0]}}" if value is None else format(value, form))
    return " ".join(cells)


def test(run: Run) -> None:
    """The selected student and the last one on the test questions -> student/, predictions.jsonl,
    result.json."""
    folder, best = run.folder, selected(run.lines)
    questions = [run.student.question(example) for example in run.task.test]
    rows = evaluate(run, questions)
    last = {f"{name}_last": value for name, value in accuracies(rows).items()}
    if best["iteration"] != run.iteration:
        load_weights(run, best["iteration"], run.student.model, run.discriminator)
        rows = evaluate(run, questions)
    result = accuracies(rows) | last | {"questions": len(rows), "valid_accuracy": best["valid"]}
    result["best_iteration"] = best["iteration"]
    if RANK == 0:
        run.student.model.save(folder / "student", vocab=run.student.vocab)
        if run.discriminator is not None:
            shape = dataclasses.asdict(run.discriminator.encoder.config)
            state = {"config": shape, "weights": run.discriminator.state_dict()}
            t5.write_pt(folder / "student/discriminator.pt", state)
        fetch_data.write_lines(folder / "predictions.jsonl", rows)
        fetch_data.write_lines(folder / "result.json", [result])
    say(result_text(folder, result))


def result_text(folder: Path, result: dict[str, Any]) -> str:
    """What result.json says, and what can be done with the run."""
    n, t = result["questions"], result["best_iteration"]
    lines = [f"test, {n} questions; student of iteration {t}, the latest within a"]
    lines.append("standard error of the best labels on validation")
    for name in ("test_accuracy", "rationale_accuracy"):
        if result[name] is not None:
            last = f"last student {result[f'{name}_last']:.1%}"
            lines.append(f"  {name:18s} {interval(result[name], n)}, {last}")
    lines += [f"run folder: {folder}", f'  python qcrd.py --ask {folder} "a question"']
    if t and result["rationale_accuracy"] is not None:
        lines.append(f"  python qcrd.py --audit {folder} 1")
    return "\n".join(lines)


def interval(p: float, n: int) -> str:
    """An accuracy p on n questions with Wilson's 95 % interval."""
    z = 1.96
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = abs(center - half), center + half  # abs: of -0.0
    return f"{p:6.1%} (95 % interval {low:.1%} to {high:.1%})"


def load_trained(folder: Path, config: Config) -> Run:
    """A finished run's student with its discriminator; needs no task data. Raises InputError."""
    require((folder / "result.json").exists(), f"{folder}: is not finished; --resume {folder}")
    student, D = Student(folder / "student", config), None
    if config.discriminator:
        path = folder / "student/discriminator.pt"
        saved = t5.read_pt(path)
        with t5.reading(path, "no discriminator of this run: {}"):
            D = Discriminator(student, T5(t5.T5Config(**saved["config"])).encoder_only())
            D.load_state_dict(saved["weights"])
    run = Run(config, student, D, folder)
    with t5.reading(folder / "task.json", "damaged"):
        saved = json.loads((folder / "task.json").read_text("utf-8"))
        options = tuple(map(str, saved["options"]))
        run.task = Task(saved["name"], saved["kind"], Path(), [], [], [], options)
    return run


def ask_student(folder: Path, config: Config, texts: list[str]) -> None:
    """Answers and explains questions. Raises InputError."""
    run = load_trained(folder, config)
    for row in evaluate(run, [run.student.question(Example(text, "")) for text in texts]):
        say(f"label:     {row['answer']}")
        if "rationale" in row:
            say(f"rationale: {row['rationale']}")
        if row.get("quality") is not None:
            say(f"quality:   {row['quality']:.4f}")


def evaluate_file(folder: Path, config: Config, file: str) -> None:
    """A JSONL file, by default the test questions: predictions on stdout, accuracies on stderr.
    Raises InputError."""
    run = load_trained(folder, config)
    if file:
        examples = fetch_data.read_split(Path(file), run.task.kind)
    else:
        examples = fetch_data.load_task(config.task, config.answer).test
    rows = evaluate(run, [run.student.question(example) for example in examples])
    for row in rows:
        say(json.dumps(row))
    for name, value in accuracies(rows).items():
        if value is not None and RANK == 0:
            print(f"{name} {interval(value, len(rows))} on {len(rows)} questions", file=sys.stderr)


def audit(folder: Path, config: Config, count: int, as_json: bool) -> None:
    """The first `count` questions of the next iteration with its negatives and the checkpoint's
    weights (D's before its update), without dropout, by the functions that train: text or JSON."""
    there = (folder / "checkpoint.pt").exists()
    require(there, f"{folder}: no iteration is finished, there is nothing to audit yet")
    with contextlib.redirect_stdout(sys.stderr):
        run = prepare(config, load_task(config), folder)
        t = run.iteration + 1
        order = order_of(config, len(run.train), t)
        questions = [run.train[i] for i in order[:count]]
        add_past_negatives(run, t, questions_of(run, order))
        votes = votes_of(run.teacher, run.task, [q.example for q in questions])
        items = [audit_question(run, q, vote, t) for q, vote in zip(questions, votes)]
    if as_json:
        return say(json.dumps(items, indent=1))
    say(f"{folder}: student and D after {run.iteration} iterations, D before its next update, no")
    say("dropout. L_D is that of the candidates shown, without the fillers of training.")
    for item in items:
        audit_text(item)


@torch.no_grad()
def audit_question(run: Run, q: Question, vote: Vote, t: int) -> dict[str, Any]:
    """What `iterate` computes for one question, L_D, and all that they are made of."""
    config, student, D = run.config, run.student, run.discriminator
    alphas = alphas_of(config, t)
    candidates = candidates_of([q], config)
    measure(student, [q], candidates)
    picks = pick(candidates, [q], config, run.step)
    s = score_picks(D, [q], picks)
    share = shares_of(picks, weights_of(picks, s, student.device), config.scheme)
    losses = torch.tensor([c.loss for c in picks], device=student.device)
    L_cl = contrastive(losses, s, picks, config).sum().item()
    L_pred = label_losses(student, [q]).item()
    scores, L_D = torch.ones(len(candidates)), 0.0
    weight = scores
    if D is not None and candidates:
        logits = D([(q.x, c.r) for c in candidates])  # in eval mode, which score_picks set
        scores = logits.sigmoid()
        weight = weights_of(candidates, scores, logits.device)
        positive = positive_mask(candidates, logits.device)
        if 0 < positive.sum() < len(candidates):
            L_D = L_D_of([logits[positive]], [logits[~positive]], config).item()
    item = {"question": q.example.input, "label": q.example.label, "iteration": t, "alphas": alphas}
    item |= {"beta": config.beta, "delta": config.delta, "scheme": config.scheme}
    item |= {"majority": vote.best, "samples": [], "candidates": []}
    for k, sample in enumerate(vote.samples):
        side = "positive" if k in vote.positives else "negative" if k in vote.negatives else "none"
        row = {"slot": k, "answer": sample.answer, "vote": side, "rationale": sample.rationale}
        item["samples"].append(row)
    share_of = {id(c): part for c, part in zip(picks, share.tolist())}
    for c, score, w in zip(candidates, scores.tolist(), weight.tolist()):
        row = {"set": "positive" if c.positive else "negative", "source": c.source, "loss": c.loss}
        row |= {"score": score, "weight": w, "share": share_of.get(id(c), 0.0)}
        row |= {"picked": id(c) in share_of, "rationale": student.tokenizer.decode(c.r)}
        item["candidates"].append(row)
    L_total = total_loss(alphas, L_pred, L_cl, L_D)
    return item | {"L_pred": L_pred, "L_cl": L_cl, "L_D": L_D, "L_total": L_total}


def audit_text(item: dict[str, Any]) -> None:
    """One audited question with all that its sum is made of."""
    say("\nquestion: {question}\nlabel: {label}   majority: {majority}".format(**item))
    for sample in item["samples"]:
        say("  slot {slot}: answer {answer}, {vote}: {rationale}".format(**sample))
    terms = []
    for c in item["candidates"]:
        mark = "->" if c["picked"] else "  "
        line = "{set} of the {source}, ℓ {loss:.4f}, s {score:.4f}: {rationale}".format(**c)
        say(f"{mark} {line}")
        term = "+ {weight:.4f} · {loss:.4f}"
        if c["set"] == "negative":
            term = "- {beta:g} · {weight:.4f} · min({loss:.4f} - {delta:g}, 0)"
        if c["share"] != 1:
            term += " · {share:.4f}"
        if c["picked"]:
            terms.append(term.format(**c, **item))
    say(f"L_cl = {' '.join(terms).removeprefix('+ ') or 0} = {item['L_cl']:.4f}")
    line = "L_total = {:g} · L_pred {L_pred:.4f} + {:g} · L_cl {L_cl:.4f} + {:.4f} · L_D {L_D:.4f}"
    say(line.format(*item["alphas"], **item) + f" = {item['L_total']:.4f}")


# ----------------------------------------------------------------------------- 11. Command line

EPILOG = f"""Teacher by default: OPENAI_BASE_URL and OPENAI_API_KEY, else palm, which is
PaLM's published rationales. Negatives: snapshot, of the student after t - j
iterations; fixed, of the one at the start; static, its same samples each time;
sc, of the vote alone; none at all. Methods: qcrd; dss, one rationale a
question; single, one target of rationale and label; finetune, the label alone.
D's encoder: T5-base's for t5-small and t5-base on CUDA [review], else a copy of
the student's [ours]. QCRD_MIRROR: a folder or URL instead of https://.
The demo sets {", ".join(f"{flag(k)} {v}" for k, v in DEMO.items())};
its student {", ".join(f"{flag(k)} {v}" for k, v in DEMO_STUDENT.items())};
a folder as task: --steps for 20 passes, 200 to 10,000."""
FREE_ON_RESUME = ("device", "concurrency", "micro_batch")
GROUPS = {"task": "task", "teacher": "teacher and vote", "method": "student"}
GROUPS |= {"negative_source": "negatives from the student", "discriminator": "discriminator"}
GROUPS |= {"scheme": "loss", "steps": "training"}


def parser() -> argparse.ArgumentParser:
    """A flag for each field of Config, and the commands that use a run."""
    how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    how |= {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    how |= {"usage": "python qcrd.py [--task TASK] [flags]"}
    p = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, **how)
    group = p.add_argument_group("use a run, a folder under runs/")
    add = group.add_argument
    add("--resume", nargs=1, metavar="RUN", help="go on after a crash or Ctrl-C")
    add("--ask", nargs="+", metavar=("RUN", "QUESTION"), help="label, rationale, quality")
    add("--audit", nargs=2, metavar=("RUN", "N"), help="the next N questions: votes, ℓ, s, picks")
    add("--eval", nargs="+", metavar=("RUN", "FILE"), help="accuracies on a JSONL file or the test")
    add("--json", action="store_true", help="with --audit: data instead of text")
    add("--show-prompt", action="store_true", help="what the teacher would be asked")
    for setting in dataclasses.fields(Config):
        group = p.add_argument_group(GROUPS[setting.name]) if setting.name in GROUPS else group
        allowed, kind = setting.metadata["allowed"], type(setting.default)
        shown = allowed.strip("|") if "|" in allowed else kind.__name__
        how = {"type": kind, "metavar": shown}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        shown = f"({setting.default}) " if setting.default != "" else ""
        text = f"{setting.metadata['help']} {shown}[{setting.metadata['mark']}]"
        group.add_argument(flag(setting.name), help=text.replace("%", "%%"), **how)
    return p


def resolve(config: Config, where: str = "") -> Config:
    """Fills in what depends on machine and method, and refuses what would waste hours."""
    check(config, where)
    require(config.batch >= WORLD, f"--batch {config.batch}: fewer questions than ranks")
    fits = config.iterations <= config.steps or not config.steps
    require(fits, f"--iterations {config.iterations}: at most one a step, --steps {config.steps}")
    cuda = torch.cuda.is_available()
    require(cuda or config.device != "cuda", "--device cuda: there is none here; cpu works")
    if not (cuda or config.device) and torch.version.cuda and shutil.which("nvidia-smi"):
        say("warning: there is an NVIDIA driver, but torch cannot use it: too old? On the CPU now")
    config.device = config.device or ("cuda" if cuda else "cpu")
    if config.device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0)) if WORLD > 1 else 0
        count = torch.cuda.device_count()
        require(local < count, f"torchrun: {count} GPUs here; start no more ranks than that")
        torch.cuda.set_device(local)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        config.precision = config.precision or ("bfloat16" if bf16 else "float16")
    config.precision = config.precision or "float32"
    large = "t5-base" if config.device == "cuda" else "t5-small"
    config.model = config.model or ("demo" if config.task == "demo" else large)
    of_paper = config.device == "cuda" and config.model in ("t5-small", "t5-base")
    own = "t5-base" if of_paper else config.model
    config.discriminator_model = config.discriminator_model or own
    for name, value in METHODS[config.method].items():
        setattr(config, name, value)
    if config.method != "qcrd":
        config.discriminator = False
    if config.vote == "first":
        config.samples = 1
    return config


def load_task(config: Config) -> Task:
    """The task with the part of its training questions that is used; rank 0 fetches it first."""
    if RANK > 0:
        barrier()
    task = fetch_data.load_task(config.task, config.answer)
    if RANK == 0:
        barrier()
    task.train[:] = task.train[: max(1, round(len(task.train) * config.fraction))]
    if task.kind == "text" and all(fetch_data.value(e.label) is not None for e in task.train):
        say("note: all labels are numbers: --answer number compares by value, and asks for them")
    return task


def contradictions(given: dict[str, Any]) -> None:
    """Refuses flags that the method's own values contradict."""
    method = given.get("method", Config.method)
    for name, value in METHODS.get(method, {}).items():
        same = given.get(name, value) == value
        require(same, f"{flag(name)} {given.get(name)}: --method {method} has {value}")


def report_unused(config: Config, given: dict[str, Any]) -> None:
    """Names the flags that do nothing beside the others."""
    source, method = config.negative_source, config.method
    idle = {  # how a flag's name begins
        "samples": config.vote == "first",
        "lag": source != "snapshot",
        "negative_model": source not in ("fixed", "static"),
        "student_": source in ("sc", "none"),
        "delta|beta": source == "none",
        "student_temperature_end": source == "static",
        "discriminator$": method != "qcrd" and given.get("discriminator"),
        "discriminator_|alpha_d": not config.discriminator,
        "scheme|alpha_pred|alpha_cl": method in ("single", "finetune"),
    }
    pattern = "|".join(name for name, useless in idle.items() if useless) or "$"
    unused = [flag(name) for name in given if re.match(pattern, name)]
    if unused:
        say(f"note: without effect beside the other flags: {', '.join(unused)}")


def settings_of(given: dict[str, Any]) -> Config:
    """The flags over the defaults of their task and student. Raises InputError."""
    contradictions(given)
    name = given.get("task", Config.task)
    model = given.get("model", "demo" if name == "demo" else "")
    defaults = (DEMO if name == "demo" else {}) | (DEMO_STUDENT if model == "demo" else {})
    models = ("demo", "t5-small", "t5-base")
    for path in ("task", "prompt", "model", "negative_model", "discriminator_model"):
        if given.get(path) and given[path] not in (*fetch_data.TASKS, *models):
            given[path] = str(Path(given[path]).resolve())  # a run works from other folders too
    config = resolve(Config(**defaults | given))
    report_unused(config, given)
    if config.negative_source == "snapshot" and config.iterations <= config.lag:
        say("note: --iterations is not above --lag: the past student writes no negatives")
    for model in {config.model, config.negative_model, config.discriminator_model} - {"", *models}:
        student_folder(model)  # what is missing is said before anything is fetched
    return config


def start(given: dict[str, Any], show_prompt: bool) -> None:
    """A new run. Raises InputError."""
    config = settings_of(given)
    if show_prompt:
        task = load_task(config)
        for message in prompts_of(task, task.train[:1], config)[0]:
            say(f"[{message['role']}]\n{message['content']}")
        judged = min(JUDGED, len(task.valid)) if config.discriminator else 0
        asked = f"{len(task.train)} questions and {judged} of validation"
        say(f"{asked}, {config.samples} samples each, of {config.teacher_tokens} tokens at most")
    elif config.stage == "teacher":
        prepare(config, load_task(config), Path())
        say("the teacher is done; without --stage teacher its samples are trained on")
    else:
        folder, held = claim(config)
        with held:
            task = load_task(config)
            if config.task not in fetch_data.TASKS and "steps" not in given:
                passes = 20 * math.ceil(len(task.train) / config.batch)
                config.steps = max(200, min(10_000, passes))
            write_config(folder, resolve(config))
            train(prepare(config, task, folder))


def read_config(folder: Path, changes: dict[str, Any]) -> Config:
    """A run's settings, checked like flags, with some changed. Raises InputError."""
    path = folder / "config.json"
    require(path.is_file(), f"{folder}: no run, which is a folder like runs/demo-qcrd-0")
    with t5.reading(path, "not the settings of a run: {}"):
        config = Config(**json.loads(path.read_text("utf-8")) | changes)
    if changes.get("device") == "cpu":
        config.precision = "float32"  # whatever a GPU's was
    return resolve(config, f"{path}: ")


def reopen(command: str, words: list[str], changes: dict[str, Any], as_json: bool) -> None:
    """--resume, --ask, --audit or --eval, under the run's own settings. Raises InputError."""
    folder, rest = Path(words[0]), words[1:]
    others = " ".join(flag(name) for name in changes if name not in FREE_ON_RESUME)
    free = " ".join(map(flag, FREE_ON_RESUME))
    require(not others, f"--{command} keeps the run's settings: {free} may change, not {others}")
    config, result = read_config(folder, changes), folder / "result.json"
    if command == "audit":
        good = re.fullmatch(r"0*[1-9]\d{0,8}", rest[0])
        require(good, f"--audit RUN N: N is {rest[0][:20]!r}, not a number")
        audit(folder, config, int(rest[0]), as_json)
    elif command == "ask":
        require(rest, "--ask RUN QUESTION: the question is missing")
        ask_student(folder, config, rest)
    elif command == "eval":
        require(len(rest) < 2, "--eval RUN FILE: one file at a time")
        evaluate_file(folder, config, "".join(rest))
    elif result.exists():
        with t5.reading(result, "no result of a run"):
            text = result_text(folder, json.loads(result.read_text("utf-8")))
        say(text)
    else:
        with hold(folder):
            train(prepare(config, load_task(config), folder))


def main() -> int:
    """-> exit code: 0; 2 after one line for what came from outside; 130 when stopped."""
    return t5.run_program(run_command, "--micro-batch 4 and --discriminator-questions 2 need less")


def run_command() -> None:
    for word in [*sys.argv, os.getcwd()]:
        text = word.encode("utf-8", "replace").decode()
        require(text == word, f"{text}: not UTF-8")
    given = vars(parser().parse_args())
    as_json, show_prompt = given.pop("json", False), given.pop("show_prompt", False)
    named = [name for name in ("resume", "ask", "audit", "eval") if name in given]
    require(len(named) < 2, f"--{' and --'.join(named)}: one at a time")
    require("audit" in named or not as_json, "--json: only with --audit RUN N")
    if WORLD > 1:  # rank 0 may ask a teacher for hours; objects are gathered on the CPU
        cuda = torch.cuda.is_available() and given.get("device") != "cpu"
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    if named:
        reopen(named[0], given.pop(named[0]), given, as_json)
    else:
        start(given, show_prompt)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
