"""QCRD, Quality-guided Contrastive Rationale Distillation (Wang et al., EMNLP 2025, arXiv 2405.13014), in one file.

A large language model (the teacher) explains its answers; a small T5 (the student) learns to answer and to explain.
The file follows the paper: 1 settings, 2 tasks, 3 teacher, 4 vote, 5 batches and student, 6 negatives from snapshots,
7 discriminator, 8 loss, 9 training, 10 using a trained student. Its marks say where a choice comes from:
[abstract] the paper's abstract, [overview] published overviews of it, [review] a published third-party review of it,
[DSS] Distilling Step-by-Step, whose protocol the paper follows, [ours] where the sources are silent or unread.

    python qcrd.py                    the demo: generated word problems, minutes on a CPU, no network
    python qcrd.py --task svamp       the paper's task
    python qcrd.py --help             every setting, in the order of the paper
"""
from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import dataclasses
import datetime
import errno
import hashlib
import json
import math
import operator
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import urllib.parse
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fetch_data
from t5 import T5, InputError, Progress, Tokenizer, atomic, pad, require, to_device

# ------------------------------------------------------------------------------------------------ 1. Settings


def option(default: Any, mark: str, help: str, choices: tuple | None = None) -> Any:
    return field(default=default, metadata=dict(help=help, mark=mark, choices=choices))


