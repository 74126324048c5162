"""All tests of this project, and its benchmark, with no network and nothing but the four packages.

    python test_qcrd.py              every test; ends with the line `N passed, N failed`
    python test_qcrd.py vote loss    the tests whose names contain one of these words
    python test_qcrd.py bench        speed and memory, no pass or fail
"""
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import requests
import torch

import fetch_data
import qcrd
import t5

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"            # real data for more tests, where it is there


class Skip(Exception):
    """Raised by a test that cannot run here; its text says what is missing."""


# ---------------------------------------------------------------- t5.py

# ---------------------------------------------------------------- fetch_data.py


@contextlib.contextmanager
def data_home(mirror: str | Path = "/nowhere"):
    """A fresh QCRD_HOME, with a mirror in place of the internet."""
    before = {name: os.environ.get(name) for name in ("QCRD_HOME", "QCRD_MIRROR")}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(QCRD_HOME=folder, QCRD_MIRROR=str(mirror))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def file_server(content: bytes, cut: int = 0, ranges: bool = True, headers: dict | None = None, status: list[int] | None = None):
    """Serve `content` at every path; cut: so many bytes an answer, then the line drops; status: codes to answer first."""
    class Stub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.headers.get("Range"))
            if status:
                self.send_response(status.pop(0))
                self.send_header("Content-Length", "0")
                return self.end_headers()
            start = int(self.headers["Range"][6:-1]) if ranges and "Range" in self.headers else 0
            if start > len(content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if ranges else 200)
            if ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[start:start + cut] if cut else content[start:])
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


@contextlib.contextmanager
def source(content: bytes, pin: str | None = None):
    """SOURCES with one small file "x" in it, pinned to `content`."""
    fetch_data.SOURCES["x"] = ("https://files.example/a/x", pin or "sha256:" + hashlib.sha256(content).hexdigest())
    try:
        yield
    finally:
        del fetch_data.SOURCES["x"]


def refused(f, *args, **kwargs) -> str:
    """The one line of the InputError that f(*args) must raise."""
    try:
        f(*args, **kwargs)
    except t5.InputError as why:
        assert "\n" not in str(why), why
        return str(why)
    raise AssertionError(f"{f.__name__}{args} was not refused")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_download_resumes_what_was_cut():
    content = os.urandom(300_000)
    with source(content), file_server(content, cut=131_072) as (url, asked), data_home(url) as home:
        assert fetch_data.download("x").read_bytes() == content
        assert asked == ["bytes=0-", "bytes=131072-", "bytes=262144-"], asked
        assert fetch_data.download("x") == home / "data" / "downloads" / "x" and len(asked) == 3     # not fetched again


def test_download_takes_up_the_part_of_an_earlier_run():
    content = os.urandom(5000)
    for ranges, kept in ((True, content[:2000]), (False, content[:2000]), (True, content + b"more"), (True, content[:2000])):
        with source(content), file_server(content, ranges=ranges, status=[503]) as (url, asked), data_home(url) as home:
            part = home / "data" / "downloads" / "x.part"
            part.parent.mkdir(parents=True)
            part.write_bytes(kept)
            assert fetch_data.download("x").read_bytes() == content
            assert asked[:2] == [f"bytes={len(kept)}-"] * 2 and not part.exists()      # a 503 costs nothing of the part


def test_download_refuses_a_wrong_digest():
    content = b"what the server has"
    with source(b"what is pinned"), file_server(content) as (url, _), data_home(url) as home:
        text = refused(fetch_data.download, "x")
        assert hashlib.sha256(content).hexdigest() in text and hashlib.sha256(b"what is pinned").hexdigest() in text, text
        assert [p.name for p in (home / "data" / "downloads").iterdir()] == ["x.lock"]      # neither used nor resumed
        mine = home / "data" / "downloads" / "x"
        mine.write_bytes(b"a file of the user's")
        assert "move this file away" in refused(fetch_data.download, "x") and mine.read_bytes() == b"a file of the user's"
    with source(content, f"size:{len(content)}"), file_server(content, headers={"X-Linked-ETag": f'"{"0" * 64}"'}) as (url, _), data_home(url):
        assert "expected sha256 " + "0" * 64 in refused(fetch_data.download, "x")
    good = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
    with source(content, f"size:{len(content)}"), file_server(content, headers=good) as (url, _), data_home(url):
        assert fetch_data.download("x").read_bytes() == content
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    with source(content, "blob:" + blob), file_server(content) as (url, _), data_home(url):
        assert fetch_data.download("x").read_bytes() == content


def test_download_without_a_connection_names_the_remedy():
    with source(b""), data_home("http://127.0.0.1:9"):
        text = refused(fetch_data.download, "x")
        assert "cannot fetch http://127.0.0.1:9/files.example/a/x" in text and "QCRD_MIRROR" in text, text
    with source(b""), file_server(b"", status=[404]) as (url, asked), data_home(url):
        assert "HTTP 404" in refused(fetch_data.download, "x") and len(asked) == 1
    with source(b""), data_home("/nowhere"):
        assert "/nowhere/files.example/a/x: no such file in the mirror" in refused(fetch_data.download, "x")


def test_download_by_several_processes_at_once():
    content = os.urandom(400_000)
    with source(content), file_server(content, cut=150_000) as (url, asked), data_home(url):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:      # flock keeps file descriptors apart, in threads as in processes
            assert {p.read_bytes() for p in pool.map(fetch_data.download, ["x"] * 4)} == {content}
        assert len(asked) == 3, asked


def test_mirror_folder():
    with tempfile.TemporaryDirectory() as mirror, source(b"content"), data_home(mirror):
        path = Path(mirror, "files.example", "a", "x")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"forged")
        assert "expected sha256" in refused(fetch_data.download, "x") and path.exists()
        path.write_bytes(b"content")
        assert fetch_data.download("x").read_bytes() == b"content"


DEMO_DIGEST = ""                           # of the demo's problems, first characters
ARCHIVE = {
    "datasets/cqa/cqa_train.json": "".join(json.dumps(
        {"id": str(i), "question": f"Which one is {i}?", "choices": [f"{i}", "x", "y", "z", "é"], "answer": f"{i}"}) + "\n" for i in range(20)),
    "datasets/cqa/cqa_test.json": json.dumps({"question": "q", "choices": list("vwxyz"), "answer": "z"}) + "\n",
    "datasets/cqa/llm/train_CoT_0.json": json.dumps([f"Because. So the answer is (a) {i}.\n\nQ:" for i in range(15)]),
    "datasets/cqa/llm/train_CoT_1.json": json.dumps([f"Because. So the answer is (a) {i}.\n\nQ:" for i in range(15, 20)]),
    "datasets/anli1/anli1_valid.json": json.dumps({"premise": "P.", "hypothesis": "H.", "label": 2}) + "\n",
    "datasets/anli1/anli1_test.json": json.dumps({"premise": "P.", "hypothesis": "G.", "label": 0}) + "\n",
    **{f"datasets/esnli/esnli_{split}.json": json.dumps({"premise": f"P {split}.", "hypothesis": "H.", "label": 1}) + "\n"
       for split in ("train", "valid", "test")},
}


