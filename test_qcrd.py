"""All tests of this project, and its benchmark, with no network and nothing but the four packages.

    python test_qcrd.py              every test; ends with the line `N passed, N failed`
    python test_qcrd.py vote loss    the tests whose names contain one of these words
    python test_qcrd.py bench        speed and memory, no pass or fail
"""
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests
import torch

import fetch_data
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

# ---------------------------------------------------------------- benchmark


def bench() -> None:
    print("nothing to time yet")


def main() -> int:
    words = sys.argv[1:]
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