@dataclass
class Config:
    """Every setting with its default, the source of that default, and its help text; the command line is made from it."""
    # Task
    task: str = option("demo", "ours", "demo, svamp, cqa, anli1, esnli, or a folder with train.jsonl, valid.jsonl and test.jsonl of {input, "
                       "label}")
    answer: str = option("text", "ours", "what a folder's labels are; numbers and equations are compared by value", ("text", "number"))
    labels: str = option("gold", "review", "labels to learn: the data's, or the teacher's majority answer as it was written", ("gold", "teacher"))
    fraction: float = option(1.0, "review", "part of the training questions that is used, the first of the file")
    overfit: int = option(0, "ours", "train on this many questions and evaluate on the same ones: must reach 100 %% (0: off)")
    archive: str = option("", "ours", "a datasets.zip of Distilling Step-by-Step on disk, instead of downloading it")
    # Teacher and vote
    teacher: str = option("", "ours", "URL of a server with OpenAI's API, openai, or palm (published rationales, no requests); default: "
                          "OPENAI_BASE_URL or OPENAI_API_KEY where set, else palm")
    teacher_model: str = option("", "overview", "default: gpt-3.5-turbo at OpenAI, else the first model that the server lists")
    samples: int = option(5, "review", "K, teacher samples a question")
    teacher_temperature: float = option(0.7, "review", "the teacher's sampling temperature")
    teacher_tokens: int = option(512, "ours", "longest teacher answer, in its tokens")
    teacher_budget: int = option(0, "ours", "ask at most this many requests, then go on with what came (0: no limit)")
    concurrency: int = option(8, "ours", "requests under way at once")
    prompt: str = option("", "ours", "a file with your own few-shot prompt; the question is put after it")
    vote: bool = option(True, "abstract", "self-consistency; without it slot 0 is the one positive and only the student makes negatives")
    # Student
    method: str = option("qcrd", "review", "qcrd; dss: label and slot 0's rationale; finetune: label only", ("qcrd", "dss", "finetune"))
    model: str = option("", "review", "demo, t5-small, t5-base, or a folder as in weights/; default: demo for the demo, else t5-base with "
                        "CUDA, t5-small without")
    input_tokens: int = option(512, "ours", "longest input")
    rationale_tokens: int = option(256, "DSS", "longest label or rationale")
    # Negatives from its own past
    negatives: bool = option(True, "review", "S_neg in the loss; without it the student samples none and the discriminator alone sees the teacher's")
    negative_source: str = option("snapshot", "review", "whose negatives join the teacher's: an earlier self, or a fixed student's", ("snapshot", "fixed"))
    negative_model: str = option("", "ours", "folder of the fixed student (a run's student/)")
    lag: int = option(5, "review", "iteration t samples from the student after iteration t - lag")
    student_temperature: str = option("1.5", "review", "the student's sampling temperature; A:B goes from A to B over the iterations")
    student_samples: int = option(1, "review", "student negatives a question")
    # Discriminator
    discriminator: str = option("own", "review", "an encoder of its own, a head on the student's encoder, or none (all weights 1)", ("own", "shared", "none"))
    discriminator_pretrain: int = option(500, "review", "pretraining steps on the teacher's rationales")
    discriminator_every: int = option(1, "ours", "update it before every n-th iteration (0: never)")
    discriminator_steps: int = option(20, "ours", "steps of an update")
    discriminator_lr: float = option(1e-4, "ours", "its learning rate")
    discriminator_noise: float = option(0.0, "ours", "part of its training labels that is flipped (a study of its robustness)")
    corrupt: float = option(0.3, "ours", "part of the words deleted or replaced to make a negative of a positive")
    # Loss
    positive: str = option("min", "review", "which of S_pos counts", ("min", "mean", "max"))
    negative: str = option("max", "review", "which of S_neg counts", ("max", "mean", "min"))
    delta: float = option(3.0, "review", "δ: a negative with at least this loss adds nothing")
    beta: float = option(0.2, "review", "β: weight of the negative term")
    alpha_predict: float = option(0.5, "review", "α1: weight of L_predict")
    alpha_cl: float = option(0.5, "review", "α2: weight of L_cl")
    alpha_d: float = option(0.5, "review", "α3: weight of L_D in the first iteration")
    alpha_d_decay: float = option(0.9, "review", "α3 is multiplied by this after each iteration")
    # Training
    steps: int = option(10_000, "DSS", "optimizer steps in all, where --iterations is not given")
    iterations: int = option(0, "ours", "iterations in all (0: as many as --steps need)")
    iteration_steps: int = option(0, "ours", "optimizer steps an iteration (0: one pass over the training questions)")
    batch: int = option(64, "DSS", "questions an optimizer step")
    micro_batch: int = option(0, "ours", "questions that go through the student at once: less memory, same gradients but for the draw "
                              "of dropout (0: all on CUDA, 16 on a CPU)")
    lr: float = option(5e-5, "DSS", "AdamW's learning rate, decaying linearly to 0")
    seed: int = option(0, "ours", "moves initialisation, order, dropout and sampling; never data, split or teacher samples")
    precision: str = option("auto", "ours", "auto: bf16 or fp16 on CUDA, float32 on a CPU", ("auto", "float32", "bf16", "fp16"))
    device: str = option("", "ours", "cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    run: str = option("", "ours", "name of the run's folder (default: runs/<task>-<method>-<seed>)")
    stage: str = option("all", "ours", "teacher: stop when the teacher's samples are there", ("all", "teacher"))


# What differs from the paper's setting, and for whom: a task's share of the work, and what a model of 1M parameters needs.
# An iteration ends with a validation, a snapshot and a checkpoint: svamp's 12 steps a pass are too few for that, esnli's 8,584 too many
# (no negatives of its own past in 10,000 steps).
TASK_DEFAULTS = {"svamp": dict(iteration_steps=100), "esnli": dict(iteration_steps=500),
                 "demo": dict(iterations=15, batch=32, discriminator_pretrain=100, rationale_tokens=96, teacher_tokens=256)}
MODEL_DEFAULTS = {"demo": dict(lr=1e-3, discriminator_lr=1e-3)}
FREE_ON_RESUME = ("iterations", "device", "concurrency", "micro_batch")
GROUPS = {"task": "Task", "teacher": "Teacher and vote", "method": "Student", "negatives": "Negatives from its own past",
          "discriminator": "Discriminator", "positive": "Loss", "steps": "Training"}     # first field of each group of flags


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from what it is for: nothing depends on how many random numbers something else drew. Ours."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def flag(name: str) -> str:
    """A field of Config as the command line spells it."""
    return "--" + name.replace("_", "-")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """The items of all ranks, in rank order, on every rank."""
    parts = [items] * world()
    if world() > 1:
        dist.all_gather_object(parts, items)
    return sum(parts, [])


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


STOP = threading.Event()                  # set by SIGINT and SIGTERM: finish the step, write, say how to go on


class Stopped(Exception):
    """Training was asked to stop."""


class Done(Exception):
    """Nothing is left to do; its text says why."""


# ------------------------------------------------------------------------------------------------ 2. Tasks

KINDS = {"demo": "number", "svamp": "number", "cqa": "choice", "anli1": "nli", "esnli": "nli"}
NLI = ["entailment", "neutral", "contradiction"]

# Few-shot chain-of-thought prompts [review], in words and with examples of ours; the question follows as one more "Q:".
PROMPTS = {
    "number": "Solve the problem. Think step by step in a few short sentences, then end with 'The answer is (...).', "
        "where the brackets hold the arithmetic expression that solves it.\n\n"
        "Q: A bakery had 52 rolls. It sold 17 of them before noon and baked 30 more.\nHow many rolls does it have now?\n"
        "A: The bakery began with 52 rolls. Selling 17 leaves 52 - 17 = 35. Baking 30 more gives 35 + 30 = 65. The answer is ((52 - 17) + 30).\n\n"
        "Q: Each of 6 shelves holds 14 jars. There are also 9 empty boxes in the room.\nHow many jars are there?\n"
        "A: The boxes do not matter. There are 6 shelves with 14 jars each, so 6 * 14 = 84 jars. The answer is (6 * 14).\n\n"
        "Q: Nadia read 45 pages in 3 evenings, the same number each evening.\nHow many pages did she read in one evening?\n"
        "A: The 45 pages are split evenly over 3 evenings. 45 / 3 = 15 pages. The answer is (45 / 3).",
    "choice": "Answer the question. Give a short reason first, then end with 'So the answer is (x) ...', naming one of the choices.\n\n"
        "Q: Where would you leave a wet umbrella when visiting someone?\nAnswer Choices:\n(a) bed\n(b) stand by the door\n(c) oven\n(d) bookcase\n(e) sofa\n"
        "A: A wet umbrella should stay near the entrance so that it does not wet the furniture. So the answer is (b) stand by the door.\n\n"
        "Q: What do people want when they set an alarm clock?\nAnswer Choices:\n(a) noise\n(b) to dream\n(c) to wake on time\n(d) music\n(e) a battery\n"
        "A: An alarm rings at a chosen hour, which gets a sleeper up at that hour. So the answer is (c) to wake on time.",
    "nli": "Does the premise entail the hypothesis, contradict it, or neither? Give a short reason first, then end with "
        "'So the answer is entailment.', 'So the answer is contradiction.' or 'So the answer is neutral.'\n\n"
        "Q: Premise: The choir sang outdoors until the rain began.\nHypothesis: The choir sang outside.\n"
        "A: Singing outdoors is singing outside. So the answer is entailment.\n\n"
        "Q: Premise: A man is repairing a bicycle in a garage.\nHypothesis: The man is asleep.\n"
        "A: Somebody who repairs a bicycle is awake. So the answer is contradiction.\n\n"
        "Q: Premise: Two girls are carrying a ladder.\nHypothesis: The girls are sisters.\n"
        "A: Nothing tells how the girls are related. So the answer is neutral.",
    "folder": "Think step by step in a few short sentences, then end with 'The answer is ...'.",
}


class Split(NamedTuple):
    """Questions and labels of one file, as text."""
    inputs: list[str]
    labels: list[str]

    def part(self, start: int | None, end: int | None) -> Split:
        return Split(self.inputs[start:end], self.labels[start:end])


class Task(NamedTuple):
    name: str                     # as --task gave it
    kind: str                     # "number", "choice", "nli", "text"
    folder: Path                  # where the teacher's samples are kept
    train: Split
    valid: Split
    test: Split
    options: list[str]            # the labels, where they are few and the same for all questions; else empty


def read_split(path: Path, kind: str) -> Split:
    """A JSONL file of {"input", "label"}. Errors: InputError with file, line and remedy."""
    rows, shape = [], 'each line must be an object like {"input": "...", "label": "..."}'
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; a task is a folder with train.jsonl, valid.jsonl and test.jsonl") from None
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            item = json.loads(raw.decode("utf-8-sig"))
            json.dumps(item, ensure_ascii=False).encode()      # half a surrogate pair is JSON, but no text that can be stored
            question, label = item["input"], str(item["label"]) if type(item["label"]) in (int, float) else item["label"]
        except UnicodeError:
            raise InputError(f"{where}: not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError):
            raise InputError(f"{where}: not JSON; {shape}") from None
        except (KeyError, TypeError):
            raise InputError(f'{where}: no "input" or no "label"; {shape}') from None
        require(all(isinstance(text, str) and text.strip() for text in (question, label)),
                f'{where}: "input" and "label" must be text that is not empty; {shape}')
        require(kind != "nli" or label in NLI, f"{where}: label {label[:40]!r} must be one of {', '.join(NLI)}")
        require(kind != "number" or value(label) is not None,
                f"{where}: label {label[:40]!r} is neither a number nor an equation; --answer text compares text")
        rows.append((question, label))
    require(rows, f"{path}: holds no question; {shape}")
    split = Split(*map(list, zip(*rows)))
    if repeated := len(rows) - len(set(split.inputs)):
        say(f"note: {path}: {repeated} questions stand there twice or more; remove them if that was not meant")
    return split


def load_task(config: Config) -> Task:
    """A built-in task (fetched where it is missing) or the user's folder; --fraction and --overfit applied. Errors: InputError."""
    folder, kind = Path(config.task), config.answer
    if config.task in KINDS:
        folder, kind = fetch_data.ensure(config.task, archive=config.archive or None), KINDS[config.task]
    require(folder.is_dir(),
            f"--task {config.task}: neither one of {', '.join(KINDS)} nor a folder with train.jsonl, valid.jsonl and test.jsonl")
    train, test = read_split(folder / "train.jsonl", kind), read_split(folder / "test.jsonl", kind)
    if (folder / "valid.jsonl").exists():
        valid = read_split(folder / "valid.jsonl", kind)
    else:                         # the last tenth, as the built-in tasks hold out their last questions [ours]
        n = max(1, len(train.inputs) // 10)
        require(len(train.inputs) > 1,
                f"{folder / 'train.jsonl'}: one question is too few to hold any out for validation; add more, or a valid.jsonl")
        train, valid = train.part(None, -n), train.part(-n, None)
        say(f"note: {folder} has no valid.jsonl; the last {n} training questions are held out for validation")
    if leaked := len(set(train.inputs) & set(test.inputs)):
        say(f"warning: {leaked} training questions of {folder} are also test questions: the test accuracy will flatter")
    few = sorted(set(train.labels))
    options = NLI if kind == "nli" else few if kind == "text" and len(few) <= 20 < len(train.labels) else []
    train = train.part(0, config.overfit or max(1, round(len(train.inputs) * config.fraction)))
    if config.overfit:
        valid = test = train
    return Task(config.task, kind, fetch_data.root() / "data" / folder.resolve().name, train, valid, test, options)


def prompt_for(task: Task, question: str, own: str = "") -> list[dict]:
    """The chat messages for one question: instruction, examples, question [review: few-shot chain of thought]. `own`: the user's prompt."""
    prompt = own.rstrip() or PROMPTS[task.kind if task.name in KINDS else "folder"]
    if task.kind == "nli":
        question = "Premise: " + question.replace("</s>", "\nHypothesis: ", 1)
    elif task.options and not own:
        prompt += f" The answer is one of: {', '.join(task.options)}."
    return [{"role": "user", "content": f"{prompt}\n\nQ: {question}\nA:"}]


SIGNS = str.maketrans({"÷": "/", "×": "*", "−": "-"})
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.USub: operator.neg, ast.UAdd: operator.pos}


def value(expression: str) -> float | None:
    """The value of a number or of an equation in + - * / and brackets; None for anything else. Never evaluates code. Ours.

    At most 200 characters (so brackets nest at most 100 deep) and 15 digits a number, and no powers: no answer costs anything."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", expression[:201].translate(SIGNS).strip())      # 1,234
    if len(expression) > 200 or not re.fullmatch(r"[-+*/(). 0-9]+", text) or re.search(r"[0-9]{16}|\*\*|//", text):
        return None

    def walk(node: ast.expr) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)
        operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return OPERATORS[type(node.op)](*map(walk, operands))  # no .op: (1)(2) is a call, () a tuple

    try:
        result = walk(ast.parse(re.sub(r"(?<![0-9.])0+(?=[0-9])", "", text), mode="eval").body)            # Python refuses 007
    except (SyntaxError, AttributeError, TypeError, ArithmeticError, MemoryError, RecursionError):       # TypeError: 1 + ... + 9
        return None
    return result if math.isfinite(result) else None


def answer_key(answer: str | None, kind: str) -> str | None:
    """What two answers must share to be the same answer: the value rounded to 1e-4, or the words in lower case."""
    if kind != "number":
        return " ".join(re.sub(r"[^\w\s+-]|_", " ", (answer or "")[:1000].lower()).split()) or None
    v = value(answer or "")
    return None if v is None else f"{round(v, 4) + 0.0:.4f}"          # + 0.0: -0 is 0


def is_right(answer: str, label: str, kind: str) -> bool:
    """The task's metric: value of the equation, or exact match of the label's text [DSS]."""
    return (key := answer_key(answer, kind)) is not None and key == answer_key(label, kind)


# What a model says before its answer, as often as it says it: "So the answer is", "Final Answer:", "####", "\boxed{".
ANSWER = re.compile(
    r"(?:\*{0,2}(?:\b(?:so|thus|hence|therefore)\b,?\s+)?(?:\b(?:the|my|our)\s+)?(?:\b(?:final|correct|right|best)\s+)?"
    r"\banswer(?: choice| option)?(?: to [^.:\n]{1,40}?)?\**\s*(?:is|would be|should be|=|:)(?:\s*:)?[\s$*]*|#{4}\s*|\\boxed\s*\{)+", re.IGNORECASE)
SENTENCE = re.compile(r"(?<!\b[A-Z])(?<!\b[A-Z][a-z])[.;!?](?=\s|\Z)|\n")      # its end; "Dr. No" and "B. the door" go on
SPEAKER = re.compile(r"\A\s*(?:Q|Question|A|Rationale|Reasoning|Explanation)\s*:\s*", re.IGNORECASE)
RUN_ON = re.compile(r"\n[ \t]*(?:Q|Question|Premise|Problem) ?:", re.IGNORECASE)
EQUATION = re.compile(r"[-+*/( ]*\.?[0-9][-+*/^()., 0-9]*")
LATEX = [(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\times\b|\\cdot\b", "*"), (r"\\div\b", "/"),
         (r"\\[a-zA-Z]+|\\.|[${}€£%`\"']|_+", ""), (r"(?<![0-9)])\*\*+|\*\*+(?![0-9(])", ""),             # bold is no power
         (r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])", " * "), (r"(?<=[0-9])-(?=[a-zA-Z]{2})", " ")]               # 4 x 5, 3-day


def read_number(text: str, first: bool) -> str | None:
    """The first or last number or equation of a short text, what follows its last "=" before the whole; None where that has an unknown."""
    for pattern, plain in LATEX:
        text = re.sub(pattern, plain, text)
    for part in (text.rpartition("=")[2], text):
        if runs := EQUATION.findall(part.translate(SIGNS)):
            run = (runs[0] if first else runs[-1]).rstrip("(., ").lstrip()
            while run.endswith(")") and run.count(")") > run.count("("):
                run = run[:-1].rstrip()
            if re.match(r"[(\s]*[-+*/]\s", run) or run.endswith(tuple("+-*/^")):
                return None                                    # "(some - 12)", "(2 * x)"
            alone = re.match(r"\(*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*(?:\(|$)", run)                          # "(42 apples)", "10 (5 each)"
            for found in (run, alone and alone[1]):
                if found and value(found) is not None:
                    return found
    return None


def read_option(text: str, options: list[str], lettered: bool, first: bool) -> str | None:
    """The option that a short text names, by its letter or its words; of several the first, or none."""
    if lettered and (m := re.match(r"\W*(?:(?:option|choice)\W+)?([a-h])(?:[).:]|\W*\Z)", text, re.IGNORECASE)):
        i = ord(m[1].lower()) - ord("a")
        return options[i] if i < len(options) else None
    words = f" {answer_key(text, 'text')} "
    named = sorted((words.find(f" {key} "), -len(key), o) for o in options if f" {(key := answer_key(o, 'text'))} " in words)
    return named[0][2] if named and (first or len(named) == 1) else None


def read_answer(text: str, kind: str, options: list[str], marked: bool) -> str | None:
    """What a short text gives as the answer. Where nothing marks it as one, the last number or the only option that it names."""
    text = text[:300] if marked else text[-300:]
    if kind == "number":
        return read_number(text, marked)
    text = re.sub(r"\\[a-zA-Z]+", "", text)                    # \text{Monday}
    if options:
        return read_option(text, options, kind == "choice", marked)
    return text.strip(" \t.*\"'`_${}")[:200] or None if marked else None


def read_sample(text: str, question: str, kind: str, options: list[str] = ()) -> tuple[str, str | None]:
    """-> (rationale, answer as it was written or None) of what a model said.

    Taken off the rationale: thoughts in <think> tags, a repeated question, the run-on into a next question, the answer sentence. Ours."""
    text = text[-2_000_000:].rpartition("</think>")[2].partition("<think>")[0].strip()
    text = text[:20_000].encode("utf-8", "replace").decode()   # nobody calls more a rationale; half a surrogate pair has no UTF-8
    text, words = SPEAKER.sub("", text), question.split()
    if (repeated := text.split(None, len(words)))[:-1] == words:
        text = repeated[-1]
    text = RUN_ON.split(SPEAKER.sub("", text), maxsplit=1)[0]
    if kind == "choice":
        options = re.findall(r"^\([a-h]\) (.*)$", question, re.MULTILINE)
    for mark in reversed(list(ANSWER.finditer(text))[-20:]):   # the last one that can be read
        end = SENTENCE.search(text, mark.end())
        if answer := read_answer(text[mark.end():end.start() if end else len(text)], kind, options, True):
            start = mark.start()
            if mark[0].startswith("\\"):                       # the box stands in the middle of its sentence
                start = max(text.rfind("\n", 0, start), text.rfind(". ", 0, start)) + 1
            return text[:start].strip() or (text[end.end():].strip() if end else ""), answer
    return text.strip(), read_answer(text.strip().rpartition("\n")[2], kind, options, False)


# ------------------------------------------------------------------------------------------------ 3. Teacher

class Teacher:
    """A server with OpenAI's chat-completions API, and the file that keeps every usable choice it ever gave."""

    def __init__(self, url: str, key: str, model: str, config: Config, folder: Path):
        self.url, self.key, self.config = url.rstrip("/"), key, config
        self.lock, self.local, self.stop = threading.Lock(), threading.local(), threading.Event()
        self.dropped: set[str] = set()          # optional fields that this server refused
        self.requests = self.tokens = self.filled = self.failures = 0
        self.model = model or self.first_model()
        self.about = {"model": self.model, "temperature": config.teacher_temperature, "max_tokens": config.teacher_tokens}
        self.cache = folder / f"teacher-{re.sub(r'[^A-Za-z0-9.-]+', '_', self.model)[:80]}.jsonl"
        self.have = read_cache(self.cache)      # where not empty, this server has worked before

    def call(self, method: str, path: str, body: dict | None = None) -> tuple[int, Any, str | None]:
        """-> status, JSON (None: it was none, or longer than 32 MB), Retry-After; where no answer came, 0, the reason's name, None."""
        if not hasattr(self.local, "session"):
            s = self.local.session = requests.Session()
            # Proxies and certificates of the environment, looked up once: requests does it in each request, for a third of its time.
            found = s.merge_environment_settings(self.url, {}, None, None, None)
            s.trust_env, s.proxies, s.verify, s.cert = False, found["proxies"], found["verify"], found["cert"]
            s.headers["Authorization"] = f"Bearer {self.key}" if self.key else None
        try:
            with self.local.session.request(method, self.url + path, json=body, timeout=(10, 180), stream=True, allow_redirects=False) as r:
                # A server that sends head and body apart holds the body back until the head's receipt, which Linux delays by 40 ms.
                open_socket = getattr(r.raw.connection, "sock", None)              # none where the server has closed already
                if open_socket and hasattr(socket, "TCP_QUICKACK"):
                    open_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                raw = bytearray()
                for part in r.iter_content(1 << 20):           # parts are as short as the server's chunks
                    raw += part
                    if len(raw) > 32 << 20:
                        break
        except requests.RequestException as e:
            return 0, type(e).__name__, None
        with contextlib.suppress(ValueError, RecursionError):
            return r.status_code, json.loads(raw), r.headers.get("Retry-After")
        return r.status_code, None, r.headers.get("Retry-After")

    def first_model(self) -> str:
        """Errors: InputError where nobody answers, the key is wrong or nothing is listed."""
        status, body, _ = self.call("GET", "/models")
        if not status or status in (401, 403):
            raise self.failure(status, body)
        try:
            return self.clean(body["data"][0]["id"])
        except (TypeError, KeyError, IndexError):
            raise InputError(f"teacher {self.url}: lists no model at /models (status {status}); name one with --teacher-model") from None

    def clean(self, text: object) -> str:
        """One short line of a server's words, without the key, which some servers repeat."""
        for name in ("error", "message"):                      # where it has the form of OpenAI's errors
            text = text.get(name, text) if isinstance(text, dict) else text
        line = " ".join(str(text).split())
        for secret in filter(None, (self.key, urllib.parse.quote(self.key, safe=""))):
            line = line.replace(secret, "***")
        return line[:200]

    def failure(self, status: int, body: Any) -> InputError:
        """In one line why this server cannot be used, and what to do."""
        if not status:
            why = f"no connection ({body}); is the server running, and does --teacher end in /v1?"
        elif status in (401, 403):
            why = f"status {status}: " + ("the key in OPENAI_API_KEY is not accepted" if self.key else "a key is needed in OPENAI_API_KEY")
        elif status == 200:
            why = "no text in its answers; a model that thinks before it answers needs more --teacher-tokens"
        else:
            why = f"status {status}: {self.clean(body)}; is --teacher-model {self.model} right, and does --teacher end in /v1?"
        return InputError(f"teacher {self.url}: {why}" + (f"; {self.filled} samples are kept, the same command goes on from there" if self.filled else ""))

    def drop_field(self, sent: dict, body: Any) -> bool:
        """After a 400: remember not to send the optional field that it complains of; False where there is none left to drop."""
        words = self.clean(body).lower()
        names = [f for f in ("max_tokens", "temperature", "seed") if f in words and f in sent]
        if not names and sent.get("n", 1) > 1 and ("n" in self.dropped or not self.filled):     # once filled, a 400 is about the question
            names = ["n"]
        self.dropped.update(names[:1])
        return bool(names)

    def fill(self, question: str, messages: list[dict], slots: list[int], progress: Progress) -> None:
        """Ask until the slots are full: one request after the other, lowest slot first; a slot is filled once and kept."""
        config, failed, base = self.config, 0, derive_seed("teacher", question) % (1 << 30)
        while slots and not self.stop.is_set():
            with self.lock:
                progress.update(self.filled, f"{self.requests} requests, {self.tokens} tokens, {self.failures} failures")
                if config.teacher_budget and self.requests >= (config.teacher_budget + world() - 1 - rank()) // world():    # this rank's share
                    return
                self.requests += 1
            optional = {"n": len(slots), "seed": base + slots[0], "temperature": config.teacher_temperature,
                        "max_completion_tokens" if "max_tokens" in self.dropped else "max_tokens": config.teacher_tokens}
            sent = {"model": self.model, "messages": messages} | {k: v for k, v in optional.items() if k not in self.dropped}
            status, body, retry = self.call("POST", "/chat/completions", sent)
            refused = status in (400, 422)
            if status == 200 and (choices := self.usable(body)):
                self.keep(question, messages, slots, choices)
                failed = 0
            elif not (refused and self.drop_field(sent, body)):
                self.failures += 1
                failed += 1
                if (self.filled or self.have) and (refused or (status == 200 and failed == 10)):
                    return                                     # this question alone is refused, by a content filter or its length
                hopeless = status not in (0, 200, 408, 409, 429) and status < 500
                if hopeless or failed == (10 if self.filled or status else 3):
                    self.stop.set()                            # here: the others are not to send one more
                    raise self.failure(status, body)
                self.stop.wait(retry_after(retry, min(30.0, 0.25 * 2 ** failed) * (0.5 + random.random())))     # jitter: no seed wanted

    def usable(self, body: Any) -> list[tuple[str, str]]:
        """The choices that hold text, each with the reason why it ended. Counts the answer's tokens."""
        out = []
        # any of it may be missing or something else, up to an infinite number of tokens
        with contextlib.suppress(TypeError, AttributeError, KeyError, ValueError, OverflowError):
            for c in body["choices"]:
                if isinstance(text := c["message"]["content"], str) and text.strip():
                    out.append((text[:200_000], str(c.get("finish_reason"))))
            self.tokens += int(body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"])
        return out

    def key_of(self, messages: list[dict]) -> str:
        """What decides a sample, the slot apart: prompt with question, model, temperature, length."""
        return hashlib.sha256(json.dumps([messages, *self.about.values()]).encode()).hexdigest()[:32]

    def keep(self, question: str, messages: list[dict], slots: list[int], choices: list[tuple[str, str]]) -> None:
        """Fill the lowest slots, on disk before anything else happens: one unbuffered write, which other processes may do too."""
        about = {"key": self.key_of(messages), "question": question} | self.about
        lines = [json.dumps(about | {"slot": slot, "finish": finish, "text": text}) + "\n" for slot, (text, finish) in zip(slots, choices)]
        with self.lock, open(self.cache, "ab", buffering=0) as f:
            f.write("".join(lines).encode())
            self.filled += len(lines)
        del slots[:len(lines)]


def retry_after(text: str | None, default: float) -> float:
    """Seconds that a Retry-After header asks for (a number or a date), at most ten minutes; the default where it says nothing."""
    with contextlib.suppress(TypeError, ValueError):
        if re.fullmatch(r"[0-9.]+", text):
            return min(600.0, float(text))
        return min(600.0, max(0.0, parsedate_to_datetime(text).timestamp() - time.time()))
    return default


def read_cache(path: Path, wanted: str = "key") -> dict[str, dict[int, tuple[str, str]]]:
    """-> {key: {slot: (text, finish)}}. A line that a crash tore is passed over; the first sample of a slot stays."""
    out, torn = {}, 0
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        for line in f:
            try:
                item = json.loads(line)
                out.setdefault(item[wanted], {}).setdefault(int(item["slot"]), (str(item["text"]), str(item.get("finish"))))
            except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
                torn += bool(line.strip())
    if torn:
        say(f"note: {path}: {torn} line{'s' * (torn > 1)} cut off by a crash, passed over")
    return out


def read_prompt(config: Config) -> str:
    """The user's own prompt, or "". Errors: InputError."""
    try:
        return Path(config.prompt).read_text("utf-8") if config.prompt else ""
    except (OSError, UnicodeError) as e:
        raise InputError(f"--prompt {config.prompt}: {e}; must be a file of UTF-8 text") from None


def collect(task: Task, config: Config, may_ask: bool = True) -> tuple[list[list], list[list]]:
    """-> for the training and the validation questions, K slots each: (text, finish) or None. Asks only for what is not on disk, and only
    where it may. Validation's measure the discriminator [ours]: other methods have none."""
    questions = task.train.inputs + ([] if config.overfit or config.method != "qcrd" else task.valid.inputs)
    url, key, model = config.teacher, os.environ.get("OPENAI_API_KEY", "").strip(), config.teacher_model
    if not url and task.name == "demo":
        url, key = fetch_data.demo_teacher()[0], ""
    else:
        url = config.teacher = url or os.environ.get("OPENAI_BASE_URL") or ("openai" if key else "palm")
    if url == "palm":
        by_question = read_cache(fetch_data.ensure_palm(config.task, archive=config.archive or None), "question")
        say("teacher: PaLM-540B's published rationales, ONE a question: no vote and no teacher negatives.\n"
            f"  For the paper's {config.samples} samples name a teacher: --teacher http://localhost:11434/v1 (Ollama, vLLM, llama.cpp), or set OPENAI_API_KEY.")
        slots = [[by_question.get(q, {}).get(0)] for q in questions]
    else:
        url = "https://api.openai.com/v1" if url == "openai" else url
        if "//api.openai.com" in url:
            model = model or "gpt-3.5-turbo"
        require(re.fullmatch(r"https?://[^@?#\s]+", url),      # not repeated here: it may hold a key
                "--teacher must be palm, openai or a URL like http://localhost:11434/v1; "
                "a key belongs into OPENAI_API_KEY, not into the URL")
        require(key.isascii() and key.isprintable(), "OPENAI_API_KEY holds characters that no key has; set it again")
        teacher = Teacher(url, key, model, config, task.folder)
        config.teacher_model = teacher.model                   # a resumed run need not reach the server to know whose samples it has
        slots = fill_cache(teacher, task, questions, may_ask)
    if missing := sum(s is None for row in slots for s in row):
        say(f"warning: {missing} samples are missing (over --teacher-budget, or refused); the vote goes on without them")
    n = len(task.train.inputs)
    return slots[:n], slots[n:]


def fill_cache(teacher: Teacher, task: Task, questions: list[str], may_ask: bool) -> list[list]:
    """Fill the empty slots of all questions through `concurrency` threads, this rank's share; then read what all ranks have."""
    config, own = teacher.config, read_prompt(teacher.config)
    asked = [(teacher.key_of(prompt := prompt_for(task, q, own)), q, prompt) for q in questions]
    jobs = {k: (q, prompt, [s for s in range(config.samples) if s not in teacher.have.get(k, {})]) for k, q, prompt in asked}
    todo = [job for job in jobs.values() if job[2]] if may_ask else []
    say(f"teacher: {teacher.model} at {teacher.url}, {config.samples} samples a question at temperature {config.teacher_temperature}, kept in {teacher.cache}")
    if todo:
        total = sum(len(slots) for _, _, slots in todo)
        tokens = sum(len(p[0]["content"]) for _, p, _ in todo) // 4 + total * 120
        say(f"  {len(questions)} questions, {total} samples to ask for: {len(todo)} to {total} requests, roughly {tokens / 1000:,.0f} k tokens")
        # shares by place among all questions: another rank may fill slots while this one still looks which are empty
        todo = [job for i, job in enumerate(jobs.values()) if i % world() == rank() and job[2]]
        teacher.cache.parent.mkdir(parents=True, exist_ok=True)
        with open(teacher.cache, "ab") as f:                   # a line that a crash tore ends here; empty ones are passed over
            f.write(b"\n" * (f.tell() > 0))
        progress = Progress("  teacher", sum(len(slots) for _, _, slots in todo))
        try:
            with ThreadPool(config.concurrency) as pool:       # its threads are daemons: leaving waits for no answer
                for _ in pool.imap_unordered(lambda job: teacher.fill(*job, progress), todo):
                    pass                                       # raises what ended a thread
        except KeyboardInterrupt:
            raise InputError(f"stopped; {teacher.filled} samples of this run are kept in {teacher.cache}, the same command goes on from there") from None
        finally:
            teacher.stop.set()
            progress.close()
        say(f"  {teacher.filled} samples from {teacher.requests} requests, {teacher.tokens:,} tokens, {teacher.failures} failures"
            + (f"; without {', '.join(sorted(teacher.dropped))}, which this server refuses" if teacher.dropped else ""))
    if may_ask:
        gather([])                                             # wait for what the other ranks asked for
        teacher.have = read_cache(teacher.cache) if todo or world() > 1 else teacher.have
    return [[teacher.have.get(k, {}).get(s) for s in range(config.samples)] for k, _, _ in asked]


# ------------------------------------------------------------------------------------------------ 4. Vote


def majority(keys: list[str | None]) -> tuple[str | None, list[int], list[int]]:
    """Self-consistency: -> (â, slots of S_pos, slots of S_neg), where S_pos = {r_k : a_k = â} and S_neg = {r_k : a_k ≠ â} [review].

    keys: the slots' answers, None where none can be read: no vote, in neither set. A tie goes to the answer of the lowest slot [ours]."""
    counts = collections.Counter(k for k in keys if k is not None)      # in order of first slot, and max takes the first of equals
    best = max(counts, key=counts.__getitem__) if counts else None
    return best, [i for i, k in enumerate(keys) if k is not None and k == best], [i for i, k in enumerate(keys) if k not in (best, None)]


class Voted(NamedTuple):
    """One question after the vote."""
    answer: str | None            # the majority's answer as its lowest slot wrote it; without the vote slot 0's
    positives: list[str]          # rationales, repetitions dropped
    negatives: list[str]


def read_slots(task: Task, question: str, slots: list) -> list[tuple[str, str | None]]:
    """(rationale, answer or None) of each slot; a sample that the length limit cut off before its answer has none."""
    read = [read_sample(s[0], question, task.kind, task.options) if s else ("", None) for s in slots]
    return [(r, None if s and s[1] == "length" and not ANSWER.search(s[0]) else a) for s, (r, a) in zip(slots, read)]


def vote(task: Task, config: Config, split: Split, slots: list[list], name: str) -> list[Voted]:
    """Read, clean and vote on every question's samples; prints the vote's statistics beside the paper's."""
    out, c, n, progress = [], collections.Counter(), len(split.inputs), Progress("  vote", len(split.inputs))
    for question, row, label in zip(split.inputs, slots, split.labels):
        read = read_slots(task, question, row)
        best, pos, neg = majority([answer_key(a, task.kind) for _, a in read])
        c.update(samples=sum(map(bool, row)), cut=sum(s is not None and s[1] == "length" for s in row), pos=len(pos), neg=len(neg),
                 only=bool(pos) and not neg, right=best is not None and best == answer_key(label, task.kind))
        answer = read[pos[0] if config.vote and pos else 0][1]
        if not config.vote or config.method == "dss":     # slot 0 is the one positive, right or wrong
            pos, neg = [0], []
        positives, negatives = (list(dict.fromkeys(to_student(read[k][0]) for k in slots_ if read[k][0])) for slots_ in (pos, neg))
        out.append(Voted(answer, positives, [r for r in negatives if r not in positives]))
        progress.update(len(out))
    progress.close()
    say(f"vote, {name}: {c['pos'] / n:.2f} positives and {c['neg'] / n:.2f} negatives a question (paper: 3.87 positives of 5), "
        f"{c['only'] / n:.0%} of questions with positives only (paper: more than half)\n"
        f"  majority right on {c['right'] / n:.1%} of {n} questions; of {c['samples']} samples {c['samples'] - c['pos'] - c['neg']} "
        f"without a readable answer, {c['cut']} cut off by the length limit")
    return out


def to_student(text: str) -> str:
    """÷ and × are not in T5's vocabulary [ours]."""
    return text.replace("÷", "/").replace("×", "*")


# ------------------------------------------------------------------------------------------------ 5. Batches and the student


def shown(what: str, items: Sequence, stops: bool = True) -> Iterator:
    """The items, one after the other, while stderr says how many are done. Errors: Stopped after Ctrl-C, where it `stops` and no other
    rank would wait for this one."""
    progress = Progress(what, len(items))
    try:
        for done, item in enumerate(items, 1):
            yield item
            progress.update(done)
            if STOP.is_set() and stops and world() == 1:
                raise Stopped
    finally:
        progress.close()


class Ragged:
    """Rows of token ids in one flat array with offsets: half a million questions as Python lists would not fit."""

    def __init__(self) -> None:
        self.ids, self.ends = array("i"), array("q", [0])

    def append(self, row: list[int]) -> None:
        self.ids.extend(row)
        self.ends.append(len(self.ids))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> array:
        return self.ids[self.ends[i]:self.ends[i + 1]]


class Data:
    """One split as token ids: questions (without prefix), labels, and every question's rationales of the teacher."""

    def __init__(self, student: Student, split: Split, voted: list[Voted] | None = None):
        self.questions, self.labels, self.rationales = Ragged(), Ragged(), Ragged()
        self.first, self.positive = array("q", [0]), array("b")         # first rationale of each question; in S_pos?
        config, encode = student.config, student.tokenizer.encode
        for i in shown("  token ids", range(len(split.inputs))):
            self.questions.append(encode(to_student(split.inputs[i]), config.input_tokens))
            self.labels.append(encode(to_student(split.labels[i]), config.rationale_tokens))
            for texts, positive in ((voted[i].positives, 1), (voted[i].negatives, 0)) if voted else ():
                for text in texts:
                    self.rationales.append(encode(text, config.rationale_tokens))
                    self.positive.append(positive)
            self.first.append(len(self.rationales))

    def __len__(self) -> int:
        return len(self.questions)

    def of(self, q: int, positive: bool) -> list[array]:
        """The teacher's rationales in question q's S_pos or S_neg."""
        return [self.rationales[i] for i in range(self.first[q], self.first[q + 1]) if self.positive[i] == positive]

    def digest(self) -> str:
        h, (x, y, r) = hashlib.sha256(), (self.questions, self.labels, self.rationales)
        for part in (self.positive, self.first, x.ids, x.ends, y.ids, y.ends, r.ids, r.ends):
            h.update(part)
        return h.hexdigest()[:16]


@dataclass(eq=False)
class Rationale:
    """A rationale r of a question x, both as token ids, in its S_pos or S_neg."""
    x: array
    r: list[int] | array
    positive: bool = True
    student: bool = False         # sampled from the student, not from the teacher
    place: int = 0                # of its question in the batch
    loss: float = math.nan        # ℓ(x, r) in eval mode, where it decides what is picked


def candidates(data: Data, batch: Iterable[int], negatives: dict, with_negatives: bool = True) -> list[Rationale]:
    """Each question's S_pos, then its S_neg: the teacher's and, of `negatives`, the student's."""
    out = []
    for place, q in enumerate(batch):
        x = data.questions[q]
        out += [Rationale(x, r, True, False, place) for r in data.of(q, True)]
        if with_negatives:
            out += [Rationale(x, r, False, False, place) for r in data.of(q, False)]
            out += [Rationale(x, r, False, True, place) for r in negatives.get(q, [])]
    return out


def collate(rows: list, device: torch.device) -> tuple[Tensor, Tensor]:
    """-> ids (B, W) int64 on the device, 0-padded; mask (B, W) bool, left on the CPU: T5 reads lengths there without waiting for CUDA."""
    ids, mask = pad(rows)
    return to_device(ids, device), mask


def by_length(rows: list, tokens: int) -> list[list[int]]:
    """Indices of the rows, longest first, in groups of at most `tokens` ids, padding counted (or of one row)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        if groups and (len(groups[-1]) + 1) * len(rows[groups[-1][0]]) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def visits(config: Config, n: int, iteration: int) -> list[int]:
    """The questions of an iteration in training order: one pass, or --iteration-steps full batches of the endless passes. Ours."""
    def one_pass(number: int) -> list[int]:
        return np.random.default_rng(derive_seed(config.seed, "order", number)).permutation(n).tolist()
    count = config.iteration_steps * config.batch or n
    start = (iteration - 1) * count
    stream = [q for number in range(start // n, (start + count - 1) // n + 1) for q in one_pass(number)]
    return stream[start % n:start % n + count]


class Student:
    """A T5 with its tokenizer, prefixes and precision: what training, sampling and asking share."""

    def __init__(self, model: T5, vocab: Path, config: Config, device: torch.device):
        self.model, self.vocab, self.tokenizer, self.config, self.device = model.to(device), vocab, Tokenizer(vocab), config, device
        self.predict_prefix, self.explain_prefix = (self.tokenizer.encode(prefix)[:-1] for prefix in ("predict:", "explain:"))     # [review]
        self.answer_tokens = config.rationale_tokens               # longest label it writes; training knows a closer bound
        precision = config.precision
        if precision == "auto":
            precision = "float32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        self.dtype = dict(float32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[precision]
        self.tokens = 4096 if device.type == "cpu" else 32768      # target ids in one group: bounds the logits (ids, vocabulary)

    def amp(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def inputs(self, prefix: list[int], questions: Iterable[array]) -> list[list[int]]:
        """Prefix and question, cut to the input limit with </s> kept."""
        limit, rows = self.config.input_tokens, [prefix + list(x) for x in questions]
        return [r if len(r) <= limit else r[:limit - 1] + [1] for r in rows]

    def encode(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Input rows -> memory (R, S, D) and its mask."""
        ids, mask = collate(rows, self.device)
        return self.model.encode(ids, mask), mask

    def write(self, prefix: list[int], questions: list[array], longest: int, temperature: float, purpose: tuple, title: str) -> list[array]:
        """What the student writes for each question: id rows, </s> only where it was written. Fixed batches of questions sorted by
        length, each with random numbers of its own, are shared out among the ranks: the same rows whatever the number of ranks."""
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i]), i))
        batches, out = [order[i:i + 128] for i in range(0, len(order), 128)], []
        for number in shown(title, range(rank(), len(batches), world())):
            ids, mask = collate(self.inputs(prefix, [questions[i] for i in batches[number]]), self.device)
            generator = torch.Generator().manual_seed(derive_seed(*purpose, number))
            with self.amp():
                rows = self.model.generate(ids, mask, longest, temperature, generator, limit=self.tokenizer.size).tolist()
            out += [(i, array("i", row[:row.index(1) + 1] if 1 in row else row)) for i, row in zip(batches[number], rows)]
        return [row for _, row in sorted(gather(out), key=lambda pair: pair[0])]

    def read(self, rows: Iterable[array]) -> list[str]:
        return [self.tokenizer.decode(row) for row in rows]