def make_archive(folder: Path, **changes: str | bytes | None) -> Path:
    """datasets.zip in `folder`; changes by the member's file name, None leaves it out."""
    with zipfile.ZipFile(folder / "datasets.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in ARCHIVE.items():
            content = changes.get(Path(name).stem, content)
            if content is not None:
                z.writestr(name, content)
    return folder / "datasets.zip"


def test_archive_gives_tasks_in_their_formats():
    with data_home() as home:
        archive = make_archive(home)
        folder = fetch_data.ensure("cqa", archive)
        train, valid, test = (lines_of(folder / f"{split}.jsonl") for split in fetch_data.SPLITS)
        assert folder == home / "data" / "cqa" and (len(train), len(valid), len(test)) == (18, 2, 1)      # the last tenth is held out
        assert train[3] == {"input": "Which one is 3?\nAnswer Choices:\n(a) 3\n(b) x\n(c) y\n(d) z\n(e) é", "label": "3"}
        assert valid[1]["label"] == "19" and test[0]["label"] == "z"
        palm = lines_of(fetch_data.ensure_palm("cqa", archive))
        assert [(r["question"], r["slot"], r["finish"]) for r in palm] == [(r["input"], 0, "stop") for r in train + valid]
        assert palm[15]["text"] == "Because. So the answer is (a) 15.\n\nQ:"
        esnli = [lines_of(fetch_data.ensure("esnli", archive) / f"{split}.jsonl") for split in fetch_data.SPLITS]
        assert esnli[1] == [{"input": "P valid.</s>H.", "label": "neutral"}] and [len(rows) for rows in esnli] == [1, 1, 1]
        assert "train missing" in (text := refused(fetch_data.ensure, "anli1", archive)) and "valid and test went to" in text, text
        assert lines_of(home / "data" / "anli1" / "valid.jsonl") == [{"input": "P.</s>H.", "label": "contradiction"}]
        archive.unlink()
        assert fetch_data.ensure("cqa") == folder and fetch_data.ensure_palm("cqa").name == "teacher-palm.jsonl"      # at once


def test_archive_that_is_broken_names_member_and_line():
    good = ARCHIVE["datasets/cqa/cqa_train.json"].splitlines(keepends=True)
    for change, expected in (
            ({"cqa_train": "".join(good[:4]) + "{oops\n"}, "cqa_train.json line 5"),
            ({"cqa_train": good[0] + json.dumps({"question": "q", "choices": list("abcde")})}, "cqa_train.json line 2: KeyError 'answer'"),
            ({"cqa_train": json.dumps({"question": "q", "choices": list("abcd"), "answer": "a"})}, "line 1"),
            ({"cqa_train": json.dumps({"question": "q", "choices": list("abcde"), "answer": "f"})}, "line 1"),
            ({"cqa_train": json.dumps({"question": 3, "choices": list("abcde"), "answer": "a"})}, "line 1: TypeError"),
            ({"cqa_train": "[1]"}, "line 1"), ({"cqa_train": "[" * 100_000}, "line 1"),
            ({"cqa_train": good[0].encode() + b"\xff\xfe\n"}, "UnicodeDecodeError"),
            ({"cqa_test": None}, "cqa: test missing")):
        with data_home() as home:
            text = refused(fetch_data.ensure, "cqa", make_archive(home, **change))
            assert expected in text and "datasets.zip" in text, text
            assert not (home / "data" / "cqa" / "train.jsonl").exists() or "cqa_test" in change      # whole or not at all
    for change, expected in (({"train_CoT_1": json.dumps(["too few"])}, "differ in number"), ({"train_CoT_1": "[1, 2]"}, "train_CoT_1.json"),
                             ({"train_CoT_1": "{"}, "train_CoT_1.json"), ({"train_CoT_0": None}, "differ in number")):
        with data_home() as home:
            assert expected in refused(fetch_data.ensure_palm, "cqa", make_archive(home, **change))
            assert not list(home.glob("data/cqa/*"))
    with data_home() as home:
        raw = bytearray(make_archive(home).read_bytes())
        at = raw.find(b"datasets/cqa/cqa_train.json") + 40
        raw[at:at + 20] = bytes(20)
        (home / "datasets.zip").write_bytes(raw)
        assert "datasets/cqa/cqa_train.json" in refused(fetch_data.ensure, "cqa", home / "datasets.zip")
        (home / "datasets.zip").write_bytes(raw[:2000])
        assert "zip" in refused(fetch_data.ensure, "cqa", home / "datasets.zip")
        assert "nowhere.zip" in refused(fetch_data.ensure, "cqa", home / "nowhere.zip")
        limit, fetch_data.MEMBER_LIMIT = fetch_data.MEMBER_LIMIT, 1000
        try:
            assert "unpacks to more than" in refused(fetch_data.ensure, "cqa", make_archive(home))
        finally:
            fetch_data.MEMBER_LIMIT = limit


def test_svamp_and_cqa_from_their_real_sources():
    if not (SHARED / "mirror").is_dir() or not (SHARED / "upstream" / "datasets.zip").is_file():
        raise Skip("no copies of SVAMP.json and datasets.zip here")
    with data_home(SHARED / "mirror") as home:
        archive = SHARED / "upstream" / "datasets.zip"
        folder = fetch_data.ensure("svamp")
        splits = {split: (folder / f"{split}.jsonl").read_bytes() for split in fetch_data.SPLITS}
        assert [len(rows.splitlines()) for rows in splits.values()] == [720, 80, 200]
        shutil.rmtree(folder)
        fetch_data.ensure("svamp", archive)          # Distilling Step-by-Step's own files are the same split
        assert splits == {split: (folder / f"{split}.jsonl").read_bytes() for split in fetch_data.SPLITS}
        train, valid, test = (lines_of(folder / f"{split}.jsonl") for split in fetch_data.SPLITS)
        assert train[0] == {"input": "Luke scored 84 points after playing 2 rounds of a trivia game. If he gained the same number of points "
                                     "each round\nHow many points did he score per round?", "label": "( 84.0 / 2.0 )"}
        palm = lines_of(fetch_data.ensure_palm("svamp", archive))
        assert [r["question"] for r in palm] == [r["input"] for r in train + valid] and len(palm) == 800
        assert not {r["question"] for r in palm} & {r["input"] for r in test}
        folder = fetch_data.ensure("cqa", archive)
        assert [len(lines_of(folder / f"{split}.jsonl")) for split in fetch_data.SPLITS] == [8767, 974, 1221]
        assert len(lines_of(fetch_data.ensure_palm("cqa", archive))) == 9741
        assert "train missing" in refused(fetch_data.ensure, "anli1", archive)
        assert len(lines_of(home / "data" / "anli1" / "test.jsonl")) == 1000


def test_demo_splits():
    problems = {split: fetch_data.demo_problems(split) for split in fetch_data.SPLITS}
    assert {split: len(rows) for split, rows in problems.items()} == {"train": 600, "valid": 100, "test": 1000}
    assert len({p.text for rows in problems.values() for p in rows}) == 1700
    digest = hashlib.sha256("".join(p.text + p.label for rows in problems.values() for p in rows).encode()).hexdigest()
    assert digest.startswith(DEMO_DIGEST), digest     # the task is what the README's numbers were measured on
    for p in problems["train"][:200] + problems["test"][:200]:
        numbers = [n for n in re.findall(r"\d+", p.text) if n != str(p.distractor)]
        assert sorted(numbers) == sorted(re.findall(r"\d+", p.label)) and len(set(numbers)) == len(numbers), p
        assert None not in fetch_data.amounts(p.first, p.steps) and p.label == fetch_data.equation(p.first, p.steps)
    def shapes(split: str) -> list[set[str]]:      # each problem's sentences with names, things and numbers blanked
        names = "|".join(fetch_data.PEOPLE + fetch_data.THINGS) + r"|\d+"
        return [set(re.split(r"(?<=[.?])\s", re.sub(rf"\b({names})\b", "_", p.text))) for p in problems[split]]
    known = set().union(*shapes("train"), *shapes("valid"))
    share = sum(not shape <= known for shape in shapes("test")) / 1000
    assert 0.25 <= share <= 0.32, share
    with data_home() as home:
        folder = fetch_data.ensure("demo")
        assert lines_of(folder / "test.jsonl")[7] == {"input": problems["test"][7].text, "label": problems["test"][7].label}
        assert folder == home / "data" / "demo"


def test_demo_pretraining_data_is_apart_from_the_demo():
    texts, pairs = fetch_data.pretraining_data()
    known = {p.text for split in fetch_data.SPLITS for p in fetch_data.demo_problems(split)}
    assert len(texts) > 1000 and not known & set(texts) and not known & {x.removeprefix("predict: ") for x, _ in pairs}
    corpus = "\n".join(texts + [y for _, y in pairs])
    assert "The answer is" not in corpus and "does not matter" not in corpus
    held_out = [kind.tell[-1] for kind in fetch_data.KINDS.values()] + [q[-1] for q in fetch_data.QUESTIONS.values()]
    for sentence in held_out:
        shape = re.sub(r"\\\{\w\\\}", r"[\\w']+", re.escape(sentence))
        assert not re.search(rf"(^|[.\n] ?){shape}", corpus), sentence


def test_demo_student():
    tokenizer = t5.Tokenizer(HERE / "weights" / "demo" / "spiece.model")
    model = t5.T5.load(HERE / "weights" / "demo")
    assert sum(p.numel() for p in model.parameters()) < 2e6
    assert sum(f.stat().st_size for f in (HERE / "weights" / "demo").iterdir()) < 3_000_000
    for n in range(100):
        assert len(tokenizer.encode(f"{n}")) == 2, n
    for text in ("Luke scored 84 points, 12.5% of 1,024 (or ~3)!", "".join(map(chr, range(33, 127))), "( ( 100.0 - 7.0 ) / 365.0 )"):
        assert tokenizer.decode(tokenizer.encode(text)) == text, text


def test_demo_teacher_over_http():
    url, server = fetch_data.demo_teacher()
    try:
        model = requests.get(url + "/models").json()["data"][0]["id"]
        problem, other = fetch_data.demo_problems("train")[:2]

        def ask(content, **fields):
            body = {"model": model, "messages": [{"role": "user", "content": content}], **fields}
            return requests.post(url + "/chat/completions", json=body)

        def texts(r):
            return [c["message"]["content"] for c in r.json()["choices"]]
        prompt = f"Q: {other.text}\nA: so and so. The answer is ( 1 + 1 ).\n\nQ: {problem.text}\nA:"
        at_once = texts(ask(prompt, n=5, seed=40, temperature=0.7))
        assert at_once == [texts(ask(prompt, seed=40 + i, temperature=0.7))[0] for i in range(5)]      # slots one by one are the same
        assert at_once == [fetch_data.teacher_answer(problem, 40 + i, 0.7) for i in range(5)] and len(set(at_once)) > 1
        assert texts(ask(prompt, temperature=0))[0].endswith(f"The answer is {problem.label}.")
        assert texts(ask([{"type": "text", "text": prompt}], n=5, seed=40, temperature=0.7)) == at_once
        r = ask(prompt, max_tokens=6, n=2).json()
        assert [c["finish_reason"] for c in r["choices"]] == ["length"] * 2 and r["usage"]["completion_tokens"] == 12
        assert "The answer is" not in texts(ask("Q: How many stars are there?"))[0]
        for fields, name in (({"n": 200}, "n"), ({"temperature": "hot"}, "temperature"), ({"max_tokens": -1}, "max_tokens"), ({"seed": "x"}, "seed")):
            r = ask(prompt, **fields)
            assert r.status_code == 400 and name in r.json()["error"]["message"]
        for body in (b"{", b"[]", b'{"messages": []}', b'{"messages": [{"content": null}]}', b"[" * 100_000):
            assert requests.post(url + "/chat/completions", data=body).status_code == 400
        assert requests.post(url + "/completions", json={}).status_code == 404 and requests.get(url).status_code == 404
        assert f"port {server.server_port} cannot be used" in refused(fetch_data.demo_teacher, server.server_port)
    finally:
        server.shutdown()
    assert "port 99999 cannot be used" in refused(fetch_data.demo_teacher, 99999)


def test_demo_teacher_errs_as_the_paper_saw():
    problems = fetch_data.demo_problems("train") + fetch_data.demo_problems("valid")

    def amount(text: str) -> float | str:
        equation = re.search(r"The answer is (.*)\.$", text)[1]
        assert re.fullmatch(r"[\d ()*/+-]+", equation), text
        return round(eval(equation), 4)             # our own teacher's text, four operations and numbers
    wrong = positives = unanimous = 0
    for p in problems:
        said = [amount(fetch_data.teacher_answer(p, seed, 0.7)) for seed in range(5)]
        wrong += sum(a != amount(f"The answer is {p.label}.") for a in said)
        most = max(said.count(a) for a in said)
        positives, unanimous = positives + most, unanimous + (most == 5)
        assert amount(fetch_data.teacher_answer(p, None, 0)) == amount(f"The answer is {p.label}.")
    assert 0.2 < wrong / 3500 < 0.3 and 3.7 < positives / 700 < 4.1 and 0.5 < unanimous / 700 < 0.6, (wrong, positives, unanimous)


def command_line(*args: object) -> tuple[int, str]:
    """Exit code and output of fetch_data.py, in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        return fetch_data.main([str(a) for a in args]), err.getvalue() + out.getvalue()


def test_fetch_data_refuses_in_one_line():
    with data_home() as home:
        (home / "empty").mkdir()
        for args, expected in (
                (["nonsense"], "no task (svamp"), (["t5-small"], "no such file in the mirror"), (["svamp"], "no such file in the mirror"),
                (["--from-hf", "nowhere"], "nowhere"), (["--from-hf", home / "empty"], "empty"),
                (["cqa", "--archive", "nowhere.zip"], "nowhere.zip"), (["serve-teacher", "--port", "70000"], "70000"),
                (["--from-hf", home / "empty", "--name", "../x"], "--name")):
            code, text = command_line(*args)
            assert code == 2 and text.startswith("error: ") and text.count("\n") == 1 and expected in text, (args, text)
        r = subprocess.run([sys.executable, HERE / "fetch_data.py", "nonsense"], capture_output=True, text=True, check=False)
        assert r.returncode == 2 and r.stderr.startswith("error: nonsense") and r.stderr.count("\n") == 1 and not r.stdout
        r = subprocess.run([sys.executable, HERE / "fetch_data.py"], capture_output=True, text=True, check=False)
        assert r.returncode == 0 and "QCRD_MIRROR" in r.stdout and "--from-hf" in r.stdout


def test_from_hf_through_the_command_line():
    vocab = HERE / "weights" / "demo" / "spiece.model"
    with data_home() as home:
        torch.manual_seed(0)
        size = t5.Tokenizer(vocab).size + 100
        shape = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
        model = t5.T5(t5.Config(vocab_size=size, **shape))
        model.save_hf(home / "theirs")
        code, text = command_line("--from-hf", home / "theirs")
        assert code == 2 and "--vocab" in text and text.count("\n") == 1, text
        assert command_line("--from-hf", home / "theirs", "--name", "mine", "--vocab", vocab) == (0, f"{home / 'weights' / 'mine'}\n")
        loaded = t5.T5.load(home / "weights" / "mine").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
        t5.T5(t5.Config(vocab_size=50, **shape)).save_hf(home / "small")
        code, text = command_line("--from-hf", home / "small", "--vocab", vocab)
        assert code == 2 and "50 embeddings" in text and text.count("\n") == 1, text
        weights = next(p for p in (home / "theirs").iterdir() if p.name != "config.json")
        for name, content in ((weights.name, weights.read_bytes()[:100]), ("config.json", b"{}"), ("config.json", b"\xff"),
                              ("config.json", b'{"model_type": "mt5"}')):
            kept = (home / "theirs" / name).read_bytes()
            (home / "theirs" / name).write_bytes(content)
            code, text = command_line("--from-hf", home / "theirs", "--name", "other", "--vocab", vocab)
            assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, (name, text)
            assert not (home / "weights" / "other" / "model.pt").exists()
            (home / "theirs" / name).write_bytes(kept)


# ---------------------------------------------------------------- qcrd.py

# -- the algorithm


def tiny_student(config: qcrd.Config, seed: int = 0, dropout: float = 0.0, **shape) -> qcrd.Student:
    """A random T5 of a few thousand parameters over the demo's vocabulary."""
    torch.manual_seed(seed)
    vocab = HERE / "weights" / "demo" / "spiece.model"
    rows = json.loads((vocab.parent / "config.json").read_text())["vocab_size"]
    sizes = dict(vocab_size=rows, d_model=16, d_kv=4, d_ff=32,
                 num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=dropout)
    return qcrd.Student(t5.T5(t5.Config(**sizes | shape)), vocab, config, torch.device("cpu"))


def toy(student: qcrd.Student) -> tuple[qcrd.Data, dict]:
    """Five questions: five positives and two negatives, only positives, only negatives, nothing, one and one; negatives of the student."""
    voted = [qcrd.Voted("1", ["one and one", "two are 2 in all", "5 + 3 = 8 so 8", "take 4 from 9", "a"], ["3 apples", "no idea at all"]),
             qcrd.Voted("2", ["seven pears", "four times 3 is 12"], []), qcrd.Voted(None, [], ["wrong from the start"]),
             qcrd.Voted(None, [], []), qcrd.Voted("3", ["10 - 4 = 6"], ["10 + 4 = 14"])]
    split = qcrd.Split([f"Tom has {i + 2} apples and {3 * i + 1} pears. How many?" for i in range(5)], [f"( {i + 2} + {3 * i + 1} )" for i in range(5)])
    rows = {0: [qcrd.array("i", student.tokenizer.encode("sampled by the student"))], 3: [qcrd.array("i", [7, 8, 9, 4, 11])]}
    return qcrd.Data(student, split, voted), rows


@contextlib.contextmanager
def elsewhere():
    """A temporary working folder that data/ and runs/ go to."""
    old, home = os.getcwd(), os.environ.get("QCRD_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["QCRD_HOME"] = folder
        qcrd.STOP.clear()
        try:
            yield Path(folder)
        finally:
            os.chdir(old)
            os.environ.pop("QCRD_HOME") if home is None else os.environ.update(QCRD_HOME=home)


def command(*words: object, code: int = 0, stdout: bool = False) -> str:
    """qcrd.py's command line, in this process -> what it printed (stdout alone where asked). A traceback is always a failure."""
    argv, out, err = sys.argv[1:], io.StringIO(), io.StringIO()
    sys.argv[1:] = map(str, words)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = qcrd.run_main()
    except SystemExit as e:                                                      # argparse's own
        got = e.code
    finally:
        sys.argv[1:] = argv
    text = out.getvalue() + ("" if stdout else err.getvalue())
    assert got == code, f"exit code {got}, not {code}:\n{text[-3000:]}"
    return text


def kill_at(flags: list, line: str, sign: signal.Signals) -> int:
    """Start qcrd.py as a process of its own, send it a signal when it prints a line that starts so -> its exit code."""
    process = subprocess.Popen([sys.executable, HERE / "qcrd.py", *map(str, flags)], stdout=subprocess.PIPE, text=True)
    for printed in process.stdout:
        if printed.startswith(line):
            process.send_signal(sign)
    return process.wait()


def same(a: object, b: object) -> bool:
    """Equality of what checkpoints hold, to the last bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


SHORT = ["--batch", 8, "--iteration-steps", 2, "--discriminator-pretrain", 2, "--discriminator-steps", 1, "--rationale-tokens", 12, "--samples", 3]


def test_vote_majority_and_ties():
    assert qcrd.majority(["8", "7", "8", "8", "3"]) == ("8", [0, 2, 3], [1, 4])
    assert qcrd.majority(["7", "8", "8", "7"]) == ("7", [0, 3], [1, 2])           # a tie: the lowest slot's answer
    assert qcrd.majority([None, "8", "7", "7", "8"]) == ("8", [1, 4], [2, 3])     # an unreadable slot has no vote and joins neither set
    assert qcrd.majority([None, None]) == (None, [], [])
    keys = [qcrd.answer_key(a, "number") for a in ("( 84 / 2 )", "42", "42.00001", "41", "1/0", "2 * 21")]
    assert keys[4] is None and qcrd.majority(keys) == (keys[0], [0, 1, 2, 5], [3])    # equal by value, to 1e-4


def test_vote_drops_repetitions_after_counting():
    task = qcrd.Task("svamp", "number", Path(), *[qcrd.Split(["q"], ["( 1 + 1 )"])] * 3, [])
    texts = ["One and one. The answer is 2.", "One and one. The answer is 2.", "So two. The answer is (1 + 1).", "Three. The answer is 3.",
             "So two. The answer is 5."]
    slots = [[(text, "stop") for text in texts]]
    out = qcrd.vote(task, qcrd.Config(), task.train, slots, "test")[0]
    assert out == ("2", ["One and one.", "So two."], ["Three."])                  # and a negative that reads like a positive is none
    alone = qcrd.vote(task, qcrd.Config(vote=False), task.train, [slots[0][3:]], "test")[0]
    assert alone == ("3", ["Three."], [])                                         # slot 0, right or wrong
    cut = qcrd.read_slots(task, "q", [("He has 3 and then 4", "length"), ("The answer is 7.", "length"), None])
    assert [a for _, a in cut] == [None, "7", None]


def test_loss_by_hand():
    """Two questions. A: S_pos 0.9, 0.4 (s 0.8, 0.5), S_neg 2.0, 2.5, 1.0 (s 0.3, 0.1, 0.6). B: S_pos 1.5 (s 1), S_neg 3.2, 0.5 (s 0.2, 0.9)."""
    losses, score = [0.9, 0.4, 2.0, 2.5, 1.0, 1.5, 3.2, 0.5], [0.8, 0.5, 0.3, 0.1, 0.6, 1.0, 0.2, 0.9]
    c = qcrd.Candidates([None] * 8, [0, 0, 0, 0, 0, 1, 1, 1], [True, True, False, False, False, True, False, False])
    by_hand = {  # ℓ_pos s - 0.2 (1 - s⁻) min(ℓ⁻ - 3, 0)
        ("min", "max"): ([1, 3, 5], 0.5 * 0.4 + 0.2 * 0.9 * 0.5 + 1.5, 1),       # B's negative beyond δ: its term is 0
        ("min", "min"): ([1, 4, 5, 7], 0.5 * 0.4 + 0.2 * 0.4 * 2.0 + 1.5 + 0.2 * 0.1 * 2.5, 0),
        ("max", "max"): ([0, 3, 5], 0.8 * 0.9 + 0.2 * 0.9 * 0.5 + 1.5, 1),
        ("mean", "mean"): ([0, 1, 2, 3, 4, 5, 7], (0.8 * 0.9 + 0.5 * 0.4) / 2 + 0.2 * (0.7 * 1.0 + 0.9 * 0.5 + 0.4 * 2.0) / 3 + 1.5
                           + 0.2 * 0.1 * 2.5 / 2, 1)}
    for (positive, negative), (rows, expected, left_out) in by_hand.items():
        config = qcrd.Config(positive=positive, negative=negative)
        picked, share, out = qcrd.pick(losses, c, config)
        assert (picked, out) == (rows, left_out), (positive, negative, picked, out)
        ℓ = torch.tensor([losses[r] for r in picked], requires_grad=True)
        s = torch.tensor([score[r] for r in picked], requires_grad=True)
        is_pos = torch.tensor([c.positive[r] for r in picked])
        cl = qcrd.contrastive_terms(ℓ, s, torch.tensor(share), is_pos, config.beta, config.delta).sum()
        assert abs(cl.item() - expected) < 1e-6, (positive, negative, cl.item(), expected)
        cl.backward()
        assert s.grad is None                                                    # weights carry no gradient
        if (positive, negative) == ("min", "max"):
            assert torch.allclose(ℓ.grad, torch.tensor([0.5, -0.2 * 0.9, 1.0]))
    clipped = torch.tensor([3.5, 2.9], requires_grad=True)                       # the training pass clamps again
    terms = qcrd.contrastive_terms(clipped, torch.tensor([0.0, 0.0]), torch.ones(2), torch.tensor([False, False]), 0.2, 3.0)
    terms.sum().backward()
    assert torch.allclose(terms, torch.tensor([0.0, 0.02])) and torch.allclose(clipped.grad, torch.tensor([0.0, -0.2]))
    assert abs(qcrd.total_loss(2.0, 3.0, 4.0, (0.5, 0.5, 0.405)) - 4.12) < 1e-9


def test_loss_ties_and_alphas():
    c = qcrd.Candidates([None] * 4, [0] * 4, [True, True, False, False])
    assert qcrd.pick([1.0, 1.0, 2.0, 2.0], c, qcrd.Config())[0] == [0, 2]          # the first on a tie
    alphas = [qcrd.alphas_of(qcrd.Config(), t) for t in (1, 2, 3)]
    assert np.allclose(alphas, [(0.5, 0.5, 0.5), (0.5, 0.5, 0.45), (0.5, 0.5, 0.405)])
    assert qcrd.alphas_of(qcrd.Config(method="finetune"), 3) == (1.0, 0.0, 0.0) and qcrd.alphas_of(qcrd.Config(method="dss"), 3) == (0.5, 0.5, 0.0)
    temperatures = [qcrd.student_temperature(qcrd.Config(student_temperature="2.0:1.0", iterations=5), t) for t in (1, 3, 5)]
    assert temperatures == [2.0, 1.5, 1.0]


def plain_loss(student: qcrd.Student, d: qcrd.Discriminator | None, data: qcrd.Data, config: qcrd.Config, negatives: dict) -> torch.Tensor:
    """The whole of α1 L_predict + α2 L_cl as it stands in the paper: a candidate a row, with its own encoding and its own gradient."""
    def row_loss(prefix: list[int], x: list[int], y: list[int]) -> torch.Tensor:
        inputs, target = torch.tensor([prefix + list(x)]), torch.tensor([list(y)])
        logits = student.model(inputs, torch.ones_like(inputs, dtype=torch.bool), torch.cat([torch.zeros(1, 1, dtype=torch.long), target[:, :-1]], 1))
        return torch.nn.functional.cross_entropy(logits[0], target[0])
    total = 0.0
    for q in range(len(data)):
        x = data.questions[q]
        total = total + config.alpha_predict * row_loss(student.predict, x, data.labels[q])
        for rows, how, positive in ((data.of(q, True), config.positive, True), (data.of(q, False) + negatives.get(q, []), config.negative, False)):
            if not rows:
                continue
            losses = torch.stack([row_loss(student.explain, x, row) for row in rows])
            with torch.no_grad():
                s = torch.cat([torch.sigmoid(d(student, [x], [row])) for row in rows]) if d else torch.full((len(rows),), float(positive))
            weights = s if positive else 1 - s
            values = losses if positive else -config.beta * (losses - config.delta).clamp(max=0)
            if how == "mean":
                term = (weights * values).mean()
            else:
                k = losses.argmin() if how == "min" else losses.argmax()
                term = weights[k] * values[k]
            total = total + config.alpha_cl * term
    return total / len(data)


def test_step_equals_the_plain_mathematics():
    """Loss, picks and every gradient, all schemes, with and without discriminator, empty sets among the questions, any micro-batch."""
    for number, (positive, negative) in enumerate((p, n) for p in ("min", "mean", "max") for n in ("max", "mean", "min")):
        config = qcrd.Config(positive=positive, negative=negative, delta=(6.1, 30.0, 3.0)[number % 3], micro_batch=(1, 2, 0)[number % 3],
                             rationale_tokens=20)
        student = tiny_student(config, seed=number)
        d = qcrd.Discriminator(student, config).eval() if number % 2 else None
        data, negatives = toy(student)
        student.tokens = 30                                                       # several groups of targets
        student.model.zero_grad()
        expected = plain_loss(student, d, data, config, negatives)
        expected.backward()
        plain = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
        student.model.zero_grad()
        batch = list(range(len(data)))
        c = qcrd.candidates(data, config, batch, negatives)
        needed, losses = qcrd.needs_losses(c, config), [float("nan")] * len(c.rows)
        for r, loss in zip(needed, qcrd.candidate_losses(student, data, batch, c, needed).tolist()):
            losses[r] = loss
        picks = qcrd.choose(student, d, data, batch, c, losses, config)
        labels, rationales = qcrd.backward(student, data, config, batch, c, picks, (0.5, 0.5, 0.0), len(batch))
        cl = qcrd.contrastive_terms(rationales, picks.scores, picks.share, picks.positive, config.beta, config.delta).sum()
        loss = qcrd.total_loss(labels.sum(), cl, 0.0, (0.5, 0.5, 0.0)) / len(batch)
        assert abs(loss.item() - expected.item()) < 1e-5 * abs(expected.item()), (positive, negative)
        for name, p in student.model.named_parameters():
            if name in plain:
                assert (p.grad - plain[name]).norm() <= 1e-5 * max(plain[name].norm(), 1e-3), (positive, negative, name)


def test_step_under_bf16():
    """The CUDA path's arithmetic on the CPU: the same step under autocast is finite and near float32's."""
    out = {}
    for precision in ("float32", "bf16"):
        config = qcrd.Config(precision=precision, iterations=1, batch=5, delta=30.0)
        student = tiny_student(config, seed=3)
        data, negatives = toy(student)
        with tempfile.TemporaryDirectory() as folder:
            trainer = qcrd.Trainer(config, student, Path(folder), None, data, data)
            stats = trainer.step(list(range(5)), negatives, (0.5, 0.5, 0.5), 0, torch.zeros(0))
        out[precision] = stats, torch.cat([p.grad.flatten() for p in trainer.params])
    (a, ga), (b, gb) = out["float32"], out["bf16"]
    assert torch.isfinite(gb).all() and (ga - gb).norm() < 0.1 * ga.norm()
    assert torch.allclose(a[:6], b[:6], rtol=0.02, atol=0.02), (a, b)


def test_discriminator_learns_a_separable_toy():
    config = qcrd.Config(batch=16, samples=3)
    for kind in ("own", "shared"):
        config.discriminator = kind
        student = tiny_student(config, seed=1)
        split = qcrd.Split([f"Ann has {i} pears." for i in range(12)], ["1"] * 12)
        voted = [qcrd.Voted("1", [f"{i} pears are right"], [f"{i} apples are wrong"]) for i in range(12)]
        data, d = qcrd.Data(student, split, voted), qcrd.Discriminator(student, config)
        before = [p.clone() for p in student.model.parameters()]
        optimizer = torch.optim.AdamW(d.parameters(), lr=1e-2, fused=True)
        l_d = qcrd.train_discriminator(d, optimizer, student, data, config, 0, list(range(12)), {}, 60, 1e-2)
        right = qcrd.discriminator_accuracy(d, student, data, config)
        assert l_d < 0.6 and right["positives"] > 0.9 and right["negatives"] > 0.9, (kind, l_d, right)
        assert all(torch.equal(a, b) for a, b in zip(before, student.model.parameters()))      # pretraining moves no student


def test_discriminator_batches_are_balanced():
    config = qcrd.Config()
    student = tiny_student(config)
    data, negatives = toy(student)
    rng = np.random.default_rng(0)
    for questions in ([0, 1, 2, 3, 4], [1]):                                     # the second has no negative: corrupted words make them
        _, rows, targets = qcrd.discriminator_batch(data, student, config, rng, questions, negatives, 20)
        assert len(rows) == 20 and targets.sum() == 10
    assert qcrd.discriminator_batch(data, student, config, rng, [2, 3], negatives, 20)[1] == []
    changed = [qcrd.corrupt("one two three four five six seven eight nine ten", ["x"], 0.3, rng) for _ in range(200)]
    kept = np.mean([sum(w != "x" for w in text.split()) for text in changed])
    assert 6.5 < kept < 7.5 and all("x" in text or len(text.split()) < 10 for text in changed)
    flipped = qcrd.Config(discriminator_noise=1.0)
    assert (qcrd.discriminator_batch(data, student, flipped, rng, [0], {}, 8)[2] == torch.tensor([0.0] * 4 + [1.0] * 4)).all()


def test_iteration_samples_snapshot_lag_iterations_back():
    """Iteration t samples from the weights after t - 5 iterations, no other; none before t = 6; and five snapshots stay."""
    seen, after, original, write = {}, {}, qcrd.sample_negatives, qcrd.write_pt

    def weights(model: t5.T5) -> str:
        return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()

    def sample(past, data, config, iteration, questions):
        seen[iteration] = weights(past.model)
        return original(past, data, config, iteration, questions)

    def spy(path: Path, values: dict) -> None:
        if path.parent.name == "snapshots":
            after[int(path.stem)] = hashlib.sha256(b"".join(v.numpy().tobytes() for v in values.values())).hexdigest()
        write(path, values)
    with elsewhere() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = qcrd.Config(iterations=8, iteration_steps=1, batch=4, discriminator_pretrain=1, discriminator_steps=1, rationale_tokens=10, samples=2,
                             overfit=6, model=str(HERE / "weights" / "demo"), lr=1e-3)
        qcrd.sample_negatives, qcrd.write_pt = sample, spy
        try:
            run = qcrd.train(config)
        finally:
            qcrd.sample_negatives, qcrd.write_pt = original, write
        assert sorted(seen) == [6, 7, 8] and all(seen[t] == after[t - 5] for t in seen)
        assert len(set(after.values())) == 8                                     # the snapshots differ, so the test can fail
        assert sorted(int(p.stem) for p in (folder / run / "snapshots").glob("*.pt")) == [4, 5, 6, 7, 8]
        lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        assert [m["negatives"]["source"] for m in lines] == [""] * 5 + ["snapshot 1", "snapshot 2", "snapshot 3"]


def test_student_negatives_are_what_was_sampled():
    config = qcrd.Config(rationale_tokens=6, student_samples=3)
    student = tiny_student(config)
    data, _ = toy(student)
    kept, counts = qcrd.sample_negatives(student, data, config, 6, [4, 0, 4, 1])
    again, _ = qcrd.sample_negatives(student, data, config, 6, [4, 0, 1])
    other, _ = qcrd.sample_negatives(student, data, config, 7, [4, 0, 1])
    assert kept == again != other and counts["sampled"] == 9                      # depends on seed, iteration and questions alone
    for rows in kept.values():
        for row in rows:
            assert 1 <= len(row) <= 6 and 1 not in row[:-1] and max(row) < student.tokenizer.size and (len(row) == 6 or row[-1] == 1)
    positive = data.of(1, True)[0]
    student.write = lambda *a: [qcrd.array("i", row) for row in ([1], [], [0, 1], list(positive), [5, 1], [5, 1])]
    kept, counts = qcrd.sample_negatives(student, data, config, 6, [1, 0])
    assert kept == {1: [qcrd.array("i", [5, 1])]} and counts["dropped"] == 5      # empty ones, a positive and a repetition went


def test_order_visits_every_question():
    config = qcrd.Config(batch=4)
    assert sorted(qcrd.visits(config, 10, 3)) == list(range(10)) and qcrd.visits(config, 10, 3) != qcrd.visits(config, 10, 4)
    config.iteration_steps = 3                                                    # 12 questions an iteration: passes run on across iterations
    stream = [q for t in range(1, 6) for q in qcrd.visits(config, 10, t)]
    assert len(stream) == 60 and all(sorted(stream[i:i + 10]) == list(range(10)) for i in range(0, 60, 10))


def test_demo_from_end_to_end():
    with elsewhere() as folder:
        text = command(*SHORT, "--iterations", 7)
        for expected in ("teacher: ", "http://127.0.0.1:", "positives and", "paper: 3.87", "majority right", "discriminator: L_D", "iteration 7/7",
                         "snapshot 2", "test accuracy", "run folder: runs/demo-qcrd-0"):
            assert expected in text, f"{expected!r} is missing in:\n{text}"
        run = folder / "runs/demo-qcrd-0"
        rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) == 1000 and set(rows[0]) == {"input", "gold", "answer", "right", "rationale", "quality"} and 0 <= rows[0]["quality"] <= 1
        assert not list(run.rglob("*.tmp"))
        again = command(*SHORT, "--iterations", 1, "--method", "dss")             # the samples are on disk: nobody is asked
        assert "to ask for" not in again and "run folder: runs/demo-dss-0" in again
        audit = json.loads(command("--audit", run, 3, "--json", stdout=True))
        for a in audit:
            cl = sum(r["share"] * r["weight"] * (r["loss"] if r["set"] == "positive" else -a["beta"] * min(r["loss"] - a["delta"], 0))
                     for r in a["candidates"] if r["picked"])
            total = a["alphas"][0] * a["L_predict"] + a["alphas"][1] * cl + a["alphas"][2] * a["L_D"]
            assert abs(cl - a["L_cl"]) < 1e-6 and abs(total - a["total"]) < 1e-6
        assert "S_pos: the min counts" in command("--audit", run, 1)
        answer = json.loads(command("--ask", run, "Mia has 12 pears and gives 5 away.", "--json", stdout=True))
        assert set(answer) == {"input", "label", "rationale", "quality"}
        assert "accuracy" in command("--eval", run)
        command("--export", run, folder / "out")
        assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in (folder / "out").iterdir()}
        command(*SHORT, "--iterations", 1, "--model", run / "student", "--run", "second")     # a run's student is a model again


def test_kill_and_resume_ends_in_the_same_weights():
    with elsewhere() as folder:
        flags = [*SHORT, "--iterations", 7]
        command(*flags, "--run", "whole")
        expected = torch.load(folder / "runs/whole/checkpoint.pt", weights_only=True)
        assert kill_at([*flags, "--run", "killed"], "iteration 6", signal.SIGKILL) == -signal.SIGKILL
        command("--resume", "runs/killed")
        assert kill_at([*flags, "--run", "stopped"], "iteration 1", signal.SIGINT) == 130
        assert "was started with --lr" in command("--resume", "runs/stopped", "--lr", 0.5, code=2)
        command("--resume", "runs/stopped")
        for name in ("killed", "stopped"):
            assert same(torch.load(folder / f"runs/{name}/checkpoint.pt", weights_only=True), expected), name
            assert len((folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()) == 7
            assert not list((folder / "runs" / name).rglob("*.tmp"))
        torn = folder / "runs/killed/checkpoint.pt"
        torn.write_bytes(torn.read_bytes()[:5000])
        assert "broken or cut off" in command("--resume", "runs/killed", code=2)


def two_ranks(rank_: str, port: str, out: str) -> None:
    """What each rank of test_two_ranks runs: one step and one sampling, written to `out`."""
    os.environ.update(RANK=rank_, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    if out:
        qcrd.dist.init_process_group("gloo", rank=int(rank_), world_size=2)
    torch.save(one_step(), f"{out}/{rank_}.pt")


def one_step() -> dict:
    config = qcrd.Config(iterations=1, batch=5, delta=30.0, rationale_tokens=8, discriminator_steps=2)
    student = tiny_student(config, seed=5)
    data, _ = toy(student)
    trainer = qcrd.Trainer(config, student, Path("."), None, data, data)
    negatives, _ = qcrd.sample_negatives(student, data, config, 6, list(range(5)))
    trainer.update_discriminator(1, list(range(5)), negatives, 2, 0.5)
    stats = trainer.step(list(range(5)), negatives, (0.5, 0.5, 0.5), 0, torch.zeros(0))
    return dict(grad=torch.cat([p.grad.flatten() for p in trainer.params]), stats=stats, negatives=[list(r) for q in sorted(negatives) for r in negatives[q]])


def test_two_ranks_compute_what_one_does():
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        ranks = [subprocess.Popen([sys.executable, __file__, "two_ranks", r, port, folder]) for r in "01"]
        assert [p.wait(timeout=100) for p in ranks] == [0, 0]
        one, zero, other = one_step(), *(torch.load(f"{folder}/{r}.pt", weights_only=True) for r in "01")
    assert zero["negatives"] == other["negatives"] == one["negatives"]
    for many in (zero, other):
        assert (many["grad"] - one["grad"]).norm() <= 1e-5 * one["grad"].norm()
        assert torch.allclose(many["stats"], one["stats"], rtol=1e-5)


def test_a_loss_that_is_no_number_stops_the_run():
    config = qcrd.Config(iterations=2, batch=2)
    student = tiny_student(config)
    data, _ = toy(student)
    trainer = qcrd.Trainer(config, student, Path("."), None, data, data)
    try:
        trainer.account([1.0, float("nan")] + [0.0] * 9, 4)
        raise AssertionError("went on")
    except t5.InputError as e:
        assert "iteration 2, step 2: l_pos became nan on questions" in str(e), e


def test_wrong_use_gets_one_line():
    with elsewhere() as folder:
        (folder / "runs" / "taken").mkdir(parents=True)
        (folder / "empty").mkdir()
        (folder / "empty" / "config.json").write_text("{}")
        for words, expected in ((["--task", "nowhere"], "nowhere"), (["--model", "missing"], "no weights"), (["--model", "empty"], "--from-hf"),
                                (["--run", "taken"], "exists"), (["--resume", "runs/none"], "no run there"), (["--audit", "runs/none", "x"], "number"),
                                (["--samples", "0"], "--samples 0"), (["--fraction", "2"], "at most 1"), (["--student-temperature", "hot"], "hot"),
                                (["--teacher", "http://127.0.0.1:9/v1"], "no connection"), (["--teacher", "ftp://x"], "must be palm"),
                                (["--device", "tpu"], "not a device"), (["--negative-source", "fixed"], "--negative-model"),
                                (["--unknown-flag"], "unrecognized arguments")):
            lines = [line for line in command(*words, code=2).splitlines() if "error: " in line]
            assert len(lines) == 1 and expected in lines[0], (words, lines)


def test_overfit_reaches_everything():
    with elsewhere():
        text = command("--overfit", 8, "--iterations", 40, "--batch", 8, "--method", "finetune", "--lr", 3e-3)
        assert "test accuracy 100.0% on 8 questions" in text, text[-600:]


def test_export_answers_alike():
    try:
        import transformers
    except ImportError:
        raise Skip("transformers is not installed") from None
    with elsewhere() as folder, contextlib.redirect_stdout(io.StringIO()):
        for gated in (False, True):
            config = qcrd.Config(rationale_tokens=12)
            student = tiny_student(config, seed=2, **({"gated": True, "tied": False, "scaled": False} if gated else {}))
            run = folder / f"run{gated}"
            qcrd.save_student(student, None, run / "student")
            qcrd.write_json(run / "config.json", dict(config=dataclasses.asdict(config), kind="number", options=[]))
            qcrd.export(run, folder / f"out{gated}")
            theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder / f"out{gated}").eval()
            data, _ = toy(student)
            unused = list(range(student.tokenizer.size, student.model.config.vocab_size))    # rows without a piece are never written
            ours = student.write(student.predict, [data.questions[i] for i in range(5)], 12, 0.0, (), "")
            for i, row in enumerate(ours):
                x = torch.tensor([student.predict + list(data.questions[i])])
                y = theirs.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False, use_cache=False,
                                    suppress_tokens=unused)[0, 1:].tolist()
                assert list(row) == (y[:y.index(1) + 1] if 1 in y else y), (gated, i)


# ---------------------------------------------------------------- benchmark


def bench() -> None:
    print("nothing to time yet")


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == ["two_ranks"]:                 # a rank of test_two_ranks_compute_what_one_does
        two_ranks(*words[1:])
        return 0
    if words == ["bench"]:
        bench()
        return 0
    tests = [(name, f) for name, f in globals().items() if name.startswith("test_") and callable(f)]
    tests = [(name, f) for name, f in tests if not words or any(w in name for w in words)]
    passed = failed = skipped = 0
    for name, f in tests:
        start = time.perf_counter()
        try:
            f()
            passed, verdict = passed + 1, "ok"
        except Skip as why:
            skipped, verdict = skipped + 1, f"skipped: {why}"
        except Exception:
            failed, verdict = failed + 1, "FAILED\n" + traceback.format_exc()
        print(f"{time.perf_counter() - start:6.1f} s  {name}  {verdict}", flush=True)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