# ------------------------------------------------------------------------------------------------ 6. Negatives from snapshots


def student_temperature(config: Config, iteration: int) -> float:
    """τ = 1.5 [review], or A:B, a straight line over the iterations [ours]."""
    try:
        ends = [float(t) for t in config.student_temperature.split(":")]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not all(0 < t < math.inf for t in ends):
        raise InputError(f"--student-temperature {config.student_temperature}: must be a number above 0, or two as in 2.0:1.0")
    return ends[0] + (ends[-1] - ends[0]) * min(1.0, (iteration - 1) / max(1, config.iterations - 1))


def sample_negatives(past: Student, data: Data, config: Config, iteration: int, questions: list[int]) -> tuple[dict, dict]:
    """`--student-samples` rationales of an earlier student for each question of the iteration -> ({question: rows}, counts).

    Trained on as sampled; empty ones, repetitions and ones equal to a positive are dropped [ours]."""
    start, unique = time.perf_counter(), sorted(set(questions))
    purpose = config.seed, "negatives", iteration if config.negative_source == "snapshot" else 0      # a fixed student's change with τ and questions only
    rows = past.write(past.explain_prefix, [data.questions[q] for q in unique for _ in range(config.student_samples)], config.rationale_tokens,
                      student_temperature(config, iteration), purpose, "  negatives")
    kept: dict[int, list[array]] = {}
    for i, row in enumerate(rows):
        q = unique[i // config.student_samples]
        if set(row) - {0, 1} and row not in data.of(q, True) and row not in kept.get(q, []):
            kept.setdefault(q, []).append(row)
    return kept, dict(sampled=len(rows), dropped=len(rows) - sum(map(len, kept.values())), tokens=sum(map(len, rows)),
                      seconds=time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------ 7. Discriminator


class Discriminator(nn.Module):
    """T5 encoder over the ids of x then r -> max-pool over the real tokens -> Linear -> ReLU -> Linear -> logit [review].

    The encoder is a copy of the student's pretrained one [review], or the student's own (--discriminator shared, the other reading [ours])."""

    def __init__(self, student: Student, config: Config):
        super().__init__()
        torch.manual_seed(derive_seed(config.seed, "head"))
        width, self.encoder = student.model.config.d_model, None
        if config.discriminator == "own":
            self.encoder = copy.deepcopy(student.model)
            del self.encoder.decoder
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.to(student.device)

    def forward(self, student: Student, rationales: Sequence[Rationale]) -> Tensor:
        """The ids of x (its </s> is the border [ours]) then r, right-truncated to the input limit -> logits (R,) float32."""
        rows = [(list(c.x) + list(c.r))[:student.config.input_tokens] for c in rationales]
        logits = torch.zeros(len(rows), device=student.device)
        for group in by_length(rows, 4 * student.tokens):
            ids, mask = collate([rows[i] for i in group], student.device)
            with student.amp():
                memory = (self.encoder or student.model).encode(ids, mask)
                pooled = memory.masked_fill(~mask.to(memory.device)[..., None], -torch.inf).amax(1)
                logits = logits.index_put((torch.tensor(group, device=student.device),), self.head(pooled).squeeze(-1).float())
        return logits

    @torch.no_grad()
    def quality(self, student: Student, rationales: Sequence[Rationale]) -> Tensor:
        """s(x, r) = sigmoid of the logit, in eval mode and without gradient: (R,) float32 in [0, 1]."""
        self.eval(), student.model.eval()
        return torch.sigmoid(self(student, rationales))


def corrupt(text: str, words: list[str], part: float, rng: np.random.Generator) -> str:
    """A negative made of a positive: a part of the words deleted or replaced by other rationales' words [review: masking and replacement].

    No mask symbol, which would give the class away [ours]."""
    old = text.split()
    hit = rng.random(len(old)) < part
    if len(old) and not hit.any():
        hit[rng.integers(len(old))] = True
    new = [words[rng.integers(len(words))] if rng.random() < 0.5 else "" for _ in old]
    return " ".join(w for w in (n if h else o for o, n, h in zip(old, new, hit)) if w)


def discriminator_batch(data: Data, student: Student, config: Config, rng: np.random.Generator, questions: list[int], negatives: dict,
                        count: int) -> tuple[list[Rationale], Tensor]:
    """A balanced batch, half positives, then half negatives -> (rationales, targets), empty where there is no positive.

    Negatives are S_neg's and, for as many as it is smaller than S_pos, positives with corrupted words [review]."""
    some = candidates(data, questions, negatives)
    good, bad = [c for c in some if c.positive], [c for c in some if not c.positive]
    half = max(1, count // 2) if good else 0
    out = [good[k] for k in rng.integers(max(1, len(good)), size=half)]
    for k in rng.integers(max(1, len(good), len(bad)), size=half):
        if k < len(bad):
            out.append(bad[k])
        else:
            old, others = good[rng.integers(len(good))], [good[i].r for i in rng.integers(len(good), size=4)]
            wrong = corrupt(student.read([old.r])[0], " ".join(student.read(others)).split() or ["the"], config.corrupt, rng)
            out.append(Rationale(old.x, student.tokenizer.encode(wrong, config.rationale_tokens), positive=False))
    targets = torch.tensor([1.0] * half + [0.0] * half)
    flipped = torch.from_numpy(rng.random(len(out)) < config.discriminator_noise)
    return out, torch.where(flipped, 1 - targets, targets).to(student.device)


def optimizer_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float) -> None:
    """AdamW with the gradient's norm clipped at 1 [DSS]; a step that overflowed in fp16 is skipped by the scaler."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    scaler.step(optimizer)
    scaler.update()


def train_discriminator(d: Discriminator, optimizer: torch.optim.Optimizer, student: Student, data: Data, config: Config, iteration: int,
                        questions: list[int], negatives: dict, steps: int, lr: float) -> float:
    """`steps` steps of L_D = binary cross-entropy [review], the same ones on every rank -> mean L_D."""
    seed = derive_seed(config.seed, "discriminator", iteration)
    rng, total = np.random.default_rng(seed), torch.zeros((), device=student.device)
    scaler = torch.amp.GradScaler(student.device.type, enabled=student.dtype == torch.float16)
    torch.manual_seed(seed)
    d.train(), student.model.eval()
    for _ in shown("  discriminator", range(steps)):
        some = [questions[i] for i in rng.integers(len(questions), size=4 * config.batch)]     # a step costs the same however many there are
        rationales, targets = discriminator_batch(data, student, config, rng, some, negatives, config.batch)
        if rationales:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(d(student, rationales), targets)
            scaler.scale(loss).backward()
            optimizer_step(optimizer, scaler, lr)
            total += loss.detach()
    student.model.zero_grad()             # shared: the pretraining of the head moves nothing else
    if world() > 1:                       # on CUDA the last digits of the ranks' same steps may have parted
        for p in d.parameters():
            dist.broadcast(p.data, 0)
    return (total / max(1, steps)).item()


def discriminator_accuracy(d: Discriminator, student: Student, data: Data, config: Config) -> dict[str, float]:
    """On the validation questions' teacher samples: which part is recognised of S_pos, of S_neg, of corrupted positives (NaN: none there)."""
    everything = candidates(data, range(len(data)), {})
    good, bad = ([c for c in everything if c.positive == positive][:1000] for positive in (True, False))
    rng, texts = np.random.default_rng(0), student.read(c.r for c in good)
    words = " ".join(texts).split()
    fake = [Rationale(c.x, student.tokenizer.encode(corrupt(text, words, config.corrupt, rng), config.rationale_tokens)) for c, text in zip(good, texts)]
    seen = [d.quality(student, some).cpu() > 0.5 if some else torch.zeros(0) for some in (good, bad, fake)]
    parts = [s.float().mean().item() for s in seen]
    return dict(positives=parts[0], negatives=1 - parts[1], corrupted=1 - parts[2])


# ------------------------------------------------------------------------------------------------ 8. Loss


class Picks(NamedTuple):
    """The candidates that count in the loss."""
    rationales: list[Rationale]   # P of them
    share: Tensor                 # (P,) part of its question's term: 1, or 1/n under a mean
    positive: Tensor              # (P,) bool
    scores: Tensor                # (P,) s(x, r)
    left_out: float               # shares of the negatives that the eval pass finds beyond δ: their term is 0, they are not run again


def need_losses(some: list[Rationale], config: Config) -> list[Rationale]:
    """The candidates whose ℓ decides something: among several positives, and of every negative, whether it is beyond δ."""
    positives = collections.Counter(c.place for c in some if c.positive)
    return [c for c in some if not c.positive or (positives[c.place] > 1 and config.positive != "mean")]


def pick(some: list[Rationale], config: Config, student: Student, d: Discriminator | None) -> Picks:
    """Which candidates count, by their `loss` (eval mode, no gradient [ours]; only that of `need_losses` is read), and their quality.

    ℓ_pos = min over S_pos of ℓ, ℓ_neg = max over S_neg of min(ℓ - δ, 0) [review]: r⁺ the argmin, r⁻ the argmax of the unclamped ℓ, the
    first on a tie [ours]. A mean counts every candidate with share 1/n. A picked negative whose ℓ here is already δ adds 0: left out.
    Without a discriminator both weights are 1: s = 1 for positives, 0 for negatives."""
    sets: dict[tuple[int, bool], list[Rationale]] = {}
    for c in some:
        sets.setdefault((c.place, c.positive), []).append(c)
    picked, shares, left_out = [], [], 0.0
    for (_, positive), members in sets.items():
        how = config.positive if positive else config.negative
        if how != "mean" and len(members) > 1:
            members = [(min if how == "min" else max)(members, key=lambda c: c.loss)]
        for c in members:
            if not positive and c.loss >= config.delta:
                left_out += 1 / len(members)
            else:
                picked.append(c), shares.append(1 / len(members))
    is_positive = torch.tensor([c.positive for c in picked], dtype=torch.bool, device=student.device)
    scores = d.quality(student, picked) if d else is_positive.float()
    return Picks(picked, torch.tensor(shares, device=student.device), is_positive, scores, left_out)


def contrastive_terms(losses: Tensor, scores: Tensor, share: Tensor, positive: Tensor, beta: float, delta: float) -> Tensor:
    """L_cl = s(x, r⁺) · ℓ_pos - β · (1 - s(x, r⁻)) · ℓ_neg, a row a picked rationale: (P,) terms whose sum over a question's rows is its L_cl.

    ℓ_neg = min(ℓ - δ, 0) [review]. Weights s and 1 - s carry no gradient [ours]. losses, scores, share (P,) float32, positive (P,) bool."""
    weight = torch.where(positive, scores, 1 - scores).detach() * share
    return weight * torch.where(positive, losses, -beta * (losses - delta).clamp(max=0))


def total_loss(predict: Tensor, contrastive: Tensor, discriminator: Tensor | float, alphas: tuple[float, float, float]) -> Tensor:
    """L = α1 · L_predict + α2 · L_cl + α3 · L_D [review]."""
    return alphas[0] * predict + alphas[1] * contrastive + alphas[2] * discriminator


def alphas_of(config: Config, iteration: int) -> tuple[float, float, float]:
    """(α1, α2, α3) of an iteration: 0.5 each, α3 ← 0.9 · α3 after each [review]. Only QCRD has L_D, and fine-tuning L_predict alone."""
    if config.method == "finetune":
        return 1.0, 0.0, 0.0
    return config.alpha_predict, config.alpha_cl, config.alpha_d * config.alpha_d_decay ** (iteration - 1) * (config.method == "qcrd")


@torch.no_grad()
def candidate_losses(student: Student, some: list[Rationale]) -> Tensor:
    """ℓ(x, r) in eval mode without gradient: (len(some),); one encoding serves all rationales of a question."""
    losses, xs = torch.zeros(len(some), device=student.device), {c.place: c.x for c in some}
    student.model.eval()
    for start in range(0, len(xs), 64):
        part = list(xs)[start:start + 64]
        mine = [k for k, c in enumerate(some) if c.place in part]
        with student.amp():
            memory, mask = student.encode(student.inputs(student.explain_prefix, [xs[place] for place in part]))
            for group in by_length([some[k].r for k in mine], 4 * student.tokens):
                at = [mine[i] for i in group]
                y, y_mask = collate([some[k].r for k in at], student.device)
                rows = torch.tensor([part.index(some[k].place) for k in at])
                losses[torch.tensor(at, device=student.device)] = student.model.loss(None, mask, y, y_mask, memory, rows)
    return losses


def backward(student: Student, data: Data, config: Config, batch: list[int], picks: Picks, alphas: tuple, questions: int,
             scale: Callable = lambda loss: loss) -> tuple[Tensor, Tensor]:
    """Add the gradient of the batch's part of α1 · L_predict + α2 · L_cl, every term a sum over questions divided by `questions`, those
    of the global batch. -> ℓ of the labels (B,) and of the picks (P,), float32, detached.

    One encoding of `predict: x` and of `explain: x` serves all targets; targets run in groups of like length whose gradients meet in one
    detached memory, so that the encoder runs backward once and the logits of a whole batch never exist."""
    device, n, picked = student.device, len(batch), picks.rationales
    size = config.micro_batch or (max(1, n) if device.type == "cuda" else 16)
    losses = torch.zeros(n + len(picked), device=device)               # the labels', then the picks'
    for part in (range(start, min(n, start + size)) for start in range(0, n, size)):
        mine = [k for k, c in enumerate(picked) if c.place in part]
        xs = [data.questions[batch[i]] for i in part]
        targets = [data.labels[batch[i]] for i in part] + [picked[k].r for k in mine]
        place = torch.tensor([*part, *(n + k for k in mine)])          # of each target in `losses`
        memory_row = torch.tensor([*range(len(part)), *(len(part) + picked[k].place - part.start for k in mine)])
        with student.amp():
            memory, mask = student.encode(student.inputs(student.predict_prefix, xs) + student.inputs(student.explain_prefix, xs if mine else []))
        leaf = memory.detach().requires_grad_()
        for group in by_length(targets, student.tokens):
            labels = sum(i < len(part) for i in group)
            group.sort(key=lambda i: i >= len(part))                   # labels first
            y, y_mask = collate([targets[i] for i in group], device)
            with student.amp():                                        # around the forward pass alone, as autocast wants it
                loss = student.model.loss(None, mask, y, y_mask, leaf, memory_row[group])
            at = place[group].to(device)
            to = at[labels:] - n
            terms = contrastive_terms(loss[labels:], picks.scores[to], picks.share[to], picks.positive[to], config.beta, config.delta)
            scale(total_loss(loss[:labels].sum(), terms.sum(), 0.0, alphas) / questions).backward()
            losses[at] = loss.detach()
        memory.backward(leaf.grad)
    return losses[:n], losses[n:]


STATS = ["L_predict", "l_pos", "l_neg", "L_cl", "s_pos", "w_neg", "L_D", "zero_neg", "with_pos", "with_neg", "stop"]


def step_stats(labels: Tensor, losses: Tensor, p: Picks, l_d: Tensor, config: Config) -> Tensor:
    """Sums over a batch's questions of what the iteration's line shows: (len(STATS),) on the device, so that nothing waits for it."""
    clamped, pos, neg = (losses - config.delta).clamp(max=0), p.share * p.positive, p.share * ~p.positive
    terms = contrastive_terms(losses, p.scores, p.share, p.positive, config.beta, config.delta)
    sums = [labels.sum(), (pos * losses).sum(), (neg * clamped).sum(), terms.sum(), (pos * p.scores).sum(), (neg * (clamped < 0) * (1 - p.scores)).sum(),
            l_d * len(labels), (neg * (clamped == 0)).sum() + p.left_out, pos.sum(), neg.sum() + p.left_out]
    return torch.stack([s.float() for s in sums] + [torch.full_like(sums[0], float(STOP.is_set()))])


# ------------------------------------------------------------------------------------------------ 9. Training

@dataclass
class State:
    """What training counts; a checkpoint holds it beside weights, optimizers and random state."""
    iteration: int = 0                    # completed iterations
    step: int = 0                         # completed steps of the next one
    best: float = -1.0                    # validation accuracy
    best_iteration: int = 0
    l_d: float = 0.0                      # mean L_D of the iteration's discriminator update
    tokens: int = 0                       # target ids scored or trained on in the iteration
    sums: list = field(default_factory=lambda: [0.0] * len(STATS))


class Trainer:
    """Student, discriminator, their optimizers, and the run folder."""

    def __init__(self, config: Config, student: Student, folder: Path, task: Task, train: Data, valid: Data):
        self.config, self.student, self.folder, self.task, self.train, self.valid = config, student, folder, task, train, valid
        self.state, self.d = State(), None
        self.student_negatives = config.method == "qcrd" and config.negatives      # negatives of a student join the teacher's
        self.from_past = self.student_negatives and config.negative_source == "snapshot"
        self.per_iteration = config.iteration_steps or math.ceil(len(train) / config.batch)
        if config.method == "qcrd" and config.discriminator != "none":
            self.d = Discriminator(student, config)
            self.d_optimizer = torch.optim.AdamW(self.d.parameters(), lr=config.discriminator_lr, weight_decay=0.0, fused=True)
        shared = list(self.d.parameters()) if self.d and not self.d.encoder else []      # then L_D is a term of the student's loss
        self.params = [*student.model.parameters(), *shared]
        self.optimizer = torch.optim.AdamW(self.params, lr=config.lr, weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=student.dtype == torch.float16)
        self.fixed = T5.load(config.negative_model) if self.student_negatives and not self.from_past else None     # --negative-source fixed
        if self.fixed and (Path(config.negative_model) / "spiece.model").read_bytes() != Path(student.vocab).read_bytes():
            raise InputError(f"--negative-model {config.negative_model}: has another vocabulary than --model {config.model}; its ids would mean other words")

    def parts(self) -> dict[str, Any]:
        """What has a state of its own, by its name in checkpoint.pt."""
        return dict(student=self.student.model, optimizer=self.optimizer, scaler=self.scaler) | (
            dict(discriminator=self.d, discriminator_optimizer=self.d_optimizer) if self.d else {})

    def digest(self) -> dict[str, str]:
        return {"training data or teacher samples": self.train.digest(), "validation data": self.valid.digest(),
                "model": json.dumps(dataclasses.asdict(self.student.model.config))}

    def save(self) -> None:
        """checkpoint.pt: everything but the snapshots, which are files of their own, each written once."""
        cuda = torch.cuda.get_rng_state(self.student.device) if self.student.device.type == "cuda" else None
        write_pt(self.folder / "checkpoint.pt", {name: part.state_dict() for name, part in self.parts().items()} | dict(
            state=dataclasses.asdict(self.state), rng=gather([(torch.get_rng_state(), cuda)]), digest=self.digest()))

    def load(self) -> None:
        keep = read_pt(self.folder / "checkpoint.pt", self.student.device)
        different = [name for name, d in self.digest().items() if keep["digest"].get(name) != d]
        if different:
            raise InputError(f"{self.folder}/checkpoint.pt: was made with other {' and other '.join(different)}; start a new run")
        for name, part in self.parts().items():
            if keep[name]:                        # the scaler's is empty but for fp16
                part.load_state_dict(keep[name])
        self.state, (cpu, cuda) = State(**keep["state"]), keep["rng"][min(rank(), len(keep["rng"]) - 1)]
        torch.set_rng_state(cpu.cpu())                                     # for dropout; nothing draws from it before the next step
        if cuda is not None and self.student.device.type == "cuda":
            torch.cuda.set_rng_state(cuda.cpu(), self.student.device)

    def negatives_for(self, iteration: int, questions: list[int]) -> tuple[dict, dict]:
        """Iteration t samples from snapshot t - lag [abstract; 5: review]; none while t - lag < 1: the untrained student never counts [ours]."""
        number = iteration - self.config.lag
        if not self.student_negatives or (self.from_past and number < 1):
            return {}, dict(source="", sampled=0, dropped=0, tokens=0, seconds=0.0)
        model = self.fixed or copy.deepcopy(self.student.model)                    # a snapshot is in memory for the sampling only
        if self.from_past:
            model.load_state_dict(read_pt(self.folder / "snapshots" / f"{number}.pt", "cpu"))
        past = Student(model, self.student.vocab, self.config, self.student.device)
        negatives, counts = sample_negatives(past, self.train, self.config, iteration, questions)
        return negatives, counts | dict(source=f"snapshot {number}" if self.from_past else "fixed student")

    def update_discriminator(self, iteration: int, questions: list[int], negatives: dict, steps: int, alpha_d: float) -> float | None:
        """Pretraining (iteration 0) [review] and online update [abstract] -> mean L_D, None where none is due. With an encoder of its own a
        factor on L_D would cancel in Adam, so α3 / 0.5 scales its learning rate; shared, only the head is pretrained, and L_D joins the
        training steps [ours]."""
        due = self.config.discriminator_every and iteration % self.config.discriminator_every == 0
        if not self.d or (iteration and not (self.d.encoder and due)):
            return None
        return train_discriminator(self.d, self.d_optimizer, self.student, self.train, self.config, iteration, questions, negatives, steps,
                                   self.config.discriminator_lr * alpha_d / 0.5)

    def step(self, batch: list[int], negatives: dict, alphas: tuple, number: int, pending: Tensor) -> Tensor:
        """One optimizer step on the global batch -> its sums of STATS. `pending`: those of the step before, which come to the host together
        with the losses that the picks are made from: one transfer a step. Errors: Stopped, before anything has changed."""
        config, student, train = self.config, self.student, self.train
        mine = batch[rank()::world()]
        some = candidates(train, mine, negatives, config.negatives) if alphas[1] else []
        needed = need_losses(some, config)
        host = torch.cat([candidate_losses(student, needed), pending]).tolist()
        self.account(host[len(needed):], number - 1)
        for c, loss in zip(needed, host):
            c.loss = loss
        picks = pick(some, config, student, self.d)
        self.state.tokens += sum(len(c.r) for c in needed + picks.rationales) + sum(len(train.labels[q]) for q in mine)
        self.optimizer.zero_grad()
        student.model.train()
        labels, rationales = backward(student, train, config, mine, picks, alphas, len(batch), self.scaler.scale)
        l_d = torch.zeros((), device=student.device)
        if self.d and not self.d.encoder:                            # shared: L_D joins the step
            rng = np.random.default_rng(derive_seed(config.seed, "L_D", number, rank()))
            judged, targets = discriminator_batch(train, student, config, rng, mine, negatives, 2 * len(mine))
            if judged:
                l_d = F.binary_cross_entropy_with_logits(self.d.train()(student, judged), targets)
                self.scaler.scale(total_loss(0.0, 0.0, l_d, alphas) * len(mine) / len(batch)).backward()
        stats = step_stats(labels, rationales, picks, l_d.detach(), config)
        if world() > 1:                                              # one all-reduce after the local backward passes
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.params] + [stats])
            dist.all_reduce(flat)
            *grads, stats = flat.split([p.numel() for p in self.params] + [len(STATS)])
            for p, grad in zip(self.params, grads):
                p.grad = grad.view_as(p)
        optimizer_step(self.optimizer, self.scaler, config.lr * (1 - number / (config.iterations * self.per_iteration)))
        return stats

    def account(self, stats: list[float], number: int) -> None:
        """Add up a step's sums. Errors: InputError at the first that is not a number; Stopped where a rank was asked to stop."""
        for name, amount in zip(STATS, stats):
            if not math.isfinite(amount):
                t, k, size = number // self.per_iteration + 1, number % self.per_iteration, self.config.batch
                batch = visits(self.config, len(self.train), t)[k * size:(k + 1) * size]
                raise InputError(f"iteration {t}, step {k + 1}: {name} became {amount} on questions {batch}; try a lower --lr or --precision float32")
        if stats:
            self.state.sums = [a + b for a, b in zip(self.state.sums, stats)]
            if stats[-1]:
                raise Stopped

    def run(self) -> None:
        """Pretraining of the discriminator, then all iterations that are left. Errors: Stopped."""
        config = self.config
        if self.from_past and config.iterations <= config.lag:
            say(f"note: {config.iterations} iterations are too few for negatives of the student's own past, which begin with iteration {config.lag + 1}; "
                "--iteration-steps makes shorter ones")
        if self.d and not (self.state.iteration or self.state.step):
            l_d = self.state.l_d = self.update_discriminator(0, list(range(len(self.train))), {}, config.discriminator_pretrain, 0.5)
            a = discriminator_accuracy(self.d, self.student, self.valid, config)
            seen = ", ".join(f"{part:.0%} of the {name}" for name, part in a.items() if part == part)
            say(f"discriminator: L_D {l_d:.3f} over {config.discriminator_pretrain} pretraining steps; of validation rationales it recognises {seen}")
        while self.state.iteration < config.iterations:
            self.iterate(self.state.iteration + 1)

    def iterate(self, t: int) -> None:
        """One iteration: negatives, discriminator, optimizer steps, validation, snapshot, checkpoint. Errors: Stopped."""
        config, state, times = self.config, self.state, [time.perf_counter()]
        alphas, order = alphas_of(config, t), visits(config, len(self.train), t)
        negatives, counts = self.negatives_for(t, order)
        times.append(time.perf_counter())
        if not state.step:                                           # else resumed in mid-iteration
            state.sums, state.tokens = [0.0] * len(STATS), 0
            l_d = self.update_discriminator(t, order, negatives, config.discriminator_steps, alphas[2])
            state.l_d = state.l_d if l_d is None else l_d
            torch.manual_seed(derive_seed(config.seed, "dropout", t, rank()))
        times.append(time.perf_counter())
        try:
            self.train_on(order, negatives, alphas, t)
            times.append(time.perf_counter())
            accuracy, _ = evaluate(self.student, self.valid, self.task.valid, self.task.kind, "  validation")
        except Stopped:                                              # while it trains on every rank: it came with the sums of all
            self.save()
            raise
        state.iteration, state.step = t, 0
        if accuracy > state.best:
            state.best, state.best_iteration = accuracy, t
            save_student(self.student, self.d, self.folder / "student")
        if self.from_past:
            write_pt(self.folder / "snapshots" / f"{t}.pt", self.student.model.state_dict())
        if not rank():
            m = self.metrics(t, order, negatives, counts, alphas) | dict(valid_accuracy=accuracy)
            times.append(time.perf_counter())
            stages = ("negatives", "discriminator", "steps", "rest", "all")
            self.report(m | dict(seconds=dict(zip(stages, [*np.diff(times).tolist(), times[-1] - times[0]]))))
        self.save()                                                  # after the line: a killed run may have one too many, never one too few
        for path in (self.folder / "snapshots").glob("*.pt") if not rank() else ():
            if int(path.stem) <= t - config.lag:                     # no later iteration needs it
                path.unlink()
        gather([])                                                   # the next iteration may read what rank 0 has written

    def train_on(self, order: list[int], negatives: dict, alphas: tuple, t: int) -> None:
        """The optimizer steps of an iteration that are left. Errors: Stopped, between two steps."""
        state, first, start = self.state, self.state.step, time.perf_counter()
        pending, size, before = torch.zeros(0, device=self.student.device), self.config.batch, (t - 1) * self.per_iteration
        for k in shown(f"  iteration {t}/{self.config.iterations}", range(first, self.per_iteration), stops=False):
            pending = self.step(order[k * size:(k + 1) * size], negatives, alphas, before + k, pending)
            state.step = k + 1
            if t == 1 and k == 2:
                self.foretell((time.perf_counter() - start) / (k + 1 - first))
        self.account(pending.tolist(), before + self.per_iteration - 1)

    def foretell(self, seconds: float) -> None:
        steps = self.config.iterations * self.per_iteration
        if seconds * steps > 600:
            say(f"this will take long: {steps} steps at {seconds:.1f} s are about {datetime.timedelta(seconds=round(seconds * steps))}, negatives and "
                "validation not counted; cheaper: --iterations, --fraction, --model t5-small, --device cuda")

    def metrics(self, t: int, order: list[int], negatives: dict, counts: dict, alphas: tuple) -> dict:
        """The iteration's line of metrics.jsonl: means over questions of every loss term and weight, and what the discriminator makes of each set."""
        n, s, some = len(order), dict(zip(STATS, self.state.sums)), sorted(set(order))[:256]
        terms = dict(L_predict=s["L_predict"] / n, L_cl=s["L_cl"] / n, L_D=self.state.l_d if self.d and self.d.encoder else s["L_D"] / n)
        m = dict(iteration=t, loss=total_loss(*terms.values(), alphas), **terms, alphas=alphas)
        m |= {name: s[name] / max(1, s[of]) for name, of in (("l_pos", "with_pos"), ("l_neg", "with_neg"), ("s_pos", "with_pos"), ("zero_neg", "with_neg"))}
        m |= dict(w_neg=s["w_neg"] / max(1, s["with_neg"] - s["zero_neg"]), tokens=self.state.tokens, negatives=counts, scores={})
        sets: dict[str, list] = dict(positives=[], teacher=[], student=[])
        for c in candidates(self.train, some, negatives):
            sets["positives" if c.positive else "student" if c.student else "teacher"].append(c)
        m["a_question"] = {name: len(members) / len(some) for name, members in sets.items()}
        if self.d:
            m["discriminator"] = discriminator_accuracy(self.d, self.student, self.valid, self.config)
            for name in filter(sets.get, sets):
                x = self.d.quality(self.student, sets[name][:256]).cpu()
                m["scores"][name] = dict(mean=x.mean().item(), histogram=torch.histc(x, 10, 0, 1).tolist())
        if self.scaler.is_enabled():
            m["fp16_skipped"] = self.per_iteration * t - int(max((v["step"] for v in self.optimizer.state.values()), default=0))
        return m

    def report(self, m: dict) -> None:
        """The iteration's line on the terminal and in metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(rounded(m)) + "\n")
        a, c, n = m["alphas"], m["negatives"], m["a_question"]
        line = f"iteration {m['iteration']}/{self.config.iterations}  loss {m['loss']:.3f} = {a[0]:g}·predict {m['L_predict']:.3f}"
        if a[1]:
            line += f" + {a[1]:g}·contrastive {m['L_cl']:.3f} (pos {m['l_pos']:.2f}, neg {m['l_neg']:.2f}, {m['zero_neg']:.0%} beyond δ)"
        if self.d:
            line += f" + {a[2]:.3f}·discriminator {m['L_D']:.3f} (s⁺ {m['s_pos']:.2f}, 1-s⁻ {m['w_neg']:.2f})"
        if self.student_negatives:
            line += f"  negatives a question: teacher {n['teacher']:.2f}, " + (
                f"{c['source']} {n['student']:.2f} ({c['tokens']} tokens in {c['seconds']:.1f} s)" if c["source"] else "student none yet")
        say(f"{line}  valid {m['valid_accuracy']:.1%}{' (best)' * (self.state.best_iteration == m['iteration'])}  {m['seconds']['all']:.1f} s")


def rounded(x: Any) -> Any:
    """Floats to six digits, and null for NaN, which JSON has not."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    return (float(f"{x:.6g}") if math.isfinite(x) else None) if isinstance(x, float) else x


def write_pt(path: Path, values: dict) -> None:
    """Rank 0 writes, whole or not at all."""
    if not rank():
        with atomic(path) as temporary, open(temporary, "wb") as f:   # a file object, since torch.save writes a path's name into the file
            torch.save(values, f)


def read_pt(path: Path, device: torch.device | str) -> dict:
    """A dictionary of tensors and plain values, never code. Errors: InputError for a broken file."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: not there") from None
    except Exception as e:                                           # torch raises many kinds for a broken file
        raise InputError(f"{path}: cannot be read ({type(e).__name__}: broken or cut off); start a new run") from None


def write_text(path: Path, text: str) -> None:
    """Rank 0 writes, whole or not at all."""
    if not rank():
        with atomic(path) as temporary:
            temporary.write_text(text, "utf-8")


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False))


def json_line(values: dict) -> str:
    return json.dumps(rounded(values), ensure_ascii=False)


def save_student(student: Student, d: Discriminator | None, folder: Path) -> None:
    if not rank():
        student.model.save(folder, vocab=student.vocab)
        if d:
            write_pt(folder / "discriminator.pt", d.state_dict())


def evaluate(student: Student, data: Data, split: Split, kind: str, title: str) -> tuple[float, list[dict]]:
    """Greedy labels for all questions -> (accuracy, a row a question: input, gold, answer, right)."""
    answers = student.read(student.write(student.predict_prefix, list(data.questions), student.answer_tokens, 0.0, (), title))
    rows = [dict(input=x, gold=gold, answer=a, right=is_right(a, gold, kind)) for x, gold, a in zip(*split, answers)]
    return sum(row["right"] for row in rows) / len(rows), rows


def interval(accuracy: float, n: int) -> str:
    """An accuracy on n questions with Wilson's 95 % interval."""
    z = 1.96
    middle, half = accuracy + z * z / (2 * n), z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return f"{accuracy:.1%} on {n} questions (95 % interval {low:.1%} to {high:.1%})"


def load_student(folder: Path | str, config: Config, device: torch.device) -> Student:
    folder = Path(folder)
    if not (folder / "model.pt").exists():
        hint = (f"python fetch_data.py --from-hf {folder} converts it" if (folder / "config.json").exists()
                else "--model takes demo, t5-small, t5-base, or a folder as in weights/")
        raise InputError(f"{folder}: no weights (model.pt) there; {hint}")
    return Student(T5.load(folder), folder / "spiece.model", config, device)


def load_trained(run: Path, **changes: Any) -> tuple[Config, dict, Student, Discriminator | None]:
    """The best student of a run, with its discriminator; `changes`: other settings than the run's."""
    config, saved = read_config(run, **changes)
    student, d, file = load_student(run / "student", config, pick_device(config)), None, run / "student" / "discriminator.pt"
    student.answer_tokens = saved["answer_tokens"]
    if file.exists():
        d = Discriminator(student, config)
        d.load_state_dict(read_pt(file, student.device))
    return config, saved, student, d


def read_config(run: Path, **changes: Any) -> tuple[Config, dict]:
    try:
        saved = json.loads((run / "config.json").read_text("utf-8"))
        return Config(**saved["config"] | changes), saved
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{run}/config.json: no run there ({type(e).__name__}); runs are folders like runs/demo-qcrd-0") from None


def pick_device(config: Config) -> torch.device:
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")               # TF32 for what autocast leaves in float32
        elif device.type != "cpu":
            raise RuntimeError
        return device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {config.device}: not a device of this machine; cpu or cuda") from None


def prepare(config: Config, ask: bool = True) -> tuple[Student, Task, Data, Data, list[list]]:
    """Everything before training: task, student, the teacher's samples, the vote, token ids -> and the training questions' slots.

    ask False: the samples that are on disk and no others, for a run that has begun."""
    device, task, slots = pick_device(config), load_task(config), []
    config.model = config.model or ("demo" if config.task == "demo" else "t5-base" if device.type == "cuda" else "t5-small")
    if config.stage != "teacher":                                    # before anything is paid for: a missing folder says so at once
        folder = fetch_data.HERE / "weights" / "demo" if config.model == "demo" else config.model
        student = load_student(fetch_data.ensure(config.model) if config.model in ("t5-small", "t5-base") else folder, config, device)
    voted, voted_valid = None, None
    if config.method != "finetune" or config.labels == "teacher" or config.stage == "teacher":
        slots, slots_valid = collect(task, config, ask)
        voted = vote(task, config, task.train, slots, "training questions")
        voted_valid = vote(task, config, task.valid, slots_valid, "validation questions") if slots_valid else None
        if config.stage == "teacher":
            raise Done("the teacher's samples are there; the same command without --stage teacher trains on them")
        if config.labels == "teacher":
            keep = [i for i, v in enumerate(voted) if v.answer]
            say(f"labels: the teacher's; {len(voted) - len(keep)} questions without an answer are left out")
            taught = Split([task.train.inputs[i] for i in keep], [voted[i].answer for i in keep])
            task = task._replace(train=taught, **dict(valid=taught, test=taught) if config.overfit else {})
            voted, slots = [voted[i] for i in keep], [slots[i] for i in keep]
            if not keep:
                raise InputError("--labels teacher: no training question has an answer that can be read; see --show-prompt")
    train = Data(student, task.train, voted)
    student.answer_tokens = min(config.rationale_tokens, 8 + 2 * max(map(len, train.labels)))
    return student, task, train, train if config.overfit else Data(student, task.valid, voted_valid), slots


def new_folder(config: Config) -> Path:
    """A name for the run's folder. Errors: InputError where --run names one that exists."""
    if config.run:
        folder = Path(config.run) if os.sep in config.run else Path("runs") / config.run
        if folder.exists():
            raise InputError(f"--run {config.run}: {folder} exists; take another name, or go on with --resume {folder}")
        return folder
    base = f"{Path(config.task).resolve().name if config.task not in KINDS else config.task}-{config.method}-{config.seed}"
    return next(f for k in range(1, 10**6) if not (f := Path("runs") / (base + (f"-{k}" if k > 1 else ""))).exists())


def train(config: Config, folder: Path | None = None) -> Path:
    """A whole run, new or (folder given) resumed -> its folder."""
    resumed, folder = folder is not None, folder or (Path() if rank() else new_folder(config))
    student, task, data, valid, _ = prepare(config, ask=not resumed)
    if not rank():
        (folder / "snapshots").mkdir(parents=True, exist_ok=resumed)
        for path in [*folder.glob("*.tmp"), *folder.glob("*/*.tmp")]:    # of a killed run
            path.unlink()
    folder = Path(gather([str(folder)])[0])
    trainer = Trainer(config, student, folder, task, data, valid)
    config.iterations = config.iterations or math.ceil(config.steps / trainer.per_iteration)
    if resumed and (folder / "checkpoint.pt").exists():
        trainer.load()
    log = folder / "metrics.jsonl"                                   # iterations after the checkpoint will be done again: their lines go
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    write_text(log, "".join(line + "\n" for line in lines[:trainer.state.iteration]))
    write_json(folder / "config.json", dict(config=dataclasses.asdict(config), kind=task.kind, answer_tokens=student.answer_tokens))
    say(f"student: {config.model}, {sum(p.numel() for p in student.model.parameters()) / 1e6:.1f}M parameters, {str(student.dtype)[6:]} on "
        f"{student.device}; {len(data)} questions, {config.iterations} iterations of {trainer.per_iteration} steps of {config.batch}"
        + (f", going on after iteration {trainer.state.iteration}" if resumed else "") + f"; run folder {folder}")
    ends_at_once = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def finish_the_step(number: int, _: object) -> None:
        STOP.set()
        signal.signal(number, ends_at_once[number])
        print("\nfinishing what is under way, then writing; once more stops at once", file=sys.stderr)
    for number in ends_at_once:
        signal.signal(number, finish_the_step)
    trainer.run()
    for number, handler in ends_at_once.items():
        signal.signal(number, handler)
    gather([])                                                       # rank 0 has written student/
    test(folder, trainer.state, task)
    return folder


def test(folder: Path, state: State, task: Task) -> None:
    """The best student on the test questions, once -> predictions.jsonl and result.json."""
    config, _, student, d = load_trained(folder)
    data = Data(student, task.test)
    accuracy, rows = evaluate(student, data, task.test, task.kind, "  test")
    rationales, scores = explain(student, d, data) if config.method != "finetune" else ([""] * len(data), [math.nan] * len(data))
    write_text(folder / "predictions.jsonl", "".join(
        json_line(row | dict(rationale=r, quality=s)) + "\n" for row, r, s in zip(rows, rationales, scores)))
    write_json(folder / "result.json", dict(test_accuracy=accuracy, questions=len(rows), valid_accuracy=state.best, best_iteration=state.best_iteration))
    say(f"test accuracy {interval(accuracy, len(rows))}, student of iteration {state.best_iteration}, best on validation\nrun folder: {folder}\n"
        f"  python qcrd.py --ask {folder} \"a question\"    python qcrd.py --audit {folder} 1    python qcrd.py --export {folder} out/")


# ------------------------------------------------------------------------------------------------ 10. Using a trained student


def explain(student: Student, d: Discriminator | None, data: Data) -> tuple[list[str], list[float]]:
    """The student's greedy rationale for each question, and its quality s(x, r) (NaN without a discriminator)."""
    questions = list(data.questions)
    rows = student.write(student.explain_prefix, questions, student.config.rationale_tokens, 0.0, (), "  rationales")
    return student.read(rows), d.quality(student, list(map(Rationale, questions, rows))).tolist() if d else [math.nan] * len(rows)


def audit(run: Path, count: int, as_json: bool, **changes: Any) -> None:
    """`count` training questions as the next iteration would use them, dropout off, by the functions that train."""
    config, _ = read_config(run, **changes)
    with contextlib.redirect_stdout(sys.stderr):                     # stdout is for the audit alone
        student, task, data, valid, slots = prepare(config, ask=False)
    trainer = Trainer(config, student, run, task, data, valid)
    trainer.load()
    t, d, out = trainer.state.iteration + 1, trainer.d, []
    alphas, order = alphas_of(config, t), visits(config, len(data), t)[:count]
    negatives, counts = trainer.negatives_for(t, order)
    student.model.eval()
    for q in order:
        some = candidates(data, [q], negatives, config.negatives) if alphas[1] else []
        for c, loss in zip(some, candidate_losses(student, some).tolist()):
            c.loss = loss
        picks = pick(some, config, student, d)
        scores = d.quality(student, some).tolist() if d else [float(c.positive) for c in some]
        weights = [s if c.positive else 1 - s for c, s in zip(some, scores)]
        labels, rationales = backward(student, data, config, [q], picks, alphas, 1)
        cl = contrastive_terms(rationales, picks.scores, picks.share, picks.positive, config.beta, config.delta).sum().item()
        sizes, l_d = collections.Counter(c.positive for c in some), 0.0
        if d and len(sizes) == 2:                                    # on the question's own rationales, each class with half the weight
            l_d = sum(-math.log(max(w, 1e-12)) / sizes[c.positive] / 2 for c, w in zip(some, weights))
        for c, loss in zip(picks.rationales, rationales.tolist()):
            c.loss = loss                                            # to the last digit what the sum is made of
        read = read_slots(task, task.train.inputs[q], slots[q]) if slots else []
        keys = [answer_key(answer, task.kind) for _, answer in read]
        best = majority(keys)[0]
        share = dict(zip(picks.rationales, picks.share.tolist()))
        out.append(dict(
            question=task.train.inputs[q], label=task.train.labels[q], iteration=t, majority=best,
            teacher=[dict(slot=k, answer=answer, value=key, vote="none" if key is None else "positive" if key == best else "negative", rationale=rationale)
                     for k, ((rationale, answer), key) in enumerate(zip(read, keys))],
            candidates=[dict(set="positive" if c.positive else "negative", source="student" if c.student else "teacher", loss=c.loss, score=s, weight=w,
                             picked=c in share, share=share.get(c, 0.0), rationale=student.read([c.r])[0]) for c, s, w in zip(some, scores, weights)],
            negatives_from=counts["source"], positive=config.positive, negative=config.negative, delta=config.delta, beta=config.beta,
            alphas=alphas, L_predict=labels.item(), L_cl=cl, L_D=l_d, total=total_loss(labels.item(), cl, l_d, alphas)))
    if as_json:
        return print(json.dumps(out, ensure_ascii=False, indent=1))
    print(f"{run}: the weights after {t - 1} iterations and {trainer.state.step} steps in iteration {t}, with student negatives drawn afresh for these questions;\n"
          "dropout is off and L_D is that of the question's own rationales: the formula on a checkpoint, no logged step")
    for item in out:
        audit_text(item)


def audit_text(a: dict) -> None:
    """One audited question, and its sum done out loud."""
    print(f"\nquestion: {a['question']}\nlabel: {a['label']}    majority of the teacher: {a['majority']}")
    for s in a["teacher"]:
        print(f"  slot {s['slot']}: answer {s['answer']} = {s['value']}, {s['vote']}: {s['rationale']!r}")
    total = []
    for name in ("positive", "negative"):
        print(f"S_{name[:3]}: the {a[name]} counts" + (f"; the student's own is from {a['negatives_from']}" if name == "negative" and a["negatives_from"] else ""))
        members = [r for r in a["candidates"] if r["set"] == name]
        for r in sorted(members, key=lambda r: r["loss"] * (-1 if a[name] == "max" else 1)):
            beyond = f", min(ℓ - δ, 0) = {min(r['loss'] - a['delta'], 0):.6f}" if name == "negative" else ""
            print(f"  {'->' if r['picked'] else '  '} ℓ {r['loss']:.6f}{beyond}  s {r['score']:.6f}  {r['source']}: {r['rationale']!r}")
            if r["picked"] and name == "positive":
                total.append(f"{r['share']:g} · {r['score']:.6f} · {r['loss']:.6f}")
            elif r["picked"]:
                total.append(f"- {r['share']:g} · {a['beta']:g} · (1 - {r['score']:.6f}) · {min(r['loss'] - a['delta'], 0):.6f}")
        if name == "negative" and members and not any(r["picked"] for r in members):
            print("  what counts is beyond δ: the negative term is 0")
    one, two, three = a["alphas"]
    print(f"L_cl = {' '.join(total) or 0} = {a['L_cl']:.6f}\nL = {one:g} · L_predict {a['L_predict']:.6f} + {two:g} · L_cl {a['L_cl']:.6f} "
          f"+ {three:.6f} · L_D {a['L_D']:.6f} = {a['total']:.6f}")


def ask_student(run: Path, questions: list[str], as_json: bool, **changes: Any) -> None:
    """Label, rationale and quality of each question."""
    config, _, student, d = load_trained(run, **changes)
    data = Data(student, Split(questions, [""] * len(questions)))
    labels = student.read(student.write(student.predict_prefix, list(data.questions), student.answer_tokens, 0.0, (), "  labels"))
    for x, label, rationale, quality in zip(questions, labels, *explain(student, d, data)):
        v = value(label)
        print(json_line(dict(input=x, label=label, rationale=rationale, quality=quality)) if as_json else
              f"label:     {label}{'' if v is None else f' = {v:g}'}\nrationale: {rationale}\nquality:   {quality:.3f}")


def evaluate_run(run: Path, file: str, **changes: Any) -> None:
    """Accuracy with its interval on a JSONL file, the task's test questions without one; predictions on stdout."""
    config, saved, student, _ = load_trained(run, **changes)
    with contextlib.redirect_stdout(sys.stderr):                     # stdout is for the predictions alone
        split = read_split(Path(file), saved["kind"]) if file else load_task(config).test
    accuracy, rows = evaluate(student, Data(student, split), split, saved["kind"], "  evaluate")
    print(*map(json_line, rows), sep="\n")
    print(f"accuracy {interval(accuracy, len(rows))}", file=sys.stderr)


def export(run: Path, folder: Path) -> None:
    """A Hugging Face folder with a model card."""
    config, _, student, _ = load_trained(run)
    require(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())), f"--export {folder}: is there already; name a new folder")
    student.model.save_hf(folder, vocab=student.vocab)
    result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else {}
    palm, taught = config.teacher == "palm", config.method != "finetune" or config.labels == "teacher"
    teacher = (f"{config.teacher_model or config.teacher or 'the demo'}" + ("" if palm else f", {config.samples} samples a question at temperature "
               f"{config.teacher_temperature}")) if taught else "none"
    facts = dict(task=config.task, labels=config.labels, method=config.method, started_from=config.model, seed=config.seed, iterations=config.iterations,
                 teacher=teacher, **result)
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: text2text-generation\ntags: [t5, qcrd, rationale-distillation]\n---\n"
        f"# {config.task}, distilled with {config.method}\n\nA T5 trained with the reference implementation of QCRD (arXiv 2405.13014): "
        "`predict: ` and a question give the label" + (", `explain: ` and a question a rationale" if config.method != "finetune" else "") + ".\n\n| | |\n|---|---|\n"
        + "".join(f"| {name.replace('_', ' ')} | {fact} |\n" for name, fact in facts.items()), "utf-8")
    print(f"{folder}: a Hugging Face folder; in Python: transformers.AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r})")


# ------------------------------------------------------------------------------------------------ Command line


def parser() -> argparse.ArgumentParser:
    """One flag for each field of Config, in groups in the order of the paper, and the verbs that use a run."""
    own = "".join(f"With --{of} {name}, other defaults: {', '.join(f'{flag(k)} {v}' for k, v in values.items())}.\n"
                  for of, table in (("task", TASK_DEFAULTS), ("model", MODEL_DEFAULTS)) for name, values in table.items())
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, usage="python qcrd.py [--task TASK] [flags]",
                                argument_default=argparse.SUPPRESS,      # what was not given is not there: `main` has the defaults
                                epilog=own + "Environment: OPENAI_API_KEY, OPENAI_BASE_URL (teacher), QCRD_MIRROR (a folder or URL instead of https://).")
    use = p.add_argument_group("Use a run (a folder under runs/)")
    use.add_argument("--resume", metavar="RUN", help="go on after a crash or Ctrl-C; on a CPU bit for bit what it would have been")
    use.add_argument("--ask", nargs="+", metavar=("RUN", "QUESTION"), help="label, rationale and quality; without a question: one a line from stdin, JSONL out")
    use.add_argument("--audit", nargs=2, metavar=("RUN", "N"), help="N questions with every sample, score, loss, pick and weight, and the sum done out loud")
    use.add_argument("--eval", nargs="+", metavar=("RUN", "FILE"), help="accuracy on a JSONL file (default: the task's test questions), predictions on stdout")
    use.add_argument("--export", nargs=2, metavar=("RUN", "FOLDER"), help="write a Hugging Face folder")
    use.add_argument("--json", action="store_true", help="with --audit and --ask: data instead of text")
    use.add_argument("--show-prompt", action="store_true", help="print what the teacher would be asked for the first training question")
    group = p
    for f in dataclasses.fields(Config):
        group = p.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        kind, choices, default = type(f.default), f.metadata["choices"], f"default: {f.default}; " if f.default != "" else ""
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(
            type=kind, choices=choices, metavar=None if choices else kind.__name__.upper())
        group.add_argument(flag(f.name), help=f"{f.metadata['help']} ({default}{f.metadata['mark']})", **how)
        if f.name == "discriminator":
            group.add_argument("--no-discriminator", dest=f.name, action="store_const", const="none", help="--discriminator none")
    return p


def check(config: Config) -> Config:
    """Errors: InputError for a number that makes no sense, naming its flag."""
    above = ("samples", "batch", "lr", "steps", "concurrency", "fraction", "input_tokens", "rationale_tokens", "lag", "teacher_tokens", "student_samples")
    for name, v in vars(config).items():
        least = "above" if name in above else "at least"
        if isinstance(v, (int, float)):
            require(0 <= v < math.inf and (v > 0 or least != "above"), f"{flag(name)} {v}: must be {least} 0")
        require(name not in ("fraction", "corrupt", "discriminator_noise") or v <= 1, f"{flag(name)} {v}: is a part of a whole, at most 1")
    require(config.negative_source != "fixed" or (Path(config.negative_model) / "model.pt").exists(),
            "--negative-source fixed: name the fixed student's folder with --negative-model (a run's student/)")
    student_temperature(config, 1)
    return config


def main() -> None:
    args = vars(parser().parse_args())
    verbs = ("ask", "audit", "eval", "export")
    use = {name: args.pop(name, None) for name in (*verbs, "resume", "json", "show_prompt")}
    verb = next((name for name in verbs if use[name]), None)
    if verb:
        run, *rest = use[verb]
        unused = ", ".join(map(flag, sorted(set(args) - {"device", "precision", "micro_batch"})))
        several = [f"--{name}" for name in (*verbs, "resume") if use[name]]
        require(len(several) == 1, f"{' and '.join(several)} are commands of their own; give one at a time")
        check(Config(**args))
        require(not unused, f"--{verb} takes its settings from the run: {unused} has no effect on it")
    if verb == "ask":
        questions = rest or [line.strip() for line in sys.stdin if line.strip()]
        require(questions, "--ask: no question; put it after the run's folder, or one a line on standard input")
        ask_student(Path(run), questions, use["json"] or not rest, **args)
    elif verb == "audit":
        require(rest[0].isdecimal(), f"--audit RUN N: N is {rest[0]!r}, must be a number of questions")
        audit(Path(run), int(rest[0]), use["json"], **args)
    elif verb == "eval":
        evaluate_run(Path(run), rest[0] if rest else "", **args)
    elif verb == "export":
        export(Path(run), Path(rest[0]))
    elif use["resume"]:
        config, _ = read_config(Path(use["resume"]))
        other = [f"{flag(k)} {getattr(config, k)}, not {v}" for k, v in args.items() if v != getattr(config, k) and k not in FREE_ON_RESUME]
        require(not other, f"--resume {use['resume']}: was started with {'; '.join(other)}; only "
                           f"{', '.join(map(flag, FREE_ON_RESUME))} may change")
        train(check(dataclasses.replace(config, **args)), Path(use["resume"]))
    else:
        task = args.get("task", Config.task)
        model = args.get("model") or ("demo" if task == "demo" else "")
        asked = {"iterations": 0} | args if "steps" in args else args                  # --steps counts where a task's default is in iterations
        config = check(Config(**MODEL_DEFAULTS.get(model, {}) | TASK_DEFAULTS.get(task, {}) | asked))
        if use["show_prompt"]:
            loaded = load_task(config)
            print(prompt_for(loaded, loaded.train.inputs[0], read_prompt(config))[0]["content"])
        else:
            train(config)


def run_main() -> int:
    """-> exit code: 0; 2 after one line for a mistake of the user's; 130 when stopped. A bug keeps its traceback."""
    try:
        if "LOCAL_RANK" in os.environ:                               # started by torchrun
            dist.init_process_group(timeout=datetime.timedelta(hours=12))      # gloo for what is on the CPU, nccl on CUDA
        main()
        return 0
    except InputError as e:
        line, code = f"error: {e}", 2
    except torch.OutOfMemoryError:
        line, code = "error: out of GPU memory; a smaller --micro-batch needs less and computes the same", 2
    except RuntimeError as e:
        if world() == 1 or not re.search(r"onnection (closed|reset)|onnect(ed|ing) |timed out|peer", str(e)):
            raise
        line, code = "another rank ended; its own message says why, and --resume goes on from the last checkpoint", 1
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        line, code = f"error: {e.filename or 'writing'}: {e.strerror}; what was finished is kept, --resume goes on from there", 2
    except Done as e:
        say(str(e))
        return 0
    except Stopped:
        line, code = "stopped; --resume and the run's folder go on from what is written", 130
    except KeyboardInterrupt:
        line, code = "stopped", 130
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(run_main())
