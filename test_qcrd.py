# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "sentencepiece==0.2.3", "numpy==2.4.6", "requests==2.34.2"]
# ///
"""All tests: t5.py, fetch_data.py and qcrd.py, in that order.

    python test_qcrd.py                # all tests, without a network
    python test_qcrd.py vote teacher   # those whose name contains one of the words
    python test_qcrd.py bench          # speed and memory beside the plain way
    python test_qcrd.py cuda           # the proof on a GPU; --minutes N: its first stages

Tests that need transformers, or files that are not there, say so and are left out. Every run ends
with the line `N passed, N failed`.
"""

import gc
import hashlib
import html.parser
import importlib.util
import io
import json
import math
import multiprocessing.pool
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import warnings
import zipfile
from array import array
from collections import Counter
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import Mock, patch

if sys.argv[1:2] in (["cuda"], ["bench"]):
    os.environ["TESTS_MAY_USE_A_GPU"] = "1"  # children too, whose arguments are others
if "TESTS_MAY_USE_A_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ordinary tests are of the CPU

import numpy as np
import requests
import sentencepiece
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fetch_data
import qcrd
import t5
from fetch_data import Example

# ---------------------------------------------------------------------------- What all parts use

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"  # real data for more tests, where it is there


class Skip(Exception):
    """Raised by a test that cannot run here; its text says what is missing."""


def peer_or_skip():
    try:
        import transformers
    except ImportError:
        raise Skip("transformers is not installed") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def scratch():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def empty_home(**environment: str):
    """A temporary working folder for data/, weights/ and runs/; nobody sleeps in it."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "QCRD_"))}
    with scratch() as folder, chdir(folder), patch("time.sleep"):
        home = {"QCRD_HOME": str(folder)}
        with patch.dict(os.environ, others | home | environment, clear=True):
            yield folder


def pause(seconds: float) -> None:
    """time.sleep, which `empty_home` switches off."""
    threading.Event().wait(seconds)


@contextmanager
def serving(answer):
    """A server -> its URL, the headers and bodies that it was sent. answer(body, number) ->
    status, content (None: hang up), headers (with a Content-Length the line is dropped)."""
    asked = []

    class Stub(fetch_data.Handler):
        def do_GET(self):
            if self.path.endswith("/models"):
                return super().do_GET()
            self.respond({"range": self.headers["Range"]})

        def do_POST(self):
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body):
            asked.append((dict(self.headers), body))
            status, content, headers = answer(body, len(asked))
            self.close_connection = content is None or "Content-Length" in headers
            if content is None:
                return
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": len(raw)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            with suppress(ConnectionError):  # of a client that did not wait
                self.wfile.write(raw)

    with patch("fetch_data.Handler", Stub):
        url, server = fetch_data.demo_teacher()
    try:
        yield url, asked
    finally:
        server.shutdown()
        server.server_close()


def lines_of(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).open(encoding="utf-8")]


def task_folder(folder: Path, **files) -> Path:
    """A folder task: a list of (input, label), or bytes, for each split."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        if not isinstance(rows, bytes):
            rows = "".join(json.dumps({"input": x, "label": y}) + "\n" for x, y in rows).encode()
        (folder / f"{name}.jsonl").write_bytes(rows)
    return folder


def refused(call, *words: str, kind=t5.InputError) -> str:
    """The text of the error that the call must raise: one line with all the words."""
    try:
        call()
    except kind as error:
        text = str(error)
        assert "\n" not in text and all(word in text for word in words), (text, words)
        return text
    raise AssertionError(f"not refused: {words}")


def outcome(call, *args, **kwargs) -> str:
    """What the call prints, and "error: " with the one line of its InputError."""
    with redirect_stdout(io.StringIO()) as printed:
        try:
            call(*args, **kwargs)
        except t5.InputError as error:
            assert "\n" not in str(error), error
            print(f"error: {error}")
    return printed.getvalue()


def command(module, *words: object, code: int = 0) -> str:
    """A command line in this process -> stdout; for another code than 0 stderr too."""
    out, err, argv = io.StringIO(), io.StringIO(), [module.__name__, *map(str, words)]
    with redirect_stdout(out), redirect_stderr(err), patch("sys.argv", argv):
        try:
            got = module.main()
        except SystemExit as stop:  # argparse's own
            got = stop.code
    text = out.getvalue() + err.getvalue()
    assert (got or 0) == code and text.count("error: ") == (code == 2), f"{argv}: {got}\n{text}"
    return text if code else out.getvalue()


def python(*words: object, home: Path | str = "") -> str:
    """stdout of a Python process. Raises RuntimeError with the end of its stderr."""
    where = os.environ | {"PYTHONPATH": str(HERE), "QCRD_HOME": str(home)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, env=where, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:].strip())
    return done.stdout


def mistake(module, *words: object) -> str:
    """The one line that a command line ends with which is refused."""
    return command(module, *words, code=2).splitlines()[-1]


# ------------------------------------------------------------------------------------------- t5.py

KEYS = list(t5.T5Config.__dataclass_fields__)[:9]  # the sizes, of which all shapes differ
# heads * d_kv != d_model, layers differ, odd vocabularies, few buckets, short maximal distances
ODD = """101 32 8 64 2 2 4 32 128; 97 24 16 40 1 3 3 32 128; 130 40 4 96 3 1 5 8 16
256 16 32 16 2 2 1 4 5; 64 48 12 100 2 1 2 16 300; 201 8 8 24 1 1 7 6 20; 333 64 16 32 2 4 4 64 128
75 20 10 33 4 2 2 10 11; 129 36 6 72 1 2 6 32 64; 1000 28 14 56 2 2 2 12 100"""
ODD = [tuple(map(int, row.split())) for row in re.split("[;\n]", ODD)]


def peer_of(model: t5.T5, kind: str = "T5ForConditionalGeneration", **how):
    """transformers' model with the same weights, read from a folder."""
    with scratch() as folder:
        model.save(folder)
        return getattr(peer_or_skip(), kind).from_pretrained(folder, **how).eval()


def odd_t5(i: int, v11: bool) -> t5.T5:
    """A random T5 of shape i; norms and biases are moved off their degenerate start."""
    gated = dict(feed_forward_proj="gated-gelu", scaled=False) if v11 else {}
    model = small_t5(i, tied=i % 2 == 1, **dict(zip(KEYS, ODD[i])) | gated)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative" in name or "layer_norm" in name:
                weight += 0.3 * torch.randn_like(weight)
    return model


def random_batch(vocab: int, rows: int, width: int, seed: int = 0, least: int = 1):
    """Right-padded ids (rows, width) that end in </s>, and their mask; the first row is full."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, width), generator=rng)
    lengths = torch.randint(least, width + 1, (rows,), generator=rng)
    lengths[0] = width
    mask = torch.arange(width)[None] < lengths[:, None]
    ids[torch.arange(rows), lengths - 1] = t5.EOS
    return ids * mask, mask


def small_t5(seed: int = 0, **changes) -> t5.T5:
    torch.manual_seed(seed)
    return t5.T5(t5.T5Config(**dict(zip(KEYS, (67, 16, 8, 24, 2, 2, 2))) | changes)).eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, *case) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), case


def padded(rows: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(rows, (0, width - rows.shape[1]))


def shifted(y: torch.Tensor) -> torch.Tensor:
    """The decoder's input for targets y."""
    return F.pad(y, (1, 0))[:, :-1]


def plain_losses(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each row's mean token cross-entropy."""
    nats = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
    return (nats * mask).sum(1) / mask.sum(1)


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_t5_equals_transformers():
    """Files, logits, losses, gradients and greedy texts; the first loop needs no transformers."""
    for folder in (HERE / "weights/golden/v1_0", HERE / "weights/golden/v1_1"):
        golden = json.loads((folder / "expected.json").read_text())
        ids, mask, target_in, logits, greedy = map(torch.tensor, golden.values())
        model = t5.T5.load(folder)
        close(model(ids, mask == 1, target_in), logits)
        assert torch.equal(model.generate(ids, mask == 1, greedy.shape[1]), greedy)
    for case in product(range(len(ODD)), (False, True)):
        i, ours = case[0], odd_t5(*case)
        peer = peer_of(ours)
        with scratch() as folder:
            peer.save_pretrained(folder)
            assert same_weights(t5.T5.load(folder).state_dict(), ours.state_dict()), case
        (x, x_mask), (y, y_mask) = (random_batch(ODD[i][0], 45, w, i + w) for w in (23, 14))
        hf = dict(input_ids=x, attention_mask=x_mask.long())
        expected = peer(**hf, decoder_input_ids=shifted(y)).logits
        close(ours(x, x_mask, shifted(y))[y_mask], expected[y_mask], *case)
        theirs, losses = plain_losses(expected, y, y_mask), ours.loss(x, x_mask, y, y_mask)
        assert torch.allclose(losses, theirs, rtol=1e-5), case
        for each in (theirs, losses):
            (each * torch.arange(1.0, 46)).sum().backward()
        for name, weight in ours.named_parameters():
            close(weight.grad, peer.get_parameter(name).grad, *case, name)
        greedy = peer.generate(**hf, max_new_tokens=12, do_sample=False, use_cache=False)[:, 1:]
        assert torch.equal(padded(greedy, 12), padded(ours.generate(x, x_mask, 12), 12)), case


def test_t5_dropout():
    """Bernoulli, seeded, and in the places of transformers."""
    x = torch.ones(2000, 1000)
    for p in (0.1, 0.02, 0.6):
        drop = t5.Dropout(p)
        torch.manual_seed(3)
        first, second = drop(x), drop(x)
        torch.manual_seed(3)
        assert torch.equal(first, drop(x)) and not torch.equal(first, second)
        assert torch.allclose(first.max(), torch.tensor(1 / (1 - p)))
        zero = first.flatten() == 0
        sigma = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(zero.float().mean() - p) < 5 * sigma
        for lag in (1, 2, 1000):  # independent of the neighbour and of the element above
            both = (zero[lag:] & zero[:-lag]).float().mean()
            assert abs(both - p * p) < 6 * p * x.numel() ** -0.5 + p * sigma, (p, lag)
        assert 0.5 * p < zero.view(2000, 1000)[:, -1].float().mean() < 1.5 * p  # the end too
    leaf = torch.ones(50, 50, requires_grad=True)
    out = t5.Dropout(0.3)(leaf)
    out.sum().backward()
    assert torch.equal(out.detach(), leaf.grad) and 0 < int((leaf.grad == 0).sum()) < 2500
    assert t5.Dropout(0.3).eval()(x) is x and t5.Dropout(0.0)(x).equal(x)

    def every_seventh(x, p=0.5, training=True, inplace=False):
        return x * (torch.arange(x.numel()).view(x.shape) % 7 != 0) / (1 - p) if training else x

    for v11 in (False, True):  # equal losses mean equal places and equal scaling
        ours = odd_t5(0, v11).train()
        model = peer_of(ours, attn_implementation="eager").train()
        (x, x_mask), (y, y_mask) = (random_batch(101, 4, w, seed=w, least=w) for w in (9, 7))
        drop = patch.object(t5.Dropout, "forward", lambda m, x: every_seventh(x, m.p, m.training))
        with patch("torch.nn.functional.dropout", every_seventh), drop:
            expected = model(input_ids=x, attention_mask=x_mask.long(), labels=y).loss
            loss = ours.loss(x, x_mask, y, y_mask).mean()
        assert abs(loss - expected) <= 1e-5 * expected
        assert abs(ours.eval().loss(x, x_mask, y, y_mask).mean() - expected) > 1e-3 * expected


def test_t5_loss_and_encoder():
    """Shared memory and rows, the encoder alone, a second backward pass, refused shapes."""
    model = small_t5(tied=False)
    x, x_mask = random_batch(67, 4, 9)
    y, y_mask = random_batch(67, 7, 6, seed=1)
    rows, weights = torch.tensor([0, 2, 2, 3, 1, 0, 2]), torch.linspace(-1, 2, 7)
    plain = model.loss(x[rows], x_mask[rows], y, y_mask)
    names, parameters = zip(*model.named_parameters())
    again = [torch.autograd.grad(plain @ weights, parameters, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *again))
    with patch("t5.FUSED", ("cpu",)):  # the attention of a GPU
        fused = model.loss(x[rows], x_mask[rows], y, y_mask)
        assert torch.allclose(fused, plain, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(fused @ weights, parameters), again[0]):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(model.loss(x, x_mask, y, y_mask, rows=rows), plain, rtol=0.02)
        written = model.generate(x, x_mask, 9)
    assert torch.equal(written, model.generate(x, x_mask, 9))
    second = dict(outputs=plain.sum(), inputs=parameters, create_graph=True)
    refused(lambda: torch.autograd.grad(**second), "second derivative", kind=RuntimeError)
    with torch.no_grad():
        shared = model.loss(x, x_mask, y, y_mask, rows=rows)
    assert shared.dtype == torch.float32 and torch.allclose(shared, plain, rtol=1e-5)
    memory = model.encode(x, x_mask)
    assert not memory[~x_mask].any()
    leaf = memory.detach().requires_grad_()
    for part in (slice(0, 3), slice(3, 7)):  # two calls, one backward pass of the encoder
        loss = model.loss(None, x_mask, y[part], y_mask[part], memory=leaf, rows=rows[part])
        (loss @ weights[part]).backward()
    memory.backward(leaf.grad)
    for name, p, expected in zip(names, parameters, again[0]):
        assert expected.any() and torch.allclose(p.grad, expected, rtol=1e-4, atol=1e-6), name
    half = model.encoder_only()
    assert torch.equal(half.encode(x, x_mask), memory)
    assert {name.split(".")[0] for name in half.state_dict()} == {"shared", "encoder"}
    assert half.shared.weight is not model.shared.weight
    empty = x_mask & (torch.arange(4) != 2)[:, None]
    good = dict(ids=x, mask=x_mask, targets=y[:4], target_mask=y_mask[:4])
    wrong = [dict(mask=empty), dict(ids=x[:, :2]), dict(target_mask=y_mask[:4, :2])]
    for changes in (*wrong, dict(targets=y[:1], target_mask=y_mask[:1])):
        refused(lambda: model.loss(**good | changes))


def test_t5_generation_and_sampling():
    """Caches change nothing, nor do the other rows of the batch; the model is left as it was."""
    model = small_t5(vocab_size=30).train()
    linear = model.decoder.block[0].layer[0].SelfAttention.q
    linear.forward = own = lambda x: x @ linear.weight.T  # a caller's change outlives generation
    x, x_mask = random_batch(30, 16, 9)
    how = dict(temperature=1.5, generator=torch.Generator().manual_seed(5))
    written = model.generate(x, x_mask, 25, **how)
    assert model.training and vars(linear)["forward"] is own
    assert sum("forward" in vars(module) for module in model.modules()) == 1
    uniforms = torch.rand(16, 25, generator=torch.Generator().manual_seed(5))
    for rows in ([3], [15, 0, 7], [9, 8, 7, 6, 5]):
        alone = model.generate(x[rows], x_mask[rows], 25, 1.5, uniforms=uniforms[rows])
        assert torch.equal(padded(alone, written.shape[1]), written[rows])
    tokens, done = torch.zeros(16, 1, dtype=torch.long), torch.zeros(16, dtype=torch.bool)
    for t in range(written.shape[1]):
        new = t5.draw(model.eval()(x, x_mask, tokens)[:, -1] / 1.5, uniforms[:, t])
        new[done] = 0
        done |= new == t5.EOS
        tokens = torch.cat([tokens, new[:, None]], 1)
    assert torch.equal(tokens[:, 1:], written) and done.sum() > 3  # rows ended and were dropped
    # evenly spaced numbers draw each id as often as the softmax says, to the nearest draw
    model, grid = small_t5(vocab_size=300), (torch.arange(20000)[:, None] + 0.5) / 20000
    x, x_mask = (z.expand(20000, -1) for z in random_batch(300, 1, 6))
    logits = model(x[:1], x_mask[:1], torch.zeros(1, 1, dtype=torch.long))[0, 0].detach()
    for temperature, limit in ((0.7, None), (1.5, None), (1.5, 140)):
        expected = (logits[:limit] / temperature).softmax(-1) * 20000
        drawn = model.generate(x, x_mask, 1, temperature, limit=limit, uniforms=grid)[:, 0]
        seen = torch.bincount(drawn, minlength=len(expected))
        assert len(seen) == len(expected) and (seen - expected).abs().max() < 1.1
    logits = torch.full((6, 260), float("-inf"))  # what has no probability is never drawn
    logits[:, [5, 130, 131]] = torch.tensor([0.0, 1.0, 0.5])
    drawn = t5.draw(logits, torch.tensor([0.0, 1e-7, 0.5, 0.999, 1 - 2**-23, 1 - 2**-24]))
    assert set(drawn.tolist()) <= {5, 130, 131} and drawn[0] == 5 and drawn[-1] == 131


def test_t5_low_precision():
    wide = dict(vocab_size=32000, d_model=256, d_kv=64, d_ff=512, num_heads=4)
    gated = dict(feed_forward_proj="gated-gelu", tied=False, scaled=False)
    for changes in (wide, wide | gated, {}, {"feed_forward_proj": "gated-gelu"}):
        model, peaks, hot = small_t5(**changes), [], "d_ff" not in changes
        for block in [*model.encoder.block, *model.decoder.block] if hot else []:
            layer = block.layer[-1].DenseReluDense  # outputs above 65,504, as from t5-base on
            for name, weight in layer.named_parameters():
                weight.data *= 30 if name == "wo.weight" else 300 if changes else 3000
            layer.wo.register_forward_hook(lambda m, args, out: peaks.append(out))
        x, x_mask = random_batch(model.config.vocab_size, 4, 20)
        y, y_mask = random_batch(model.config.vocab_size, 4, 12, seed=1)
        full = model.loss(x, x_mask, y, y_mask)
        with torch.autocast("cpu", torch.float16 if hot else torch.bfloat16):
            low = model.loss(x, x_mask, y, y_mask)
        assert low.dtype == torch.float32 and torch.allclose(low, full, rtol=0.02), (low, full)
        (low.mean() * 1024).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert not hot or max(out.abs().max() for out in peaks) > 65504
        assert all(out.dtype == torch.float32 for out in peaks)


def test_t5_files():
    """Round trip of all four output layers; .bin; what transformers reads."""
    (x, x_mask), (y, _) = random_batch(67, 4, 9), random_batch(67, 4, 6, seed=1)
    gated = {"feed_forward_proj": "gated-gelu", "scaled": False}
    with scratch() as folder:
        vocab, whole, half = (folder / name for name in ("vocab", "whole", "half"))
        vocab.write_bytes(b"pieces")
        for changes in ({}, {"tied": False}, gated, gated | {"tied": False}):
            model = small_t5(**changes)
            model.save(whole, vocab=vocab)
            model.save(half, dtype=torch.float16)
            assert (whole / "spiece.model").read_bytes() == b"pieces"
            models = model, back, rounded = model, t5.T5.load(whole), t5.T5.load(half)
            assert back.config == model.config and not back.training
            assert all(p.requires_grad and p.dtype == torch.float32 for p in rounded.parameters())
            expected, full, low = (m(x, x_mask, y) for m in models)
            assert torch.equal(full, expected) and torch.allclose(low, full, atol=0.02, rtol=0.02)
        tensors = t5.read_safetensors(whole / "model.safetensors")
        (whole / "model.safetensors").unlink()
        refused(lambda: t5.T5.load(whole), "model.safetensors", "check the path")
        file, ones, ran = whole / "pytorch_model.bin", torch.ones(67, 16), folder / "ran"
        torch.save(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, file)
        assert same_weights(t5.T5.load(whole).state_dict(), model.state_dict())
        bomb = type("Bomb", (), {"__reduce__": lambda self: (Path.touch, (ran,))})()
        hostile = [{"shared.weight": bad} for bad in (bomb, ones.long(), 1)]
        hostile += [[1, 2], {"a": ones}, tensors | {"decoder.embed_tokens.weight": ones}]
        for values in hostile:
            torch.save(values, file)
            refused(lambda: t5.T5.load(whole), "pytorch_model.bin")
        assert not ran.exists()  # a careless reader makes it
        file.write_bytes(file.read_bytes()[:-100])
        refused(lambda: t5.read_pt(file), "pytorch_model.bin", "replace it")
        refused(lambda: t5.read_pt(folder / "absent"), "absent", "No such file")
        peer = peer_or_skip().T5ForConditionalGeneration.from_pretrained(half)
        assert peer.dtype == torch.float32
        close(peer(input_ids=x, attention_mask=x_mask.long(), decoder_input_ids=y).logits, low)


def test_t5_refuses_broken_checkpoints():
    with scratch() as folder:
        small_t5().save(folder)
        file, config = folder / "model.safetensors", folder / "config.json"
        good, settings = file.read_bytes(), json.loads(config.read_text())
        start = 8 + int.from_bytes(good[:8], "little")
        header = json.loads(good[8:start])
        cases = [(good[:cut],) for cut in (0, 5, 8, 100, start, len(good) // 2, len(good) - 1)]
        cases += [(size.to_bytes(8, "little") + good[8:], "JSON") for size in (4, 2**62)]
        cases += [([1, 2],), ({"shared.weight": 3},), (5,), ({},)]  # headers
        offsets = [[10**9, 10**9 + 4288], [8, 0], [-4, 0], [-4288, 0], [0], "0", None, [0, 2.5]]
        bad = [{"data_offsets": value} for value in offsets]
        bad += [{"dtype": value} for value in ("F64", "I32", "BF16", ["F32"], None)]
        bad += [{"shape": value} for value in ([0, 10**30], [66, 16], [-67, -16], 3, None)]
        changed = [("shared.weight", change, "shared.weight") for change in bad]
        last, (begin, end) = list(header)[-1], list(header.values())[-1]["data_offsets"]
        assert start + end == len(good)  # the case below has enough bytes for the shape
        changed += [(last, {"data_offsets": [begin, end + 4]}, last)]
        changed += [("shared.weight", {"shape": [16, 67]}, "size")]
        changed += [("encoder.block.7.extra", header["shared.weight"], "encoder.block.7.extra")]
        for key, change, word in changed:
            cases += [(header | {key: header.get(key, {}) | change}, word)]
        for lost, word in (("EncDecAttention.k.weight", "Missing"), ("shared.weight", "missing")):
            cases += [({k: v for k, v in header.items() if lost not in k}, lost, word)]
        for content, *words in cases:
            if not isinstance(content, bytes):
                text = json.dumps(content).encode()
                content = len(text).to_bytes(8, "little") + text + good[start:]
            file.write_bytes(content)
            refused(lambda: t5.T5.load(folder), "model.safetensors", *words)
        file.write_bytes(good)
        values = [("model_type", "mt5"), ("model_type", None), *((key, 7) for key in t5.IDS)]
        values += [("feed_forward_proj", "gelu"), ("feed_forward_proj", ["relu"])]
        values = [(*value, value[0]) for value in [*values, ("dropout_rate", 1.5)]]
        values += [("d_model", bad, "config.json") for bad in (-1, 10**30, "64")]
        values += [("d_ff", 25, "size"), ("relative_attention_num_buckets", 2, "buckets")]
        values += [("num_layers", 3, "encoder.block.2"), ("num_layers", 10**7, "layers")]
        texts = [(json.dumps(settings | {key: value}), word) for key, value, word in values]
        texts += [(text, "config.json", "JSON") for text in ("{", "[" * 100_000, "[]", "7")]
        for text, *words in texts:
            config.write_text(text)
            refused(lambda: t5.T5.load(folder), *words)
        config.unlink()
        refused(lambda: t5.T5.load(folder), "config.json")


def test_t5_tokenizer():
    """A small SentencePiece model with T5's special ids, and t5-small's where it is there."""
    words = "how many apples pears did Tom Ann buy sell give 1 2 3 17 28 then were in , . ( + ) ?"
    writer, lines = io.BytesIO(), iter([words] * 300)
    special = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=90, hard_vocab_limit=False)
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=lines, model_writer=writer, minloglevel=2, **special)
    texts = ["", " ", "\n", "Hello  world ", "line\nbreak\ttab", "( 3 + 4 ) * 2 = 14", "1,234.5"]
    texts += ["5 ÷ 6 × 7", "naïve café", "e\u0301", "日本語", "🙂", "premise</s>hypothesis"]
    texts += ["a </s> b", "x <extra_id_0> y<extra_id_12>z", "<pad> <unk>", "<s>", "a" * 300]
    texts += ["\u00a0nbsp\u3000wide", "word " * 300]
    with scratch() as folder:
        file = folder / "spiece.model"
        file.write_bytes(writer.getvalue())
        ours = t5.Tokenizer(file)
        ids = ours.encode("how many apples did Tom buy ?")
        assert ids[-1] == t5.EOS and t5.UNK not in ids
        assert ours.decode(ids) == ours.decode(torch.tensor(ids)) == "how many apples did Tom buy ?"
        cut = ours.encode("apples " * 50, 7)
        assert ours.encode("") == [t5.EOS] and len(cut) == 7 and cut[-1] == t5.EOS
        assert ours.encode("Tom</s>Ann") == ours.encode("Tom") + ours.encode("Ann")
        assert ours.encode("<extra_id_99>")[0] == ours.size == ours.sentinels[0] - 99
        assert ours.decode([ours.sentinels[3], ours.size, 0, 1, 10**6]) == ""
        (folder / "other").write_bytes(b"nothing of the kind")
        for name in ("other", "absent"):
            refused(lambda: t5.Tokenizer(folder / name), name)
        published = "mirror/huggingface.co/google-t5/t5-small/resolve/*/spiece.model"
        for source in (file, *SHARED.glob(published)):
            file.write_bytes(source.read_bytes())
            ours = t5.Tokenizer(file)
            try:
                theirs = peer_or_skip().T5Tokenizer.from_pretrained(folder)
            except (ImportError, ValueError):
                raise Skip("transformers reads spiece.model only with protobuf") from None
            for text in texts:
                assert theirs(text).input_ids == ours.encode(text), text
                short = theirs(text, truncation=True, max_length=5).input_ids
                assert short == ours.encode(text, 5), text


def test_t5_pretraining():
    """Span corruption hides what it should; training learns, and repeats bit by bit."""
    tokenizer, rng = t5.Tokenizer(HERE / "weights/demo/spiece.model"), random.Random(0)
    masked = 0
    for length in [2, 3, 5, 20, 100, 400] * 20:
        ids = [rng.randrange(3, tokenizer.size) for _ in range(length)]
        source, target = t5.corrupt(ids, tokenizer, rng)
        assert source[-1] == target[-1] == t5.EOS
        pieces, span = {}, []  # each starts with its sentinel
        for token in target[:-1]:
            span = pieces.setdefault(token, []) if token >= tokenizer.size else span
            span.append(token)
        restored = [token for s in source[:-1] for token in pieces.get(s, [0, s])[1:]]
        assert min(map(len, pieces.values())) > 1 and restored == ids
        masked += len(target) - 1 - len(pieces) if length >= 20 else 0
    assert abs(masked / (520 * 20) - 0.15) < 0.01
    pairs = [(f"say {word}", word) for word in "apples pears Tom Ann box more".split()]
    batch = [t5.pad([tokenizer.encode(text) for text in side]) for side in zip(*pairs)]
    texts, runs = ["how many apples did Tom buy ?", "Ann did sell 17 pears"], []
    for _ in range(2):
        model = small_t5(vocab_size=tokenizer.size + 100, d_model=32, d_ff=64)
        last = t5.pretrain(model, tokenizer, texts, 80, batch=16, lr=6e-3, pairs=pairs, seed=4)
        after = model.loss(*batch[0], *batch[1]).mean().item()
        runs.append((last, model.state_dict()))
        assert not model.training and after < 3, after  # about 7 at first
    assert runs[0][0] == runs[1][0] and same_weights(runs[0][1], runs[1][1])
    refused(lambda: t5.pretrain(model, tokenizer, [], 1), "text")


def test_t5_atomic_files_and_progress():
    """No half-written file is left; the live line fits the terminal."""
    with scratch() as folder:
        path = folder / "file"
        for text, left in (("old", "old"), ("half", "old"), ("new", "new")):
            with suppress(ZeroDivisionError), t5.atomic(path) as temporary:
                assert temporary.parent == folder and temporary.suffix == ".tmp"
                temporary.write_text(text)
                assert text != "half" or 1 / 0
            assert path.read_text() == left and os.listdir(folder) == ["file"]
    stream = io.StringIO()
    stream.isatty = lambda: True
    size = patch("shutil.get_terminal_size", lambda: os.terminal_size((40, 9)))
    with redirect_stderr(stream), size:
        for what in ("work", "work of a very long name"):
            progress = t5.Progress(what, 200)
            progress.update(50)
            progress.close()
    shown = [part.split("\x1b")[0] for part in stream.getvalue().split("\r")]
    assert max(map(len, shown)) == 39 and "\n" not in stream.getvalue()
    assert "work: 50/200, 0 min 00 s left" in shown
    with redirect_stderr(io.StringIO()) as stream:  # not a terminal, short work
        assert list(t5.track("work", range(3))) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_t5_programs_end_in_one_line_or_a_traceback():
    out_of_memory = "error: out of memory; help\n"
    for error, code, text in (
        (t5.InputError("so \n\x1b[2Jis"), 2, "error: so  [2Jis\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left", "a/b"), 2, "error: a/b: No space left\n"),
        (RuntimeError("CUDA out of memory. Tried"), 2, out_of_memory),
        (MemoryError(), 2, out_of_memory),
    ):
        with redirect_stderr(io.StringIO()) as printed:
            assert t5.run_program(Mock(side_effect=error), "help") == code
        assert printed.getvalue() == text, (error, printed.getvalue())
    for error in (RuntimeError("a bug"), KeyError("a bug")):
        refused(lambda: t5.run_program(Mock(side_effect=error)), "a bug", kind=type(error))
    assert (t5.run_program(lambda: None), t5.run_program(lambda: 3)) == (0, 3)


def test_t5_lock_is_held_by_one():
    """How another one waits for it is in the test of one process."""
    with scratch() as folder:
        with t5.lock(folder / "new/lock"):
            refused(lambda: t5.lock(folder / "new/lock", "taken"), "taken")
        assert t5.lock(folder / "new/lock", "taken")


# ----------------------------------------------------------------------------------- fetch_data.py

FETCH_X = partial(fetch_data.download, "x")


@contextmanager
def data_home(mirror="/nowhere", content=b"", pin=""):
    """empty_home with a mirror as the internet and a source "x" that is pinned to `content`."""
    source = patch.dict(fetch_data.SOURCES, x="https://files.example/a/x")
    pinned = patch.dict(fetch_data.PINS, x=pin or hashlib.sha256(content).hexdigest())
    with empty_home(QCRD_MIRROR=str(mirror)) as home, source, pinned:
        with redirect_stderr(io.StringIO()):
            yield home


@contextmanager
def served(content, pin="", cut=None, ranges=True, etag="", status=()):
    """data_home with a server of `content` that first answers with the codes in `status` and drops
    the line after `cut` bytes -> home, what it was asked."""
    codes, size = list(status), len(content)

    def answer(body, number):
        start = int(body["range"][6:-1]) if ranges else 0
        usual = 416 if start > size else 206 if ranges else 200
        code = codes.pop(0) if codes else usual
        sent = content[start:] if code < 300 else b""
        headers = {"Content-Length": len(sent), "X-Linked-ETag": etag, "Location": "/there"}
        if code == 206:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        return code, sent[:cut], headers

    with serving(answer) as (url, asked), data_home(url, content, pin) as home:
        yield home, asked


def read_sample(kind, text, question="What?", options=(), **fields):
    return fetch_data.read_sample(empty_task(kind, options), question, text, **fields)


def empty_task(kind, options=()):
    options = fetch_data.NLI if kind == "nli" else options
    return fetch_data.Task("mine", kind, Path(), [], [], [], options)


def test_download_resumes_what_was_cut():
    """Also when several want the file: the lock tells threads apart as it does processes."""
    content = os.urandom(300_000)
    with served(content, cut=131_072) as (home, asked):
        with multiprocessing.pool.ThreadPool(4) as pool:
            paths = set(pool.map(fetch_data.download, ["x"] * 4))
        assert paths == {home / "data/downloads/x"} and FETCH_X().read_bytes() == content
        ranges = [body["range"] for _, body in asked]
        assert ranges == ["bytes=0-", "bytes=131072-", "bytes=262144-"], asked


def test_download_is_checked_and_repeated():
    content = b"what the server has"
    digest, other = (hashlib.sha256(x).hexdigest() for x in (content, b"pinned"))
    size, blob = str(len(content)), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    for how, start, *words in (  # the server, what an earlier run left, why it is refused
        ({"pin": other}, b"", digest, other),
        ({"pin": size, "etag": f'"{other}"'}, b"", other),
        ({"pin": size, "etag": f'"{digest}"'}, b""),
        ({"pin": blob}, b""),
        ({"status": [404] * 5}, b"", "404"),
        ({"status": [503]}, content[:9]),
        ({"status": [503], "ranges": False}, content[:9]),
        ({"status": [503]}, content + b"+"),
    ):
        with served(content, **how) as (home, asked):
            folder = home / "data/downloads"
            folder.mkdir(parents=True)
            (folder / "x.part").write_bytes(start)
            if words:
                refused(FETCH_X, *words)
            else:
                assert FETCH_X().read_bytes() == content
            assert asked[0][1]["range"] == f"bytes={len(start)}-"
            kept = [path.name for path in folder.iterdir() if path.stat().st_size]
            assert kept == ([] if words else ["x"]), kept  # nothing to resume either
    with served(content) as (home, _):
        file = home / "data/downloads/x"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"a file of the user's")
        refused(FETCH_X, "move it away")
        assert file.read_bytes() == b"a file of the user's"


def test_download_without_a_connection_names_the_remedy():
    with data_home("http://127.0.0.1:9"):
        url = "http://127.0.0.1:9/files.example/a/x"
        refused(FETCH_X, f"cannot fetch {url}", "QCRD_MIRROR", "downloads/x")
    with data_home("here", content=b"content") as home:
        path = home / "here/files.example/a/x"
        path.parent.mkdir(parents=True)
        refused(FETCH_X, "here/files.example/a/x: no such file in the mirror")
        path.write_bytes(b"forged")
        refused(FETCH_X, "x.part: expected")
        assert path.exists()
        path.write_bytes(b"content")
        assert FETCH_X().read_bytes() == b"content"


def test_download_sends_no_password_and_no_request_to_a_proxy_for_loopback():
    """requests would take both from the environment, the password anew for every redirect."""
    with served(b"content", status=[302]) as (home, asked):
        (home / "netrc").write_text("default login me password secret")
        proxy = "http://127.0.0.1:9"
        with patch.dict(os.environ, NETRC=str(home / "netrc"), http_proxy=proxy):
            assert FETCH_X().read_bytes() == b"content"
            assert fetch_data.anonymous_session("http://a.example/x").proxies["http"] == proxy
        assert len(asked) == 2 and not any("Authorization" in headers for headers, _ in asked)


def test_students_are_stored_in_the_one_format():
    vocab = HERE / "weights" / "demo" / "spiece.model"
    shape = dict(zip(KEYS, (1300, 16, 4, 32, 1, 1, 2)))
    published = {"t5-small": shape | {"model_type": "t5"}}
    with data_home() as home, patch.dict(fetch_data.STUDENTS, published):
        small_t5(**shape).save(home / "theirs")
        files = {"t5-small/model.safetensors": home / "theirs" / "model.safetensors"}
        with patch("fetch_data.download", lambda name: files.get(name, vocab)):
            folder = fetch_data.ensure("t5-small")
        assert folder == home / "weights" / "t5-small" == fetch_data.ensure("t5-small")
        ours, theirs = (t5.T5.load(x).state_dict() for x in (folder, home / "theirs"))
        assert same_weights(ours, theirs)
        assert (folder / "spiece.model").read_bytes() == vocab.read_bytes()


CQA = '{"question": "Which is %d?", "choices": ["%d", "x", "y", "z", "é"], "answer": "%d"}'
CQA_LINES = [CQA % (i, i, i) for i in range(20)]
PALM = [f"Because. So the answer is (a) {i}.\n\nQ:" for i in range(20)]
ESNLI = '{"premise": "P %s.", "hypothesis": "H.", "label": 1}\n'
ARCHIVE = {
    "datasets/cqa/cqa_train.json": "\n".join(CQA_LINES),
    "datasets/cqa/cqa_test.json": CQA_LINES[0],
    "datasets/cqa/llm/train_CoT_0.json": json.dumps(PALM[:15]),
    "datasets/cqa/llm/train_CoT_1.json": json.dumps(PALM[15:]),
    "datasets/anli1/anli1_test.json": '{"premise": "P.", "hypothesis": "G.", "label": 0}',
} | {f"datasets/esnli/esnli_{split}.json": ESNLI % split for split in fetch_data.SPLITS}


def make_archive(folder, **changes):
    """datasets.zip in `folder`; changes by the member's stem, None leaves it out."""
    with zipfile.ZipFile(folder / "datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in ARCHIVE.items():
            if (content := changes.get(Path(name).stem, content)) is not None:
                archive.writestr(name, content)
    return folder / "datasets.zip"


def test_archive_gives_tasks_in_their_formats():
    with data_home() as home:
        archive = make_archive(home)
        folder = fetch_data.ensure("cqa", archive)
        train, valid, test = (lines_of(folder / f"{split}.jsonl") for split in fetch_data.SPLITS)
        assert (len(train), len(valid), len(test)) == (18, 2, 1)  # the last tenth is held out
        text = "Which is 3?\nAnswer Choices:\n(a) 3\n(b) x\n(c) y\n(d) z\n(e) é"
        assert train[3] == {"input": text, "label": "3"}
        assert valid[1]["label"] == "19" and test[0]["label"] == "0"
        palm = lines_of(fetch_data.palm_samples("cqa", archive))
        assert [row["question"] for row in palm] == [row["input"] for row in train + valid]
        asked = train[15]["input"]
        assert palm[15] == {"question": asked, "slot": 0, "text": PALM[15], "finish": "stop"}
        task = fetch_data.load_task("esnli", archive=archive)
        assert task.valid == [("P valid.</s>H.", "neutral")] and task.options == fetch_data.NLI
        missing = "anli1_train.json is missing; get the whole datasets.zip"
        refused(lambda: fetch_data.ensure("anli1", archive), missing)
        archive.unlink()
        assert folder == home / "data" / "cqa" == fetch_data.ensure("cqa")  # at once
        assert fetch_data.palm_samples("cqa").name == "teacher-palm.jsonl"
        refused(lambda: fetch_data.palm_samples("demo"), "cqa, anli1, esnli only")


def test_broken_archive_names_member_and_line():
    choices = '{"question": "q", "choices": ["a", "b", "c", "d", "e"]'
    for member, content, expected in (
        ("cqa_train", "\n".join(CQA_LINES[:4]) + "\n{oops\n", "cqa_train.json line 5"),
        ("cqa_train", CQA_LINES[0] + f"\n{choices}}}", "cqa_train.json line 2: KeyError 'answer'"),
        ("cqa_train", choices.replace(', "e"', "") + ', "answer": "a"}', "line 1: ValueError"),
        ("cqa_train", choices + ', "answer": "f"}', "line 1: ValueError"),
        ("cqa_train", "[1]", "line 1"),
        ("cqa_train", "[" * 100_000, "RecursionError"),
        ("cqa_train", CQA_LINES[0].encode() + b"\n\xff\xfe\n", "UnicodeDecodeError"),
        ("train_CoT_1", json.dumps(["too few"]), "16 rationales, 20 questions"),
        ("train_CoT_0", None, "5 rationales"),
        ("train_CoT_1", "{", "train_CoT_1.json"),
    ):
        of_task = member == "cqa_train"
        call = fetch_data.ensure if of_task else fetch_data.palm_samples
        with data_home() as home:
            archive = make_archive(home, **{member: content})
            refused(lambda: call("cqa", archive), expected, "datasets.zip")
            made = "train" if of_task else "teacher-palm"
            assert not Path(f"data/cqa/{made}.jsonl").exists()  # whole or not at all
    with data_home() as home:
        archive = make_archive(home)
        with patch("fetch_data.MEMBER_LIMIT", 1000):
            refused(lambda: fetch_data.ensure("cqa", archive), "unpacks to")
        raw = archive.read_bytes()
        zeros = raw[:80] + bytes(10) + raw[90:]
        for damaged, expected in ((zeros, "cqa_train.json"), (raw[:500], "no readable zip file")):
            archive.write_bytes(damaged)
            refused(lambda: fetch_data.ensure("cqa", archive), expected)


def test_published_questions_and_answers():
    """[DSS]'s splits; PaLM and two votes of five of gpt-3.5-turbo are right as often as known."""
    archive, answers = SHARED / "upstream/datasets.zip", SHARED / "teacher/svamp_train.jsonl"
    if not all(path.exists() for path in (SHARED / "mirror", archive, answers)):
        raise Skip("no ../shared with SVAMP.json, datasets.zip and answers of teachers")

    def splits_of(name: str, *archive: Path) -> list[bytes]:
        folder = fetch_data.ensure(name, *archive)
        return [(folder / f"{split}.jsonl").read_bytes() for split in fetch_data.SPLITS]

    with data_home(SHARED / "mirror") as home:
        splits = splits_of("svamp")
        (home / "data/svamp").rename("first")
        assert splits_of("svamp", archive) == splits
        task = fetch_data.load_task("svamp")
        palm = lines_of(fetch_data.palm_samples("svamp", archive))
        for name, counts in (("svamp", [720, 80, 200]), ("cqa", [8767, 974, 1221])):
            assert [rows.count(b"\n") for rows in splits_of(name, archive)] == counts
        fetch_data.palm_samples("cqa", archive)
    polls = {"palm": [(row["question"], [row["text"]]) for row in palm], "turbo": []}
    for row in lines_of(answers):
        if row["source"] == "gpt-3.5-turbo":
            random.Random(row["input"]).shuffle(row["samples"])
            polls["turbo"] += [(row["input"], row["samples"][k : k + 5]) for k in (0, 5)]
    gold = {fetch_data.fold(example.input): example.label for example in task.train + task.valid}
    bounds = {"palm": (800, 0.735, 0.0101), "turbo": (1128, 0.83, 0.02)}
    for name, (total, rate, most) in bounds.items():
        slots = [[(text, "stop") for text in texts] for _, texts in polls[name]]
        votes = [qcrd.vote_on(task, x, row) for (x, _), row in zip(polls[name], slots)]
        labels = [gold[fetch_data.fold(x)] for x, _ in polls[name]]
        right = [fetch_data.is_right("number", v.best, label) for v, label in zip(votes, labels)]
        assert len(votes) == total and abs(np.mean(right) - rate) < most, (name, np.mean(right))
    assert sum(vote.answers.count(None) for vote in votes) < 30
    assert abs(np.mean([len(vote.positives) for vote in votes]) - 3.87) < 0.05


def shapes(*texts):
    """The sentences of texts, without names, things and numbers."""
    names = "|".join(fetch_data.PEOPLE + fetch_data.THINGS)
    return set(re.split(r"\n|(?<=[.?]) ", re.sub(rf"\b({names}|\d+)\b", "_", "\n".join(texts))))


def test_demo_problems():
    """The splits, whose texts and labels stay the same for ever, tell the same sentences."""
    splits = [fetch_data.demo_problems(split) for split in fetch_data.SPLITS]
    every = sum(splits, ())
    assert [*map(len, splits)] == [400, 400, 1000] and len({p.text for p in every}) == 1800
    digest = hashlib.sha256("".join(p.text + p.label for p in every).encode()).hexdigest()
    assert digest.startswith("112f0fd44ad8d4f0"), digest
    taught = [kind for kind in fetch_data.MOVES if kind in fetch_data.TAUGHT]
    assert [fetch_data.MOVES[kind].op for kind in taught] == ["+", "-", "*", "/", "?"]
    for p in every:
        in_label, in_text = (Counter(re.findall(r"\d+", text)) for text in (p.label, p.text))
        assert in_label <= in_text and fetch_data.value(p.label) > 0, p
        assert set(taught) & {kind for kind, _ in p.steps}, p
    told = [shapes(*(p.text for p in part)) for part in splits]
    assert told[0] == told[1] == told[2] and len(told[0]) > 30, told
    with data_home() as home:
        task = fetch_data.load_task("demo")
        assert task.folder == home / "data" / "demo" and task.kind == "number"
        assert task.test[7] == (splits[2][7].text, splits[2][7].label)


def test_demo_student_is_pretrained_apart_from_the_demo():
    """No problem, no kind of step that the demo teaches, no calculation in the teacher's words."""
    texts, pairs = fetch_data.pretraining_data()
    every = sum(map(fetch_data.demo_problems, fetch_data.SPLITS), ())
    asked = [x.partition(": ")[2] for x, _ in pairs]
    assert len(texts) > 1000 and asked and not {p.text for p in every} & {*texts, *asked}
    shown = shapes(*asked)  # two of the kinds are told in a known sentence, asked for in a new one
    assert len(shown) > 30 and all(shapes(p.text) - shown for p in every)
    said = [fetch_data.teacher_answer(p, 0, 0.7) for p in fetch_data.demo_problems("train")]
    taught = shapes(*(read_sample("number", text).rationale for text in said))
    taught = {sentence for sentence in taught if "=" in sentence}
    corpus = [*texts[::6], *asked[::20], *(target for _, target in pairs[::10])]
    assert taught and not taught & shapes(*corpus)
    assert "<Answer>" in said[0] and not re.search("<Answer>|matter", "\n".join(corpus))
    with data_home() as home, patch("fetch_data.pretraining_data", lambda: (texts, pairs)):
        made = fetch_data.pretrain_demo(home / "demo", steps=2)
        tokenizer = t5.Tokenizer(made / "spiece.model")
        assert sum(path.stat().st_size for path in made.iterdir()) < 3_000_000
        ascii_text = "".join(map(chr, range(33, 127)))
        for text in ("Luke scored 84 of 1,024 (or ~3)!", ascii_text, "( ( 100.0 - 7.0 ) / 365.0 )"):
            assert tokenizer.decode(tokenizer.encode(text)) == text, text


def test_demo_teacher_over_http():
    url, server = fetch_data.demo_teacher()
    model = requests.get(url + "/models").json()["data"][0]["id"]
    problem, other = fetch_data.demo_problems("train")[:2]
    prompt = fetch_data.messages(empty_task("number"), problem.text, own=other.text)

    def ask(**fields):
        body = {"model": model, "messages": prompt, **fields}
        return requests.post(url + "/chat/completions", json=body)

    def texts(**fields):
        return [choice["message"]["content"] for choice in ask(**fields).json()["choices"]]

    expected = [fetch_data.teacher_answer(problem, 40 + i, 0.7) for i in range(5)]
    assert texts(n=5, seed=40, temperature=0.7) == expected and len(set(expected)) > 1
    (greedy,) = texts(temperature=0)
    assert read_sample("number", greedy).answer == problem.label, greedy
    cut = ask(max_tokens=6, n=2).json()
    assert [choice["finish_reason"] for choice in cut["choices"]] == ["length"] * 2
    assert cut["usage"]["completion_tokens"] == 12
    other = ask(messages=[{"role": "user", "content": "How many stars?"}])
    assert other.status_code == 400 and "the demo's questions alone" in other.text
    for fields in ({"n": 200}, {"temperature": "hot"}, {"max_tokens": -1}, {"seed": "x"}):
        assert ask(**fields).status_code == 400, fields
    for body in (b"", b"{", b"[]", b'{"messages": []}', b"[" * 100_000):
        assert requests.post(url + "/chat/completions", data=body).status_code == 400
    for port in (server.server_port, 99999):
        refused(lambda: fetch_data.demo_teacher(port), f"port {port} cannot be used")


def test_demo_teacher_errs_as_the_paper_saw():
    right = positives = unanimous = 0
    for problem in fetch_data.demo_problems("train") + fetch_data.demo_problems("valid"):
        slots = [(fetch_data.teacher_answer(problem, seed, 0.7), "stop") for seed in range(5)]
        vote = qcrd.vote_on(NUMBERS, problem.text, slots)
        greedy = read_sample("number", fetch_data.teacher_answer(problem, None, 0)).answer
        assert fetch_data.is_right("number", greedy, problem.label) and None not in vote.answers
        right += vote.answers.count(fetch_data.answer_key("number", greedy)) / 5
        positives += len(vote.positives)
        unanimous += not vote.negatives
    assert 0.7 < right / 800 < 0.8 and 3.7 < positives / 800 < 4.1 and 0.5 < unanimous / 800 < 0.6


CHOICES = "Where do people keep jam?\nAnswer Choices:\n(a) cellar\n(b) train\n"
CHOICES += "(c) kitchen cupboard\n(d) train station\n(e) math problem"
QUESTION_OF = {"choice": CHOICES, "nli": "A dog runs.</s>It sits.", "number": "How many sweets?"}

# kind and answer ("": none), then texts of models, between bars, in which a person reads it.
FORMS = r"""
number 42 | <Explanation>: Half of 84 is 42. <Answer>: ( 84 / 2 ) | <Answer>: 84 / 2 = 42
  | **<Explanation>:** Half of 84.\n**<Answer>:** (84 / 2). | <Answer>: ( 42 sweets ) | #### 42
  | There are 84 for 2. The answer is (84 / 2). | Half of 84.\nAnswer: 42 | ANSWER:\n\n42
  | Thus \boxed{42}. | We get $84 / 2 = \boxed{42}$ each. | The answer is \(6 \times 7\).
  | Final Answer: The final answer is: $\boxed{\frac{84}{2}}$. I hope it helps. | Answer = 42
  | ### Solution\nHalve it.\n\n**The answer is 42.** | The answer is **42**. | **Answer:** 42 sweets
  | The answer is 42 sweets for each of 2. | So, the answer to it is 6 * 7. | Answer: 42 (21 each)
  | The answer is 6 × 7. | The answer is 84 ÷ 2. | The answer is 6 x 7. | The answer is 50 − 8.
  | The answer is ((12 - 10) + 40)). | My answer is 4. Wait. The answer is 42. | The answer is 042%.
  | The answer is 42. I hope this answer is helpful! | <think>The answer is 8.</think>It is 42.
  | 84 shared by 2 are 42 each. | Each child has 84 / 2 = 42 sweets. | Each has\n84 / 2
  | Half of 84. The answer is 42.\n\nQ: How many?\nA: The answer is 3. | A 3-day trip: 42.
number -1234.5 | the answer is $-1,234.50. | The answer is -(1234 + .5)
number | <think>The answer is 7? Let me see | How many were there? | The answer is (some - 12).
  | The answer is (2 * y). | The answer is (a pen + 4 pens). | The answer is (3 + 4) and (6 - 2).
  | So 491 - 216. The answer is ((491 - 21 | The answer is 9**9**9. | Answer: 1 / 0. | Answer: no.
choice kitchen cupboard | <Explanation>: Jam keeps there. <Answer>: (c) kitchen cupboard.
  | So the answer is (c). | Answer: C) kitchen cupboard | The answer is kitchen cupboard, I think.
  | c. kitchen cupboard | Jam belongs into the kitchen cupboard. | The answer is \boxed{\text{(c)}}
choice train station | The correct answer is option (d). | Final answer: **(d) train station**
  | The answer is a train station. | So the answer is (d).\n\nQ: Red?\nAnswer Choices:\n(a) blood
choice train | The answer is B. The others make no sense.
choice | So the answer is one of these. | So the answer is (h). | The cellar or the train.
nli neutral | <Explanation>: Who knows. <Answer>: neutral | So the answer is Neutral. | A: neutral.
  | <Answer>: <neutral> | Label = neutral | The answer is \(neutral\).
  | Nothing is said of it.\n\n**Neutral** | Answer: neutral, nothing is said of the girls.
  | So the answer is neutral.\n\nPremise: A dog.\nHypothesis: It sits.\nAnswer: entailment
nli | It could be entailment or neutral.
text Dr. No | The answer is Dr. No. | So the answer is "Dr. No". | It is \boxed{\text{Dr. No}}.
text 05/17/2021 | Two weeks later. <Answer>: 05/17/2021.
text | It is a Monday, I think.
"""


def answer_forms():
    """kind, what a model says, the answer in it or None."""
    for block in re.split(r"\n(?! )", FORMS.strip()):
        head, *texts = re.split(r"\s+\|\s", block)
        kind, _, answer = head.partition(" ")
        for text in texts:
            yield kind, text.replace("\\n", "\n"), answer or None


def test_answers_as_models_write_them():
    for kind, said, wanted in answer_forms():
        sample = read_sample(kind, said, QUESTION_OF.get(kind, "What?"))
        found = fetch_data.answer_key(kind, sample.answer)
        assert found == fetch_data.answer_key(kind, wanted), (said, sample, wanted)
        assert (wanted is None) == (sample.answer is None), (said, sample)
    for kind, said, wanted in (  # the length limit cut these
        ("number", "<Explanation>: There are 84 for 2, so 42", None),
        ("number", "<Explanation>: Half. <Answer>: ( 84 / 2 ) + 1", None),
        ("number", "<Explanation>: Half. <Answer>: ( 84 / 2 )\n<Explan", "( 84 / 2 )"),
        ("nli", "So it is neutral, while", None),
    ):
        assert read_sample(kind, said, cut=True).answer == wanted, said


def test_rationale_is_cleaned():
    half = "Half of 84 is 42."
    for said, wanted in (
        ("<Explanation>: Half of 84 is 42. <Answer>: ( 84 / 2 )", half),
        ("**<Explanation>**: Half of 84 is 42.\n\n**<Answer>**: 42", half),
        ("Half of 84 is 42. So the answer is 42.", half),
        ("Rationale: Half of 84 is 42. Hence the answer is Answer: 42", half),
        ("Half of 84 is 42. The answer is 42.\n\nQ: How many?\nA: 4.", half),
        ("<think>The answer is 3?</think>\nHalf of 84 is 42.\n\n**Answer:** 42", half),
        ("Half of 84 is 42. This gives \\boxed{42} sweets.", half),
        ("84 ÷ 2 = 42 and 6 × 7 = 42. The answer is 42.", "84 / 2 = 42 and 6 * 7 = 42."),
        ("The answer is 42.", ""),
        ("Half of 84 is 42", "Half of 84 is 42"),  # a student's
        ("Half \ud83d is 42. The answer is 42.", "Half ? is 42."),  # half an emoji, cut
    ):
        sample = read_sample("number", said)
        assert (sample.rationale, fetch_data.value(sample.answer)) == (wanted, 42), (said, sample)


def test_no_answer_is_an_exception_or_takes_long():
    rng, forms = random.Random(0), [said for _, said, _ in answer_forms()]
    pieces = ["(" * 50, "{" * 50, "\\boxed{", "the answer ", "so, ", "####", " \n", "-", "**", ","]
    pieces += [".", "=", "\0", "९", "½", "\ud800", "9" * 40, "\\frac{1}{", "</think>", "<think>"]
    pieces += ["\n\t ", "answer to ", "(1+", "1,", "a. ", "\n(a) ", "The answer is 1\n", "e9", "x"]
    pieces += ["<Explanation>:", "<Answer>:", "1 a", "1 * "]
    texts = [piece * n for piece in pieces for n in (100, 400_000 // len(piece))]
    for _ in range(1500):
        text = rng.choice(forms)
        for _ in range(rng.randrange(4)):
            at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            cut, swapped = text[:at] + text[end:], text[end:] + text[:at]
            text = rng.choice([cut, swapped, text[:at] + rng.choice(pieces)])
        texts.append(text)
    for kind, text in ((kind, text) for text in texts for kind in fetch_data.FORMS):
        start = time.perf_counter()
        rationale, answer = read_sample(kind, text, QUESTION_OF.get(kind, "What?"))
        assert time.perf_counter() - start < 2, (kind, text[:50])
        assert answer is None or 0 < len(answer) <= 300, (kind, text[:50])
        assert kind != "number" or not answer or fetch_data.value(answer) is not None, text[:50]
        rationale.encode()


def test_value_is_arithmetic_and_nothing_else():
    values = {"( 84.0 / 2.0 )": 42, "-(3 + 4) * 2": -14, "1,234.5": 1234.5, "6 × 7": 42, "--5": 5}
    values |= {"84 ÷ 2": 42, "5 − 8": -3, ".5": 0.5, "007": 7, "1 / 3": 1 / 3, "((((1))))": 1}
    values |= {"-" * 199 + "1": -1, "(" * 99 + "1" + ")" * 99: 1}
    for text, wanted in values.items():
        assert abs(fetch_data.value(text) - wanted) < 1e-12, text
    none = "12,34|1 / 0|9**9|9**9**9|7 // 2|5 % 3|(1)(2)|()||1 2|1.2.3|1e5|0x10|x|len('a')|3 +"
    none += "|__import__('os')|４２|1\n+ 2|True|...|1 + ... + 9|" + "9" * 16
    hard = ["1+" * 100 + "1", "(" * 150 + "1", "1" + "0" * 14 + "* 999999999999999" * 11]
    for text in none.split("|") + hard:
        assert fetch_data.value(text) is None, text
    right = fetch_data.is_right
    assert right("number", "1 / 3", "0.33333") and not right("number", "0.3332", "1 / 3")
    assert right("number", "-0.00001", "0") and not right("number", "1 / 0", "1 / 0")
    assert right("choice", "Stand by the  door.", "stand by the door")
    assert not right("text", "-5", "5") and not right("text", "", "")


SAME = [("e\u0301t\u00e9.", "ÉTÉ"), ("  The  door. ", "the door"), ("“yes”", "Yes")]
SAME += [("ß", "SS"), ('"Dr. No.".', "dr. no"), ("``x''", "x"), ("हाँ।", "हाँ"), ("是。", "是")]
SAME += [("...", "...")]
OTHER = """की का, กี่ กา, ใช่ ไม่ใช่, கி கு, C# C, 10% 10, < >, ✓ ✗, -5 5, $5 5., a* a, + -, _x_ x
C++ C#, 5' 5", __init__ init, < <=, × *, ÷ /, C:\\a C:\\b, Yahoo! Yahoo, ? !, . :, { }, ** *
e\u0301 e, yes/no yes, non-toxic toxic"""
OTHER = [("3.5", "3 5"), ("Dr. No", "No"), *(tuple(p.split()) for p in re.split(", |\n", OTHER))]


def test_text_answers_compare_as_texts():
    """By NFC, case, white space, quotes and final stops; nothing else is dropped."""
    is_right = partial(fetch_data.is_right, "text")
    for a, b in SAME + OTHER:
        keys = [fetch_data.answer_key("text", text) for text in (a, b)]
        assert all(keys) and (keys[0] == keys[1]) == ((a, b) in SAME), (a, b, keys)
    labels = tuple(dict.fromkeys(sum(OTHER, ())))
    forms = ("{}", '"{}".', "{}\nDone.", "\\boxed{{{}}}", "**{}**", "“{}”, as said")
    for label, form in product(labels, forms):
        said = f"<Explanation>: It is so. <Answer>: {form.format(label)}"
        for options in ((), *((pair for pair in OTHER if label in pair)), labels):
            if not options and ("said" in form or "{" in form and label in "{}**"):
                continue  # the words behind it are part of a free answer
            answer = read_sample("text", said, options=options).answer
            for gold in options or labels:
                assert is_right(answer, gold) == is_right(label, gold), (said, options, gold)
    words = ("rice", "ice", "C", "C#", "train", "train station", "yes")
    for said, wanted, *options in (
        ("It must be ice, of course", "ice", *words),
        ("C# (the language) it is.", "C#", *words),
        ("They meet at the train station.", "train station", *words),
        ("Go to the train or the train station.", None, *words),
        ("So *yes*; rice-like things are not meant.", "yes", *words),
        ("**Answer: yes.**", "yes", *words),
        ("**Answer: yes**", "yes"),
        ("Answer: ** yes", "yes"),
        ("The answer is $x + 1$.", "x + 1"),
    ):
        assert read_sample("text", said, options=options).answer == wanted, said
    assert not is_right("x" * 1000 + "a", "x" * 1000 + "b")
    line = b'{"input": "What?", "label": "\\u200b"}'
    assert fetch_data.parse_example(line, "text", "here").label
    refused(lambda: fetch_data.parse_example(line.replace(b"200b", b"00a0"), "text", "f:1"), "f:1")


def test_broken_data_files_name_line_and_remedy():
    good = b'{"input": "One and one?", "label": "2"}\n'
    misshapen = (b"no JSON", b"[" * 5000, b'{"input": "1?"}', b"[1, 2]", b'"text"')
    misshapen += (b'{"input": ["1?"], "label": "2"}', b'{"input": "1?", "label": true}')
    with data_home() as home:
        for raw, words in (
            *((good + raw, ':2: not like {"input": "text"') for raw in misshapen),
            (b'{"input": " ", "label": "2"}\n', ":1: an empty input or label"),
            (b"\n\n", ": holds no question"),
            (good + b'{"input": "\xe9", "label": "2"}\n', ":2: not UTF-8; save the file as UTF-8"),
            (b'{"input": "half \\ud800", "label": "2"}\n', ":1: not UTF-8"),
            (good.decode().encode("utf-16"), ":1: not UTF-8"),
            (b'{"input": "1?", "label": "two"}\n', ":1: label 'two' is no number and no equation"),
        ):
            folder = task_folder(home / "mine", train=good * 3, test=raw)
            text = refused(lambda: fetch_data.load_task(str(folder), "number"))
            assert text.startswith(f"{folder / 'test.jsonl'}{words}"), (raw, text)
        nli = task_folder(home / "nli", train=good, test=[("It rains.</s>It is wet.", "maybe")])
        labels = ":1: label 'maybe' must be one of entailment, neutral, contradiction"
        refused(lambda: fetch_data.read_split(nli / "test.jsonl", "nli"), labels)
        refused(lambda: fetch_data.load_task(str(nli)), "too short to hold out")
        (nli / "test.jsonl").unlink()
        refused(lambda: fetch_data.load_task(str(nli)), "test.jsonl: no such file; a task needs")
        refused(lambda: fetch_data.load_task("absent"), "neither a folder")


def test_a_folder_is_a_task():
    rows = [(f"{i} + {i}?", str(2 * i % 4)) for i in range(20)]
    number = b'\xef\xbb\xbf{"input": "0?", "label": 0}\n'
    with data_home() as home, redirect_stderr(io.StringIO()) as printed:
        folder = task_folder(home / "mine", train=rows, test=rows[:3], number=number)
        task = fetch_data.load_task(str(folder), "number")
        assert task.folder == home / "data" / "mine" and task.options == ()
        assert [len(x) for x in (task.train, task.valid, task.test)] == [18, 2, 3]
        assert "the last 2 training questions" in printed.getvalue()
        assert fetch_data.load_task(str(folder)).options == ("0", "2")  # as text: two labels
        assert fetch_data.read_split(folder / "number.jsonl", "number") == [("0?", "0")]


def test_prompts_end_in_a_form_that_the_parser_knows():
    for kind, question in (QUESTION_OF | {"text": "How was it?"}).items():
        system, user = fetch_data.messages(empty_task(kind), question)
        assert (system["role"], user["role"]) == ("system", "user")
        assert "</s>" not in user["content"] and question[:5] in user["content"]
        sample = read_sample(kind, system["content"].splitlines()[-1], question)
        assert sample.rationale == "your explanation", sample
        assert fetch_data.answer_key(kind, sample.answer), sample
    few = empty_task("text", options=("good", "bad"))
    assert "one of: good, bad." in fetch_data.messages(few, "How was it?")[0]["content"]
    own = fetch_data.messages(few, "How was it?", "My own prompt.\n")
    assert [message["content"] for message in own] == ["My own prompt.", "How was it?"]


def test_fetch_data_refuses_in_one_line():
    with data_home():
        cases = {"nonsense": "not one of demo, svamp", "t5-small": "no such file in the mirror"}
        cases |= {"cqa --archive nowhere.zip": "nowhere.zip", "serve-teacher --port 70000": "70000"}
        for words, expected in cases.items():
            assert expected in mistake(fetch_data, *words.split()), words
        text = command(fetch_data)
        assert "QCRD_MIRROR" in text and "--archive" in text
        refused(lambda: python(HERE / "fetch_data.py", "nonsense"), "error: non", kind=RuntimeError)


# ----------------------------------------------------------------------------------------- qcrd.py

NUMBERS = fetch_data.Task("sums", "number", Path("data/sums"), [], [], [], ())


def tiny_folder(folder: Path, seed: int = 0, dropout: float = 0.0) -> Path:
    """A random T5 of 30,000 parameters over the demo's vocabulary, as a folder for --model."""
    demo = HERE / "weights/demo"
    rows = json.loads((demo / "config.json").read_text())["vocab_size"]
    tiny = small_t5(seed, vocab_size=rows, d_kv=4, d_ff=32, dropout_rate=dropout)
    tiny.save(folder, vocab=demo / "spiece.model")
    return folder


def tiny_config(**changes) -> qcrd.Config:
    small = {"model": "demo", "device": "cpu", "batch": 5, "rationale_tokens": 20}
    return qcrd.resolve(qcrd.Config(**small | changes))


@contextmanager
def toy_run(seed: int = 0, **changes):
    """Questions with 3, 2, 0, 0, 1 positives and 3, 0, 1, 1, 1 negatives, two of the student's."""
    sets = [(["one and one", "2 in all", "5 + 3"], ["3 apples", "no"]), (["7", "4 times 3"], [])]
    sets += [([], ["wrong"]), ([], []), (["10 - 4 = 6"], ["10 + 4 = 14"])]
    with scratch() as folder:
        model = tiny_folder(folder / "tiny", seed)
        student = qcrd.Student(model, tiny_config(model=str(model), **changes))
        D = qcrd.discriminator_of(student, student.config)
        run = qcrd.Run(student.config, student, D, folder)
        run.task = NUMBERS
        for i, both in enumerate(sets):
            example = Example(f"Tom has {i + 2} apples and {3 * i} pears. All?", f"{i + 2} + {i}")
            run.train.append(student.question(example, f"train {i}", *both))
        run.train[0].from_past.append(array("i", student.tokenizer.encode("the student's own")))
        run.train[3].from_past.append(array("i", [7, 8, 9, 4, 11]))
        run.valid = run.train
        yield run


def fingerprint(model: torch.nn.Module) -> float:
    return sum(p.double().abs().sum().item() for p in model.parameters())


def gradients(model: torch.nn.Module) -> torch.Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def test_L_D_by_hand():
    """Eq. (2): the gradient by an s is exp(s) / its set's sum / 2 questions, as in -2 / 3.5 / 2."""
    powers = [[2, 1.5], [2.5, 2.5, 2], [1, 2, 2.5], [1, 1.5]]  # of A's, B's positives; negatives
    scores = [torch.tensor(row).log().requires_grad_() for row in powers]
    L_D = qcrd.L_D_eq2(scores[:2], scores[2:])
    assert abs(L_D.item() - (math.log(5.5 / 3.5) + math.log(2.5 / 7)) / 2) < 1e-6
    L_D.backward()
    expected = [[-2 / 7, -3 / 14], [-5 / 28, -5 / 28, -1 / 7], [1 / 11, 2 / 11, 5 / 22], [0.2, 0.3]]
    assert all(torch.allclose(s.grad, torch.tensor(row)) for s, row in zip(scores, expected))
    higher = [s + 0.3 for s in scores]
    assert abs(L_D - qcrd.L_D_eq2(higher[:2], higher[2:])) < 1e-6  # its level is open
    s = [torch.tensor(row) for row in ([1 / 2, 3 / 4], [1 / 2], [3 / 4], [1 / 4, 1 / 2])]
    logits = [row.logit() for row in s]
    A = (math.log(2) + math.log(4 / 3)) / 2 + math.log(4)
    B = math.log(2) + (math.log(4 / 3) + math.log(2)) / 2
    for form, expected in (("ce", (A + B) / 2), ("eq2", qcrd.L_D_eq2(s[:2], s[2:]).item())):
        config = tiny_config(discriminator_loss=form)
        assert abs(qcrd.L_D_of(logits[:2], logits[2:], config).item() - expected) < 1e-6, form


def test_eq_3_to_8_by_hand():
    """β 0.2, δ 3: a negative adds 0.2 (1 - s) (3 - ℓ), and 0 from ℓ = 3 on. Two questions, A, B."""
    losses = [0.9, 0.4, 2.0, 2.5, 1.0, 1.5, 3.2, 0.5]
    s = torch.tensor([0.8, 0.5, 0.3, 0.1, 0.6, 1.0, 0.2, 0.9])
    rows, positive = [0] * 5 + [1] * 3, [True, True, False, False, False, True, False, False]
    A, B = 0.2 * (0.7 * 1 + 0.9 * 0.5 + 0.4 * 2), 0.2 * (0 + 0.1 * 2.5)  # all negatives' terms
    by_hand = {  # picked, A + B
        "minmax": ([1, 3, 5, 6], (0.5 * 0.4 + 0.2 * 0.9 * 0.5) + (1.5 + 0)),
        "maxmin": ([0, 4, 5, 7], (0.8 * 0.9 + 0.2 * 0.4 * 2.0) + (1.5 + 0.2 * 0.1 * 2.5)),
        "minmin": ([1, 4, 5, 7], (0.5 * 0.4 + 0.2 * 0.4 * 2.0) + (1.5 + 0.2 * 0.1 * 2.5)),
        "mean": ([*range(8)], (0.72 + 0.2) / 2 + A / 3 + 1.5 + B / 2),
        "wmean": ([*range(8)], (0.72 + 0.2) / 1.3 + A / 2.0 + 1.5 + B / 0.9),  # Σ s, Σ (1 - s)
    }
    questions = [qcrd.Question(Example("", "1"), place, *[array("i")] * 2) for place in "AB"]

    def candidates(losses: list, rows=rows, positive=positive) -> list[qcrd.Candidate]:
        members = zip(rows, positive, losses)
        return [qcrd.Candidate(row, array("i"), p, "teacher", loss) for row, p, loss in members]

    def picked(members: list, config, step: int = 1) -> list[int]:
        return [members.index(c) for c in qcrd.pick(members, questions, config, step)]

    for scheme, (places, expected) in by_hand.items():
        config, values = tiny_config(scheme=scheme), torch.tensor(losses, requires_grad=True)
        members = candidates(losses)
        assert picked(members, config) == places, scheme
        picks = [members[i] for i in places]
        terms = qcrd.contrastive(values[places], s[places], picks, config)
        assert terms.shape == (len(picks),) and abs(terms.sum().item() - expected) < 1e-6, scheme
        terms.sum().backward()
        if scheme == "minmax":  # s of r⁺, -β (1 - s) of r⁻, nothing for B's, which is beyond δ
            assert torch.allclose(values.grad, torch.tensor([0, 0.5, 0, -0.18, 0, 1, 0, 0]))
        if scheme == "wmean":  # where Σ w = 0
            assert qcrd.shares_of(picks, torch.zeros(len(picks)), scheme).eq(0).all()
        weight = qcrd.weights_of(picks, None, "cpu")  # without a discriminator
        share = qcrd.shares_of(picks, weight, scheme)
        sizes = torch.tensor([2, 2, 3, 3, 3, 1, 2, 2]) if "mean" in scheme else torch.ones(4)
        assert weight.eq(1).all() and torch.allclose(share, 1 / sizes), scheme
    for scheme, places in {"minmax": [1, 7], "maxmin": [2, 6], "minmin": [1, 6]}.items():
        ties = candidates([2, 1, 3, 1, 3] * 2, [0] * 10, [True] * 5 + [False] * 5)
        assert picked(ties, tiny_config(scheme=scheme)) == places, scheme  # the first of equals
    members, config = candidates(losses), tiny_config(scheme="sampling")
    drawn = [picked(members, config, step) for step in range(60)]
    assert drawn[7] == picked(members, config, 7)
    assert [len(set(column)) for column in zip(*drawn)] == [2, 3, 1, 2]
    eq_8 = qcrd.total_loss(qcrd.alphas_of(tiny_config(), 3), 2.0, 3.0, 4.0)
    assert abs(eq_8 - (1 + 1.5 + 1.62)) < 1e-9  # α3 is 0.5, 0.45, 0.405


def one_step(run: qcrd.Run) -> float:
    """`iterate`'s α1 · L_pred + α2 · L_cl of all questions; its gradients stay in the model."""
    run.config.batch, run.step = len(run.train), 0
    order = list(range(len(run.train)))
    with patch("qcrd.order_of", return_value=order), patch("qcrd.descend") as descend:
        with patch("qcrd.add_past_negatives"):  # it would replace those that are there
            qcrd.iterate(run, 1)
    assert descend.call_count == run.step == 1
    alphas = qcrd.alphas_of(run.config, 1)
    return float(alphas[0] * run.sums["L_pred"][0] + alphas[1] * run.sums["L_cl"][0])


def plain_loss(run: qcrd.Run, questions: list, n: int, peers=()) -> torch.Tensor:
    """A step's loss done plainly, on `peers` or our T5: for each rationale an encoding, whole
    logits, gradient and score. n: the batch."""
    student, D, config = run.student, run.discriminator, run.config
    network, encoder = peers or (student.model, D and D.encoder.eval())

    def batch(rows: list) -> list[torch.Tensor]:
        return [x.to(student.device) for x in t5.pad(rows)]

    def losses(prefix: list[int], pairs: list) -> torch.Tensor:
        x, x_mask = batch([prefix + q.x.tolist() for q, _ in pairs])
        y, y_mask = batch([target for _, target in pairs])
        start = {"decoder_input_ids" if peers else "target_in": shifted(y)}
        with student.autocast():
            logits = network.train()(x, x_mask, **start)
        return plain_losses(logits[0] if peers else logits, y, y_mask)

    L_pred = losses(student.predict_prefix, [(q, q.target) for q in questions]).sum()
    if config.method in ("finetune", "single"):
        return L_pred / n
    candidates = qcrd.candidates_of(questions, config)
    of_all = losses(student.explain_prefix, [(questions[c.row], c.r) for c in candidates])
    for c, loss in zip(candidates, of_all.tolist()):
        c.loss = loss
    w = [1.0] * len(candidates)
    if D:
        with torch.no_grad(), student.autocast():
            x, mask = batch([questions[c.row].x + c.r for c in candidates])
            memory = encoder(x, mask)[0] if peers else encoder.encode(x, mask)
            logits = D.head(memory.masked_fill(~mask[..., None], -torch.inf).amax(1))
        s = logits.float().sigmoid().squeeze(1).tolist()
        w = [score if c.positive else 1 - score for c, score in zip(candidates, s)]
    picks = set(map(id, qcrd.pick(candidates, questions, config, 0)))  # it has a test of its own
    L_cl = 0.0
    for row, positive in product(range(len(questions)), (True, False)):
        terms, total = 0.0, 0.0
        for c, weight, loss in zip(candidates, w, of_all):
            if (c.row, c.positive) == (row, positive) and id(c) in picks:
                margin = (loss - config.delta).clamp(max=0)
                terms += weight * (loss if positive else -config.beta * margin)
                total += weight if config.scheme == "wmean" else 1
        L_cl += terms / max(total, 1e-30)
    return (config.alpha_pred * L_pred + config.alpha_cl * L_cl) / n


def test_step_equals_the_plain_mathematics():
    """Value and every gradient, whatever the micro-batch; negatives beyond δ are not run again."""
    both = product(qcrd.SCHEMES.split("|"), (True, False))
    cases = [{"scheme": scheme, "discriminator": judged} for scheme, judged in both]
    cases += [{"method": "dss"}, {"method": "finetune"}, {"negative_source": "none"}]
    cases += [{"method": "single"}, {"alpha_pred": 0.2, "alpha_cl": 0.7}]
    left_out, losses_of, calls = 0, qcrd.Student.losses, []

    def spy(student, prefix, questions, targets, rows):
        calls.append((student.model.training, targets))
        return losses_of(student, prefix, questions, targets, rows)

    for number, case in enumerate(cases):
        with toy_run(number, **case) as run:
            config, model = run.config, run.student.model
            for q in run.train if config.method in ("dss", "single") else ():
                del q.S_pos[1:]  # slot 0's rationale, with weight 1
            candidates = qcrd.candidates_of(run.train, config)
            qcrd.measure(run.student, run.train, candidates)
            config.delta = sum(sorted(c.loss for c in candidates if not c.positive)[2:4]) / 2
            expected = plain_loss(run, run.train, 5)
            expected.backward()
            plain = gradients(model)
            calls.clear()
            with patch.object(qcrd.Student, "losses", spy):
                loss = one_step(run)
            assert abs(loss - expected.item()) < 1e-5 * abs(expected.item()), case
            theirs = plain_loss(run, run.train, 5, peers_of(run)).item()
            assert abs(loss - theirs) < 1e-5 * abs(loss), case
            assert (gradients(model) - plain).norm() < 1e-5 * plain.norm(), case
            if config.method not in ("finetune", "single"):
                picks = qcrd.pick(candidates, run.train, config, 0)
                again = [c for c in picks if c.positive or c.loss < config.delta]
                assert sorted(map(id, calls[-1][1])) == sorted(id(c.r) for c in again), case
                passes = [False, True, True] if config.method == "qcrd" else [True, True]
                assert [training for training, _ in calls] == passes, case  # with dropout or not
                left_out += len(picks) - len(again)
            config.micro_batch = 1 + number % 4
            assert abs(one_step(run) - loss) < 1e-5 * abs(loss), case
            assert (gradients(model) - plain).norm() < 1e-5 * plain.norm(), case
            assert not run.discriminator or gradients(run.discriminator).norm() == 0
    assert left_out > 5


def test_step_in_half_precision():
    """fp16's scale falls until the gradient fits into 65,504; until then no weight moves."""
    results = []
    for precision in ("float32", "bfloat16"):
        with toy_run(precision=precision, delta=30.0) as run:
            results += [one_step(run), gradients(run.student.model)]
    a, full, b, half = results
    assert a != b and abs(a - b) < 0.02 * a and (full - half).norm() < 0.1 * full.norm()
    with toy_run(precision="float16", delta=30.0) as run:
        assert run.scaler.is_enabled() and run.d_scaler.is_enabled()
        check = Checks()
        skipped = overflow("toy", run, check)
        norm = gradients(run.student.model).norm() / full.norm().clamp(max=1)  # unscaled, clipped
        assert not check and skipped > 2 and 0.98 < norm < 1.02, (check, skipped, norm)


def test_single_target_is_rationale_then_label():
    with toy_run(method="single") as run:
        encode = run.student.tokenizer.encode

        def target(label: str, *S_pos: str) -> list[int]:
            return run.student.question(Example("How many?", label), "", S_pos).target.tolist()

        start, end = encode("one and one")[:-1], encode("answer: 7")
        assert target("7", "one and one", "no") == start + end
        assert target("7") == end  # an empty slot 0
        cut = target("7", "one and one " * 60)  # the rationale first, at 20 + 64 tokens
        assert len(cut) == 84 and cut[-len(end) :] == end and len(target("7 " * 200)) == 84
        assert run.student.predict_prefix == [] and qcrd.alphas_of(run.config, 1) == (1, 0, 0)


VOTES = "One and one.= 2; One and one.= ( 1 + 1 ); So two.= 2.00001; Three.= 3; So two.= 5"
VOTES = ["<Explanation>: " + text.replace("=", " <Answer>:") for text in VOTES.split("; ")]


def voted(*texts: str | None, finish="stop", rule="majority") -> tuple[qcrd.Vote, tuple]:
    slots = [text if text is None else (text, finish) for text in texts]
    vote = qcrd.vote_on(NUMBERS, "How many?", slots)
    return vote, qcrd.sets_of(vote, rule)


def test_vote():
    """Repetitions, and negatives that are a positive once cut, are dropped after the count."""
    assert qcrd.majority(["7", "8", "8", "7"]) == ("7", [0, 3], [1, 2])  # a tie: the lowest slot
    assert qcrd.majority([None, "8", "7", "7", "8"]) == ("8", [1, 4], [2, 3])
    assert qcrd.majority([None, None]) == (None, [], []) == qcrd.majority([])
    vote, sets = voted(*VOTES)
    assert (vote.positives, vote.negatives) == ([0, 1, 2], [3, 4])
    assert sets == (["One and one.", "So two."], ["Three.", "So two."], "2")
    with toy_run(rationale_tokens=4) as run:
        sets = ["one and one is two", "no"], ["one and one is three", "3", "3", "no"]
        q = run.student.question(Example("How many?", "2"), "", *sets)
    assert [len(r) for r in q.S_pos + q.minority] == [4, 3, 2], (q.S_pos, q.minority)
    assert voted(*VOTES, rule="all")[1] == (["One and one.", "So two.", "Three."], [], "2")
    assert voted(*VOTES[::-1], rule="first")[1] == (["So two."], [], "5")
    assert {tiny_config(method=method).vote for method in ("dss", "single")} == {"first"}
    assert voted("<Explanation>: Perhaps.", rule="first")[1] == (["Perhaps."], [], None)
    assert voted(rule="first")[1] == voted(None, rule="first")[1] == ([], [], None)
    vote, sets = voted("<Explanation>: Perhaps. <Answer>: none", None, VOTES[3])
    assert (vote.positives, vote.negatives, *sets) == ([2], [], ["Three."], [], "3")
    vote, sets = voted("<Explanation>: He has 3 and then 4", finish="length")
    assert (vote.best, vote.positives, vote.negatives, *sets) == (None, [], [], [], [], None)


def test_vote_is_reported():
    """3 + 1 positives, 2 + 1 distinct, 2 + 0 negatives; one majority of two is right."""
    (vote, _), (alone, _), (nothing, _) = voted(*VOTES), voted(VOTES[3], "no idea"), voted(None)
    report = partial(outcome, qcrd.report_votes, NUMBERS)
    examples, chatter = [Example("a", "1 + 1"), Example("b", "4")], "Well, let me think about that"
    text = report(examples, [vote, alone])
    counts = "2.00 positives per question (paper: 3.87), 1.50 distinct; 1.00 negatives"
    assert text.startswith(f"vote: {counts}\n"), text
    assert "50% of 2 questions with positives only" in text and "warning" not in text
    assert "majority right on 50.0%, 1 samples cannot be read" in text
    text = report(examples, [vote, voted(*[chatter] * 5)[0]])
    for expected in ("warning", chatter, "--show-prompt", "--prompt FILE", "--teacher-tokens"):
        assert expected in text, text
    assert "warning" not in report(examples, [vote, nothing])  # what is missing has no format
    assert "hardly ever right" in report([Example("a", "7"), Example("b", "7")], [vote, alone])

    def load(rule: str) -> str:
        task = fetch_data.Task("sums", "number", Path(), examples, [], [], ())
        with toy_run(vote=rule) as run:
            run.train.clear()
            return outcome(qcrd.load_data, run, task, [voted(chatter)[0]] * 2)

    assert "error: no question has a positive" in load("majority") and load("all") == ""


def test_negatives_come_from_the_student_of_j_iterations_ago():
    small = {"iterations": 4, "steps": 4, "lag": 2, "batch": 3, "discriminator_steps": 1}
    small |= {"lr": 1e-2, "rationale_tokens": 4, "label_tokens": 4}
    original, writers = qcrd.past_student, []

    def spy(run, t):
        past = original(run, t)
        writers.append(past and fingerprint(past.model))
        return past

    for source in qcrd.SOURCES.split("|"):
        writers.clear()
        with toy_run(negative_source=source, **small) as run, patch("qcrd.past_student", spy):
            after = [fingerprint(run.student.model)]
            run.lines.append(qcrd.metrics(run, 0, 0.0))
            for t in range(1, 5):
                qcrd.iterate(run, t)
                run.lines.append(qcrd.metrics(run, t, 0.0) | {"valid": float(t == 1)})
                qcrd.save(run)
                after.append(fingerprint(run.student.model))
            kept = {int(path.stem) for path in run.folder.glob("snapshots/*.pt")}
            past = [line["past"] > 0 for line in lines_of(run.folder / "metrics.jsonl")[1:]]
        assert len(set(after)) == 5  # else the next lines say nothing
        expected = {"snapshot": [None, None, after[1], after[2]]}
        expected |= dict.fromkeys(["fixed", "static"], [after[0]] * 4)
        assert writers == expected.get(source, [None] * 4), source
        assert past == [writer is not None for writer in writers]
        # the selected one, the last, and what t = 5 needs
        assert kept == ({1, 3, 4} if source == "snapshot" else {1, 4}), (source, kept)


def test_negatives_are_kept_as_sampled():
    """Each question's are its own: whatever the source, other questions and the batches."""
    with toy_run(negative_source="fixed", rationale_tokens=6, student_samples=3) as run:
        run.valid = []

        def sampled(t: int, seed: int = 0, questions=run.train) -> list:
            run.config.seed = seed
            qcrd.add_past_negatives(run, t, questions)
            return [list(r) for q in run.train for r in q.from_past]

        rows, q = sampled(6), run.train[1]
        assert rows == sampled(6) and rows != sampled(7) and rows != sampled(6, seed=1)
        assert len(rows) > 9 and max(map(max, rows)) < run.student.tokenizer.size
        assert all(t5.EOS not in row[:-1] and (len(row) == 6 or row[-1] == t5.EOS) for row in rows)
        assert sampled(6, questions=[q]) == [list(r) for r in q.from_past] == rows[3:6]
        with patch.object(qcrd.Student, "rows_at_once", return_value=2):
            assert sampled(6) == rows
        run.config.negative_source = "static"
        assert sampled(6) == sampled(7) != sampled(6, seed=1)
        run.config.negative_source, run.config.student_samples = "fixed", 6
        written = [array("i", row) for row in ([1], [], [0, 1], q.S_pos[0], [5, 1], [5, 1])]
        run.config.student_temperature, run.config.iterations = 2.0, 5
        with patch.object(qcrd.Student, "write", return_value=written) as write:
            for end, t in product((0.0, 1.0), (1, 3, 5)):
                run.config.student_temperature_end = end
                qcrd.add_past_negatives(run, t, [q])
        assert [list(r) for r in q.from_past] == [[5, 1]]
        assert [c.args[3] for c in write.call_args_list] == [2.0, 2.0, 2.0, 2.0, 1.5, 1.0]


def test_discriminator_learns_a_separable_toy():
    for form, most in (("eq2", 0), ("ce", 1.0)):  # L_D at s = 1/2: 0, 2 ln 2
        how = {"discriminator_lr": 1e-2, "discriminator_pretrain": 60, "discriminator_loss": form}
        with toy_run(**how) as run:
            D, student = run.discriminator, run.student
            run.train.clear()
            for i in range(12):
                sets = [f"{i} pears are right", f"{i} are right"], [f"{i} apples are wrong"]
                example = Example(f"Ann has {i} pears.", "1")
                run.train.append(student.question(example, f"{i}", *sets))
            before, encoder = fingerprint(student.model), fingerprint(D.encoder)
            assert encoder == fingerprint(student.model.encoder_only())  # --model's, not shared
            pairs = [(q.x, r) for q in run.train for r in q.S_pos]
            s = D.train().score(pairs)
            assert s.shape == (24,) and s.min() > 0 and s.max() < 1 and not s.requires_grad
            assert torch.equal(s, D(pairs).sigmoid()) and not D.training
            qcrd.train_discriminator(run, 0, run.train)
            judged = qcrd.judge_validation(run)
            assert run.L_D < most, (form, run.L_D)
            assert judged["pair"] > 0.95 and judged["pair_student"] is None
            assert judged["s"]["positives"] > judged["s"]["teacher"] + 0.3, judged
            assert fingerprint(student.model) == before and fingerprint(D.encoder) != encoder


def test_discriminator_balances_its_sets():
    with toy_run(negative_source="none") as run:
        assert all(c.positive for c in qcrd.candidates_of(run.train, run.config))  # but D sees some
        rng, last = np.random.default_rng(0), run.train[4]
        for q in run.train[:2]:
            given = q.minority + q.from_past
            S_pos, S_neg = qcrd.balanced_sets(run.student, q, ["x"], rng)
            assert S_pos == q.S_pos and S_neg[: len(given)] == given == q.minority + q.from_past
            assert len(S_neg) == len(S_pos)
        last.from_past = [array("i", [5, 1]), array("i", [6, 1])]
        run.config.discriminator_noise = 1.0
        S_neg, S_pos = qcrd.balanced_sets(run.student, last, ["x"], rng)
        assert S_pos == last.S_pos and len(S_neg) == 3  # k > m stays
    words = "one two three four five six seven eight nine ten".split()
    texts = [qcrd.corrupt(words, ["x"], rng).split() for _ in range(300)]
    kept, replaced = [10 - len(set(words) - {*text}) for text in texts], sum(texts, []).count("x")
    assert max(kept) < 10 and 6.7 < np.mean(kept) < 7.3  # 30 % changes, one word at least
    assert 0.4 < replaced / sum(10 - k for k in kept) < 0.6


def test_discriminator_descends_alpha_3_at_a_falling_rate():
    """The gradient is α3 times L_D's, which the norm's clipping would not show; the rate falls."""

    def trained(t: int, step: int, **changes) -> tuple[float, list[float]]:
        how = {"steps": 10, "iterations": 5, "discriminator_lr": 1e-3, "discriminator_pretrain": 2}
        with toy_run(**how, discriminator_steps=3, **changes) as run, patch("qcrd.descend") as spy:
            run.step = step
            qcrd.train_discriminator(run, t, run.train)
            assert all(c.args[:2] == (run.d_optimizer, run.d_scaler) for c in spy.call_args_list)
            rates = [c.args[2] for c in spy.call_args_list]
            return gradients(run.discriminator).norm().item(), rates

    third, rates = trained(3, 4)
    assert third > 0 and np.allclose(rates, [6e-4] * 3), rates
    for factor, changes in {0.5: {"alpha_d": 0.25}, 1 / 0.81: {"alpha_d_decay": 1.0}}.items():
        assert abs(trained(3, 4, **changes)[0] / third / factor - 1) < 1e-5, changes
    assert trained(3, 4, alpha_d=0.0) == (0, [])
    first, rates = trained(0, 0)
    assert rates == [1e-3] * 2  # constant in pretraining, under --alpha-d 0 of 1 · L_D
    assert abs(trained(0, 0, alpha_d=0.0)[0] / first - 2) < 1e-5
    for n, expected in {1: [2, 3, 4, 5, 6, 7], 2: [3, 5, 7], 3: [4, 7], 0: []}.items():
        config = tiny_config(discriminator_every=n)
        assert [t for t in range(8) if qcrd.updates_discriminator(config, t)] == expected, n
    small = {"iterations": 4, "steps": 8, "batch": 2, "negative_source": "sc", "lr": 1.0}
    small |= {"discriminator_every": 2, "discriminator_steps": 1, "discriminator_lr": 0.1}
    with toy_run(**small) as run, patch("qcrd.descend") as spy:
        for t in range(1, 5):
            qcrd.iterate(run, t)
    calls = [(c.args[0] is run.d_optimizer, c.args[2]) for c in spy.call_args_list]
    students = [(False, 1 - step / 8) for step in range(8)]
    assert calls == [*students[:4], (True, 0.05), *students[4:]]  # D's before iteration 3


def test_order_visits_every_question():
    """Ten steps of 4 questions in three iterations are 3, 3, 4; passes of 10 go on across them."""
    config = tiny_config(batch=4, steps=10, iterations=3)
    parts = [qcrd.order_of(config, 10, t) for t in (1, 2, 3)]
    stream = sum(parts, [])
    assert [len(part) for part in parts] == [12, 12, 16]
    passes = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len(set(map(tuple, passes))) == 4
    config.seed = 1
    assert qcrd.order_of(config, 10, 1) != parts[0]
    few = Counter(qcrd.order_of(config, 3, 3))  # 16 visits of 3 questions, from the 25th on
    assert sorted(few.values()) == [5, 5, 6]


def test_selected_student_is_tested_and_kept():
    """The latest within a standard error, of 100 questions 5 points at 50 %; here not the last."""
    accuracies = "0.9 0.5 0.46 0.44; 0.9 0.44 0.5 0.46 0.5; 0.9; 0.9 0.1; 0.2 1 0.99".split(";")
    for text, expected in zip(accuracies, (2, 4, 0, 1, 1)):
        valid = enumerate(map(float, text.split()))
        lines = [{"iteration": t, "valid": p, "questions": 100} for t, p in valid]
        assert qcrd.selected(lines)["iteration"] == expected, text
    with sums_home() as (flags, _), patch("qcrd.selected", lambda lines: lines[:2][-1]):
        qcrd_main(*flags, "run")
        assert lines_of("run/result.json")[0]["best_iteration"] == 1
        assert {path.name for path in Path("run/snapshots").iterdir()} == {"1.pt", "3.pt"}
        first, last = (t5.read_pt(f"run/snapshots/{t}.pt") for t in (1, 3))
        kept = t5.T5.load("run/student").state_dict()
        assert same_weights(kept, first["student"]) and not same_weights(kept, last["student"])
        judge = t5.read_pt("run/student/discriminator.pt")
        assert [*judge] == ["config", "weights"]
        assert same_weights(judge["weights"], first["discriminator"])
        assert not {"student", "discriminator"} & t5.read_pt("run/checkpoint.pt").keys()


def said(*texts: object) -> tuple:
    """A good answer: status, content, headers."""
    choices = [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]
    return 200, {"choices": choices}, {}


def question_of(body: dict) -> int:
    """The number in "What is 3 plus 3?"."""
    return int(body["messages"][-1]["content"].split()[2])


def sums(body: dict, number: int = 0) -> tuple:
    """What a good teacher says: slot 4 of five is wrong."""
    i = question_of(body)
    texts = [f"<Explanation>: Way {k}, {i} and {i}. <Answer>: {2 * i + k // 4}" for k in range(5)]
    return said(*texts[: body["n"]])


@contextmanager
def asking(answer, **environment: str):
    """An empty home and a server -> `ask_sums` of its address, what the server was sent."""
    with empty_home(**environment), serving(answer) as (url, asked):
        yield partial(ask_sums, url), asked


def ask_sums(url: str, count: int = 4, **changes) -> tuple[list, str]:
    """Asks `count` questions without long pauses -> slots, what is printed and the error's line."""
    config = tiny_config(**{"concurrency": 2, "teacher": url, "task": "sums"} | changes)
    examples = [Example(f"What is {i} plus {i}?", str(2 * i)) for i in range(count)]
    slots = []

    def ask() -> None:
        teacher = qcrd.connect_teacher(config)
        slots.extend(vote.slots for vote in qcrd.votes_of(teacher, NUMBERS, examples, ask=True))

    with patch("qcrd.BACKOFF", 0.002):
        return slots, outcome(ask)


def filled(slots: list) -> int:
    return sum(slot is not None for row in slots for slot in row)


def kept_samples() -> list[str]:
    """The texts in the teacher's one file of samples."""
    (cache,) = Path().rglob("teacher-*.jsonl")
    return [sample["text"] for sample in lines_of(cache) if sample["slot"] >= 0]


def test_teacher_survives_what_servers_do():
    """The first answer to each question is trouble; the second one has one of three forms."""
    huge = json.dumps(said("")) * 1000 + '{"a":' * 5000 + "9**9**9 " * 100_000
    parts = [{"type": "text", "text": "<Answer>:"}, None, {"text": " 1"}, {"text": 2}]
    bare = [None, {"message": None}, *[{"text": "<Answer>: 1", "finish_reason": "stop"}] * 5]
    forms = said(*["<Answer>: 1"] * 4, huge), said(*[parts] * 5), (200, {"choices": bare}, {})
    trouble = [b"<html>bad gateway</html>", b"", b"[" * 100_000, {}, [], None, {"choices": []}]
    trouble += [{"choices": "none"}, {"choices": {"a": 1}}, {"choices": [None]}]
    trouble += [{"error": {"message": "overloaded"}}, {"error": None}]
    trouble = [(200, content, {}) for content in trouble] + [said(None), said(""), said([{}])]
    trouble += [(408, {}, {}), (529, {"error": "down"}, {}), (503, b"<html>", {"Retry-After": "x"})]
    trouble += [(429, {}, {"Retry-After": "1"}), (200, forms[0][1], {"Content-Length": 9_999_999})]
    count, once = len(trouble), set()

    def flaky(body: dict, number: int) -> tuple:
        i = question_of(body)
        return forms[i % 3] if i in once else once.add(i) or trouble[i]

    with asking(flaky) as (ask, asked):
        start = time.monotonic()
        slots, _ = ask(count)
        assert time.monotonic() - start > 1  # Retry-After is kept to
        assert filled(slots) == 5 * count and len(asked) == 2 * count
        assert all(row[0] == ("<Answer>: 1", "stop") for row in slots)
        sent = {(b["model"], b["n"], b["temperature"], b["max_tokens"]) for _, b in asked}
        assert sent == {("demo-teacher", 5, 0.7, 512)}
        assert qcrd.vote_on(NUMBERS, "How many?", slots[0]).positives == [0, 1, 2, 3]
        assert ask(count)[0] == slots and len(asked) == 2 * count  # kept samples
        more, _ = ask(count, samples=7)
        assert [row[:5] for row in more] == slots and len(asked) == 3 * count
        assert {b["n"] for _, b in asked[2 * count :]} == {2}
        ask(1, teacher_temperature=0.5)  # other samples than those
        assert len(asked) == 3 * count + 1
        (cache,) = Path().rglob("teacher-*.jsonl")
        assert len({sample["prompt"] for sample in lines_of(cache)}) == count
        cache.write_bytes(cache.read_bytes()[:-20])  # a kill in the middle of a line
        assert filled(ask(1, teacher_temperature=0.5)[0]) == 5 and asked[-1][1]["n"] == 1


def test_teacher_meets_servers_that_know_less():
    def knows(unknown: str, limit: int, body: dict, number: int) -> tuple:
        if unknown in body and (unknown != "n" or body["n"] > 1):
            return 422, {"error": {"message": f"unknown: {unknown}"}}, {}
        return said(*[f"<Answer>: {body.get('seed')}"] * min(limit, body["n"]))

    # n ignored; two at most; unknown, which is noticed once
    for unknown, limit, expected in (("", 1, 20), ("", 2, 12), ("n", 5, 21)):
        with asking(partial(knows, unknown, limit)) as (ask, asked):
            slots, _ = ask(concurrency=1)
            assert (filled(slots), len(asked)) == (20, expected)
            assert len({slot[0] for slot in slots[0]}) >= 3  # a seed a request
    for name in ("seed", "max_tokens"):
        with asking(partial(knows, name, 5)) as (ask, asked):
            text, remedy = ask(concurrency=1)[1], '{"%s": null}' % name
            assert f"--teacher-fields '{remedy}'" in text and f"unknown: {name}" in text, text
            assert len(asked) <= 6
            assert filled(ask(teacher_fields=f'{remedy[:-1]}, "top_p": 0.9}}')[0]) == 20
            assert asked[-1][1]["top_p"] == 0.9
    # every third is refused alone; a later run asks for them again, in a row, and goes on
    policy = 400, "against \x1b policy", {}
    with asking(lambda body, _: policy if question_of(body) % 3 == 2 else sums(body)) as (ask, _):
        for _ in range(2):
            slots, text = ask(50, concurrency=1)
            assert filled(slots) == 5 * 34 and slots[5] == [None] * 5
            assert "\n  16 questions refused: status 400, against   policy\n" in text, text
    with asking(lambda body, _: policy if question_of(body) > 29 else sums(body)) as (ask, _):
        for _ in range(2):  # too many in a row, in a later run too
            assert "error: teacher" in ask(50, concurrency=1)[1] and len(kept_samples()) == 150
    with asking(lambda body, _: policy if question_of(body) % 3 else sums(body)) as (ask, _):
        assert "refused most questions" in ask(12, concurrency=1)[1] and len(kept_samples()) == 20


KEY = "sk-Secret/0123+456"


def test_teacher_gives_up_early_and_keeps_what_was_served():
    """Few requests, the server's words without the key, what to do, all good samples on disk."""
    later = (429, {"error": "slow down"}, {"Retry-After": "3600"})
    thinks = "a model that thinks first needs more --teacher-tokens"
    unloaded = (400, {"error": "model unloaded"}, {})
    cases = [  # the answer, good ones before, bad ones at most, the words
        (unloaded, 5, 10, "status 400, model unloaded\n"),
        (unloaded, 0, 6, "status 400, model unloaded\n"),
        (said(""), 5, 15, thinks),
        (said(""), 0, 9, thinks),
        ((200, b"<p>Log in</p>", {}), 0, 9, "Log in"),
        (later, 5, 1, "slow down (wait 3600 s); run again later: what was answered is kept"),
        ((503, {"error": "busy"}, {}), 5, qcrd.REPETITIONS + 1, "status 503, busy; run again"),
        ((402, {"error": "Insufficient credit"}, {}), 5, 1, "402, Insufficient credit\n"),
        ((200, None, {}), 5, 4, "is the server running"),
    ]
    echo = {"error": {"message": f"Incorrect API key provided: {KEY}."}}
    hints = {401: "; set OPENAI_API_KEY", 403: "; set OPENAI_API_KEY", 404: "; is --teacher-model"}
    for status, hint in (hints | {301: " (to /v1?k=***); name", 402: "\n"}).items():
        words = f"status {status}, Incorrect API key provided: ***.{hint}"
        cases += [((status, echo, {"Location": f"/v1?k={KEY}"}), 0, 4, words)]
    for bad, good, most, words in cases:
        server = asking(lambda body, n: sums(body) if n <= good else bad, OPENAI_API_KEY=KEY)
        with server as (ask, asked):
            text = ask(50, concurrency=1)[1]
            last = text.strip().splitlines()[-1] + "\n"
            assert last.startswith("error: teacher http") and words in last, text
            assert good < len(asked) <= good + most, (words, len(asked))
            assert len(kept_samples()) == 5 * good
            files = [path.read_text() for path in Path().rglob("*") if path.is_file()]
            assert not any("Secret" in part for part in [text, *files])

    # the last of four at once is refused; the others are answered later, and kept
    late = threading.Event()

    def expires(body: dict, number: int) -> tuple:
        if number < 4:
            return late.wait(5) and sums(body)
        threading.Timer(0.3, late.set).start()
        return 401, {"error": "expired"}, {}

    with asking(expires) as (ask, asked):
        text = ask(50, concurrency=4)[1]
        assert "status 401, expired; set OPENAI_API_KEY" in text and len(asked) == 4, len(asked)
        assert len(kept_samples()) == 15 and "  15 samples, 4 requests\n" in text, text


def test_teacher_gets_the_key_and_nothing_else():
    """Not what ~/.netrc says (0.0.0.0 is not known to be this machine); no proxy sees loopback."""
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")
    with serving(sums) as (url, asked), scratch() as folder:
        (folder / "netrc").write_text("default login me password secret\n")
        elsewhere = url.replace("127.0.0.1", "0.0.0.0")
        for address, more in ((url, proxies), (elsewhere, {"NO_PROXY": "*"})):
            for key, expected in (("sk-1", "Bearer sk-1"), ("", None)):
                with empty_home(NETRC=str(folder / "netrc"), OPENAI_API_KEY=key, **more):
                    assert filled(ask_sums(address, 1)[0]) == 5
                    assert asked[-1][0].get("Authorization") == expected
    nobody = "http://127.0.0.1:9/v1"
    with empty_home(OPENAI_API_KEY=KEY):
        for url in ("gpt-4", "ftp://a", f"http://me:{KEY}@127.0.0.1:9", f"http://a/v1?key={KEY}"):
            text = ask_sums(url)[1]
            assert "error: --teacher" in text and "Secret" not in text
        assert "is the server running" in ask_sums(nobody)[1]
    with empty_home(OPENAI_API_KEY="sk-1\ncut"):
        assert "error: OPENAI_API_KEY" in ask_sums(nobody)[1]


def test_teacher_is_waited_for_and_paid_within_limits():
    with asking(lambda *sent: pause(0.5) or sums(*sent)) as (ask, _), patch("qcrd.QUIET", 0.1):
        assert re.search(r"  waiting for http\S+ for 0 s: no answer yet\n", ask(concurrency=4)[1])
    request = qcrd.Teacher.request
    late = patch("qcrd.Teacher.request", lambda *sent: pause(0.5) or request(*sent))
    with asking(sums) as (ask, _), patch("qcrd.QUIET", 0.1), late:
        text = ask()[1]
        assert 0 < text.index("waiting for") < text.index("to ask for"), text  # for /models
    with asking(lambda *sent: pause(1) or sums(*sent)) as (ask, asked):
        text = ask(teacher_timeout=0.2, concurrency=1)[1]
        assert "no answer in 0.2 s; --teacher-timeout SECONDS waits longer" in text, text
        assert len(asked) == 2
    with asking(lambda _, n: (503, b"", {}) if n % 2 else said("1")) as (ask, asked):
        slots, printed = ask(teacher_budget=7, concurrency=1)
        assert filled(slots) in (3, 4) and len(asked) == 7  # repetitions count
        assert "samples, 7 requests" in printed and "--teacher-budget is spent" in printed
    # what is under way when the first of three finds the budget spent is kept
    with asking(lambda body, n: pause(1.5 * (n < 3)) or sums(body)) as (ask, asked):
        assert filled(ask(9, concurrency=3, teacher_budget=3)[0]) == 15 and len(asked) == 3


TINY = "--steps 6 --iterations 3 --lag 1 --batch 4 --rationale-tokens 8 --label-tokens 8 --lr 1e-3"
TINY += " --discriminator-pretrain 2 --discriminator-steps 1 --discriminator-questions 2"
TINY = [*TINY.split(), "--concurrency", "2"]
qcrd_main = partial(command, qcrd)


def qcrd_child(words: list, environment: dict, event: str, sign: int) -> None:
    """The command line; it gets a signal before an event: "step 7", its seventh optimizer step, or
    "checkpoint.pt 2", the second time that a file gets this name."""
    os.chdir(environment["QCRD_HOME"])
    os.environ.update(environment)
    sys.stdout = sys.stderr = open("log", "a", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(qcrd)  # reads torchrun's variables
    seen = Counter()

    def before(call, *args):
        name = "step" if call is descend else Path(args[1]).name
        seen[name] += 1
        if event == f"{name} {seen[name]}":
            os.kill(os.getpid(), sign)
        return call(*args)

    descend = qcrd.descend
    qcrd.descend = partial(before, descend)
    os.replace = partial(before, os.replace)
    sys.argv = ["qcrd.py", *words]
    sys.exit(qcrd.main())


def started(words: list, event: str = "", sign: int = 0, **environment: str):
    """qcrd_child in a new process, which need not import torch; its output is the file `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "qcrd"])
    args = (words, environment | {"QCRD_HOME": os.getcwd()}, event, sign)
    child = context.Process(target=qcrd_child, args=args)
    child.start()
    return child


def ended(*children) -> list[int]:
    """The exit codes of children that are waited for."""
    for child in children:
        child.join(600)
        child.kill()  # one that hangs, as a rank of NCCL does after its peer's death
    return [child.exitcode for child in children]


def made_by(run: Path | str) -> tuple:
    """What a run ends with, but for its seconds."""
    weights = Path(run, "student/model.safetensors").read_bytes()
    lines = [line | {"seconds": 0} for line in lines_of(f"{run}/metrics.jsonl")]
    return lines, lines_of(f"{run}/result.json"), weights


def until(condition) -> None:
    """Waits for it, a minute at most."""
    for _ in range(600):
        if condition():
            return
        pause(0.1)
    raise AssertionError("waited for a minute")


@contextmanager
def sums_home(dropout: float = 0.0, answer=sums):
    """An empty home with a folder task, a tiny student and a teacher -> flags, requests so far."""
    with empty_home() as home, serving(answer) as (url, asked), patch("qcrd.BACKOFF", 0.01):
        rows = [(f"What is {i} plus {i}?", str(2 * i)) for i in range(22)]
        task_folder(home / "sums", train=rows[:12], valid=rows[12:16], test=rows[16:])
        tiny_folder(home / "tiny", dropout=dropout)
        flags = ["--task", "sums", "--answer", "number", "--teacher", url, "--model", "tiny"]
        yield [*flags, *TINY, "--run"], asked


def test_kill_and_resume_ends_in_the_same_bytes():
    with sums_home(dropout=0.1) as (flags, _):
        qcrd_main(*flags, "whole")
        whole = made_by("whole")
        # within an iteration; after the snapshot has its name; after the student is written
        for name, event in zip("abc", ("step 5", "checkpoint.pt 2", "predictions.jsonl 1")):
            child = started([*flags, name], event, signal.SIGKILL)
            assert ended(child) == [-signal.SIGKILL] and not Path(name, "result.json").exists()
            assert f"run folder: {name}" in qcrd_main("--resume", name)
            assert made_by(name) == whole and not list(Path(name).rglob("*.tmp")), event
        assert ended(started([*flags, "stopped"], "step 6", signal.SIGINT)) == [130]
        log = Path("log").read_text()
        assert "--resume stopped goes on" in log and "Traceback" not in log
        for name in ("test", "train"):  # other data now
            path = Path(f"sums/{name}.jsonl")
            before = path.read_bytes()
            path.write_bytes(before.replace(b"plus", b"and", 1))
            text = mistake(qcrd, "--resume", "stopped")
            assert "other questions or samples" in text or "no sample" in text, text
            path.write_bytes(before)
        for path in Path("stopped/snapshots").iterdir():
            t5.write_pt(path, {"a": 1})
        assert "no snapshot of this run" in mistake(qcrd, "--resume", "stopped")
        Path("stopped/checkpoint.pt").write_bytes(Path("whole/checkpoint.pt").read_bytes()[:5000])
        assert "checkpoint.pt" in mistake(qcrd, "--resume", "stopped")


def test_a_folder_goes_from_teacher_to_student():
    with sums_home() as (flags, asked):
        flags[flags.index("number")] = "text"
        flags[:0] = ["--samples", "5"]
        text = qcrd_main(*flags, "teacher", "--stage", "teacher")
        assert "to ask for: 80 samples of 16 questions" in text and text.count("to ask for") == 1
        assert "vote: 4.00 positives per question" in text and not Path("teacher").exists()
        with open("sums/test.jsonl", "ab") as file:
            file.write(Path("sums/train.jsonl").read_bytes().splitlines()[0])
        methods = ("qcrd", "gold"), ("dss", "teacher"), ("single", "gold"), ("finetune", "gold")
        for method, labels in methods:
            text = qcrd_main(*flags, method, "--method", method, "--labels", labels)
            assert (
                "warning: 1 of 16 questions are test questions too, as 'What is 0 plus 0?'" in text
            )
            assert "minutes of optimizer steps to expect" in text and "checkpoints took" in text
            (unused,) = re.findall("note: without effect.*", text) or [""]
            assert ("--lag" in unused) == (method != "qcrd")
            assert ("--samples" in unused) == (method in ("single", "dss"))
            (result,) = lines_of(f"{method}/result.json")
            assert (result["rationale_accuracy"] is None) == (method == "finetune")
            (item,) = json.loads(qcrd_main("--audit", method, 1, "--json"))
            assert 2 * int(item["question"].split()[2]) == int(item["label"])
            scores = [c["score"] for c in item["candidates"]]
            expected = {"dss": [1.0], "single": [], "finetune": []}
            assert len(scores) > 4 if method == "qcrd" else scores == expected[method], scores
        assert len(asked) == 16 and Path("qcrd/student/discriminator.pt").exists()
        # a run needs neither its task's folder nor to be asked from where it was made
        Path("sums").rename("elsewhere")
        Path("tiny").rename("moved")
        with scratch() as folder:
            Path("qcrd").rename(folder / "mine")
            with chdir(folder / "mine"):
                text = qcrd_main("--ask", "../mine", "What is 3 plus 3?")
                assert re.fullmatch(r"label: .*\nrationale: .*\nquality: +0\.\d+\n", text), text
            Path(folder / "mine").rename("qcrd")
        assert "sums" in qcrd_main("--eval", "qcrd", code=2)


def test_one_process_has_a_run_and_its_teacher():
    """Ctrl-C waits for two requests under way; --resume asks for the rest alone. Meanwhile another
    process gets another default name and the first one's samples, or is refused."""
    gate, name = threading.Event(), "runs/sums-qcrd-0"
    with sums_home(answer=lambda *sent: gate.wait(60) and sums(*sent)) as (flags, asked):
        stopped = started(flags[:-1])
        until(lambda: len(asked) == 2)
        os.kill(stopped.pid, signal.SIGINT)
        until(lambda: "stopping; answers under way" in Path("log").read_text())
        gate.set()
        assert ended(stopped) == [130] and len(asked) == 2 and len(kept_samples()) == 10
        gate.clear()
        first = started(["--resume", name])  # it had no checkpoint
        until(lambda: len(asked) > 2)
        for words in ([*flags, name], ["--resume", name]):
            assert "another process has it" in mistake(qcrd, *words)
        second = started([*flags[:-1], "--lr", "2e-3"])
        until(lambda: Path(f"{name}-2/config.json").exists())
        until(lambda: "waiting for another process" in Path("log").read_text())
        gate.set()
        assert ended(first, second) == [0, 0], Path("log").read_text()
        assert len(asked) == 16 and len(kept_samples()) == 80
        for run, rate in ((name, 1e-3), (f"{name}-2", 2e-3)):
            (config,) = lines_of(f"{run}/config.json")
            assert (config["lr"], config["teacher_model"]) == (rate, "demo-teacher")
            assert lines_of(f"{run}/result.json")


def test_folders_that_a_run_takes():
    with sums_home() as (flags, _):
        small = [*flags[:-1], "--method", "finetune"]
        Path("begun/snapshots").mkdir(parents=True)
        for name in ("metrics.jsonl", "checkpoint.pt.5.tmp", "lock"):
            Path("begun", name).write_text("torn")
        Path("begun/config.json").write_text('{"mine": 1}')
        assert "not the settings of a run" in mistake(qcrd, *small, "--run", "begun")
        qcrd.write_config(Path("begun"), tiny_config())
        qcrd_main(*small, "--run", "begun")
        assert lines_of("begun/result.json") and not list(Path("begun").glob("*.tmp"))
        task_folder(Path("notes"))
        Path("notes/mine.txt").write_text("mine")
        before = sorted(Path().rglob("*"))
        for name in ("begun", "tiny", "notes", "notes/mine.txt"):
            assert f"--run {name}: exists" in mistake(qcrd, *small, "--run", name)
        for name in ("notes/mine.txt/below", "n" * 300):
            assert name in mistake(qcrd, *small, "--run", name)
        assert sorted(Path().rglob("*")) == before
        for number in ("", "-2"):
            text = qcrd_main(*small)
            assert f"run folder: runs/sums-finetune-0{number}\n" in text, text


def test_wrong_use_gets_one_line():
    """It names the longest word of the mistake, before anything is asked."""
    wrong = """--samples 0; --fraction 2; --lr nan; --micro-batch -1; --discriminator-questions 0
        --teacher-fields {no; --teacher-fields [1]; --teacher-fields {"x":NaN}
        --teacher http://127.0.0.1:9/v1; --run tiny; --unknown
        --task nowhere; --model missing; --prompt no-such-file; --prompt latin-1-text
        --student-temperature hot; --negative-source fixed --negative-model nowhere-to-be-found
        --discriminator-lr -1; --alpha-d -1; --discriminator-noise 2; --lr 0; --beta inf
        --student-temperature-end -3; --discriminator-every -1; --input-tokens 0; --label-tokens 2
        --rationale-tokens 100000; --concurrency 1000000; --steps 9999999999999
        --discriminator-pretrain 99999999999999999999; --seed -1; --iterations 7; --steps 2.5
        --method dss --scheme minmax; --method finetune --negative-source fixed
        --scheme best; --precision int8; --device tpu; --teacher-budget -1; --lag 0; --json"""
    with sums_home() as (flags, asked):
        Path("latin-1-text").write_bytes(b"\xe9\xff")
        for words in map(str.split, re.split("[;\n]", wrong)):
            line = mistake(qcrd, *flags, "new", *words)
            assert max(words, key=len) in line and not asked, line  # nothing was paid for
        assert "none: no run" in mistake(qcrd, "--resume", "none")
        assert "one at a time" in mistake(qcrd, "--resume", "none", "--ask", "none")
        # what is unusual but allowed
        no_D = ["--discriminator-lr", 1, "--alpha-d", 1, "--no-discriminator", "--show-prompt"]
        text = qcrd_main(*flags, "new", *no_D, "--negative-source", "static", "--lag", 2)
        unused = re.search("note: without effect .* flags: (.*)", text)[1].split(", ")
        assert {"--discriminator-lr", "--alpha-d", "--lag"} <= set(unused), text
        assert not {"--beta", "--student-samples", "--no-discriminator", "--run"} & set(unused)
        large = ["--lag", 10**5, "--discriminator-every", 10**9, "--seed", 10**9]
        for name, count, steps in (("large", 4, []), ("none", 1, ["--steps", 0])):
            qcrd_main(*flags, name, *large, *steps)
            assert len(lines_of(f"{name}/metrics.jsonl")) == count and len(asked) == 16
            assert lines_of(f"{name}/result.json")[0]["best_iteration"] == count - 1


def test_settings_of_a_run_are_checked_like_flags():
    texts: list = ["[1]", "", "{", "null", "\0", "[" * 100_000]
    texts += [{"foo": 1}, {"negative_source": "foo"}, {"lr": "hot"}, {"lr": None}, {"steps": 6.5}]
    texts += [{"beta": math.nan}, {"discriminator": 1}, {"task": 3}, {"batch": True}, {"lag": []}]
    texts += [{"scheme": {}}, {"samples": -1}]
    resume, ask = ["--resume", "run"], ["--ask", "run", "What?"]
    commands = resume, ask, ["--audit", "run", 1], ["--eval", "run"]
    with sums_home() as (flags, _):
        qcrd_main(*flags, "run", "--method", "finetune")
        path, result = Path("run/config.json"), Path("run/result.json").read_bytes()
        good = lines_of(path)[0]
        Path("run/result.json").unlink()
        for text, words in product(texts, commands):
            path.write_text(text if isinstance(text, str) else json.dumps(good | text))
            assert str(path) in mistake(qcrd, *words), (text, words)
        path.write_text(json.dumps(good | {"precision": "float16"}))
        precisions = [qcrd.read_config(path.parent, x).precision for x in ({}, {"device": "cpu"})]
        assert precisions == ["float16", "float32"]
        path.write_text(json.dumps(good))
        # without result.json a run goes on; with it, it is used
        files = (resume, "checkpoint.pt"), (resume, "result.json"), (ask, "task.json")
        for words, name in (*files, (ask, "student/config.json")):
            path = Path("run", name)
            before = path.read_bytes() if path.exists() else result
            for garbled in (b"", before[:-9], b"[]", b"\xff"):
                path.write_bytes(garbled)
                assert name in mistake(qcrd, *words), (name, garbled)
            path.write_bytes(before)
        assert "not a number" in mistake(qcrd, "--audit", "run", "9" * 5000)


def test_a_loss_that_is_no_number_stops_the_run():
    def descend(optimizer, *_):
        for weight in optimizer.param_groups[0]["params"]:
            weight.data.fill_(math.inf)

    with sums_home() as (flags, _), patch("qcrd.descend", descend):
        for method in ("qcrd", "dss", "single", "finetune"):
            line = mistake(qcrd, *flags, method, "--method", method)
            assert line.startswith("error: a loss became infinite or NaN; check --lr"), line
        last = ("--method", "dss", "--iterations", 1, "--steps", 1)  # its loss saw no bad weight
        assert "became infinite or NaN" in mistake(qcrd, *flags, "last", *last)
        assert not Path("last/checkpoint.pt").exists()


def test_help_names_every_flag_with_mark_and_default():
    with patch.dict(os.environ, COLUMNS="80"):
        text = qcrd_main("--help")
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    for setting in qcrd.dataclasses.fields(qcrd.Config):
        mark, words = setting.metadata["mark"], " ".join(setting.metadata["help"].split())
        shown = f"[{mark}]" if setting.default == "" else f"({setting.default}) [{mark}]"
        assert qcrd.flag(setting.name) in text and f"{words} {shown}" in text, setting.name
        marks = "ours|DSS|review(, ours)?|abstract|overview|table|figure|eq. 2|eq. 4, 5"
        assert re.fullmatch(marks, mark), setting.name


def test_pipes_and_terminals():
    """A reader that leaves is no error; what a terminal lacks is shown otherwise."""
    words, how = [sys.executable, HERE / "qcrd.py"], {"stdout": subprocess.PIPE}
    for more in (["--help"], ["--show-prompt"]):
        child = subprocess.Popen([*words, *more], **how, stderr=subprocess.PIPE)
        child.stdout.close()
        assert child.stderr.read() == b"" and child.wait() in (0, 141), more
    ascii = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "80"}
    done = subprocess.run([*words, "--help"], env=os.environ | ascii, check=True, **how)
    assert rb"\u03b2" in done.stdout and done.stdout.isascii()


DEMO = {}  # the finished run's temporary folder, which goes with the process, and its output


@contextmanager
def demo_run():
    """`python qcrd.py` with few steps, once -> the run, as seen from the working folder."""
    if not DEMO:
        DEMO["folder"] = tempfile.TemporaryDirectory()
    home = DEMO["folder"].name
    with empty_home(QCRD_HOME=home), chdir(home):
        if "text" not in DEMO:
            flags = [*TINY, "--samples", 3, "--fraction", 0.2]
            DEMO["text"] = python(HERE / "qcrd.py", *flags, home=home)
        yield Path("runs/demo-qcrd-0")


def test_demo_from_end_to_end():
    with demo_run() as run:
        text, start = DEMO["text"], DEMO["text"].index(" t      L L_pred")
        assert max(map(len, text[start:].splitlines())) <= 80 and "95 % interval" in text[start:]
        assert all(part in text for part in ("to ask for: ", "vote: 2.", "majority right on"))
        assert text.count(f"run folder: {run}\n") == 2 and not list(run.rglob("*.tmp"))
        there = "config.json task.json checkpoint.pt snapshots student lock metrics.jsonl"
        assert {*there.split(), "predictions.jsonl", "result.json"} == {*os.listdir(run)}
        lines, rows = lines_of(run / "metrics.jsonl"), lines_of(run / "predictions.jsonl")
        assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
        for key in ("valid", "valid_rationale", "L", "L_D", "L_pred", "pair", "s_pos"):
            assert all(isinstance(line[key], float) for line in lines[1:]), key
            assert (key in lines[0]) == key.startswith("valid"), key
        keys = "input gold answer right rationale rationale_right quality".split()
        assert all([*row] == keys and 0 < row["quality"] < 1 for row in rows)
        (result,) = lines_of(run / "result.json")
        assert result["questions"] == len(rows) == 1000
        assert result["test_accuracy"] == sum(row["right"] for row in rows) / 1000
        assert result["rationale_accuracy"] == sum(row["rationale_right"] for row in rows) / 1000
        assert result["valid_accuracy"] == lines[result["best_iteration"]]["valid"]
        text = qcrd_main("--ask", run, rows[0]["input"])
        assert f"label:     {rows[0]['answer']}\nrationale: {rows[0]['rationale']}\n" in text
        assert abs(float(text.rpartition("quality:")[2]) - rows[0]["quality"]) < 1e-4
        fetch_data.write_lines(Path("two.jsonl"), [{"input": rows[0]["input"], "label": "1"}] * 2)
        two = [json.loads(line) for line in qcrd_main("--eval", run, "two.jsonl").splitlines()]
        assert len(two) == 2 and two[0]["gold"] == "1" and two[1]["answer"] == rows[0]["answer"]
        assert "test, 1000 questions" in qcrd_main("--resume", run, "--device", "cpu")
        assert "<Explanation>" in qcrd_main("--show-prompt")
        assert "not --seed" in mistake(qcrd, "--resume", run, "--seed", 1)
        assert "'x', not a number" in mistake(qcrd, "--audit", run, "x")
        assert "the question is missing" in mistake(qcrd, "--ask", run)
        assert "gone.jsonl" in mistake(qcrd, "--eval", run, "gone.jsonl")


def test_demo_audit_adds_up():
    """Schema, and every sum redone from the JSON alone."""
    keys = """question label iteration alphas beta delta scheme majority samples candidates L_pred
        L_cl L_D L_total; slot answer vote rationale; set source loss score weight share picked
        rationale""".split(";")
    with demo_run() as run:
        items = json.loads(qcrd_main("--audit", run, 8, "--json"))
        text = qcrd_main("--audit", run, 8)
    for item in items:
        parts = [item, item["samples"][2], item["candidates"][0]]
        assert [[*part] for part in parts] == [*map(str.split, keys)] and item["iteration"] == 4
        assert np.allclose(item["alphas"], [0.5, 0.5, 0.5 * 0.9**3])
        L_cl, logs = 0.0, []
        for name, choose in (("positive", min), ("negative", max)):
            members = [c for c in item["candidates"] if c["set"] == name]
            best = choose(members, key=lambda c: c["loss"], default=None)
            for c in members:
                weight = c["score"] if name == "positive" else 1 - c["score"]
                assert abs(c["weight"] - weight) < 1e-6
                assert c["share"] == c["picked"] == (c is best)
                margin = -item["beta"] * min(c["loss"] - item["delta"], 0)
                L_cl += c["share"] * weight * (c["loss"] if name == "positive" else margin)
            if members:
                logs.append(math.log(sum(math.exp(c["score"]) for c in members)))
        L_D = logs[1] - logs[0] if len(logs) == 2 else 0
        total = np.dot(item["alphas"], [item["L_pred"], L_cl, L_D])
        found = item["L_cl"], item["L_D"], item["L_total"]
        assert np.allclose(found, (L_cl, L_D, total), rtol=0, atol=1e-5), found
        assert f"= {item['L_total']:.4f}\n" in text
    assert len(items) == 8 and any(item["L_D"] for item in items) and "fillers" in text
    assert "student" in {c["source"] for item in items for c in item["candidates"]}


def test_half_a_million_questions_fit():
    """e-SNLI's 549,367 fit in 8 GiB where one of 25 words with five rationales takes 14 KB."""
    words, rng = fetch_data.demo_problems("valid")[0].text.split(), random.Random(0)
    texts = [" ".join(rng.choices(words, k=25)) for _ in range(3100)]
    sample = "<Explanation>: {} <Answer>: {}".format
    teacher = serving(lambda *_: said(*[sample(texts.pop(), k // 4) for k in range(5)]))
    with empty_home() as home, teacher as (url, _):
        rows = [(texts.pop(), str(i % 2)) for i in range(500)]
        task_folder(home / "large", train=rows, valid=rows[:9], test=rows[:9])
        config = tiny_config(task="large", teacher=url, model=str(tiny_folder(home / "tiny")))
        with redirect_stdout(io.StringIO()):
            task = qcrd.load_task(config)
            qcrd.prepare(config, task, home / "run")
            tracemalloc.start()
            run = qcrd.prepare(config, task, home / "run")
        size = tracemalloc.get_traced_memory()[1] / 500
        tracemalloc.stop()
        assert sum(len(q.S_pos + q.minority) for q in run.train) == 2500
        assert 1000 < size < 14_000, size


# ---------------------------------------------------------------------------------------- results/


sys.path.append(str(HERE / "results"))
tables, plot, judge = map(importlib.import_module, ("run", "plot", "judge"))


def test_tables_use_flags_that_the_program_knows():
    for table, (seeds, reference, cells) in tables.TABLES.items():
        assert reference in cells and seeds > 0
        assert all(set(of.get(table, {})) <= {*cells, "MI"} for of in tables.PAPER.values())
        of_demo = tables.DEMO.get(table, [])
        for flags in cells.values():
            qcrd.Config(**vars(qcrd.parser().parse_args(flags.split() + of_demo)))


def test_printed_tables_are_the_recorded_runs():
    """In results/README.md; README's accuracies stand there too, or are the paper's."""
    readme, results = ((HERE / x / "README.md").read_text("utf-8") for x in ("", "results"))
    paper = [x for of in tables.PAPER.values() for cells in of.values() for x in cells.values()]
    known = {f"{x:.1f}" for x in paper} | set(re.findall(r"\d+\.\d+", results))
    for table in tables.TABLES:
        if tables.path_of(table, "demo").exists():
            assert command(tables, "--print", table).strip() in results, table
    rows = re.findall(r"^\|.*", readme[readme.index("## Results") :], re.M)
    numbers = {x for row in rows for x in re.findall(r"\b\d\d\.\d\b", row)}
    assert len(rows) == 9 and len(numbers) > 15 and numbers <= known, numbers - known


def test_inline_dependencies_are_the_requirements():
    pins = re.findall(r"^\w+==\S+$", (HERE / "requirements.txt").read_text(), re.M)
    for name in ("qcrd.py", "test_qcrd.py"):
        inline = re.search(r"^# dependencies = (.*)$", (HERE / name).read_text("utf-8"), re.M)
        assert json.loads(inline[1]) == pins and len(pins) == 4


def test_table_of_made_up_runs_and_p_by_hand():
    for differences, p in (([1, 1, 1], 0.25), ([1, -1], 1), ([3, 1], 0.5), ([1, 2, -1], 0.75)):
        assert tables.exact_p(differences) == p
    runs, flags = [], ["--task", "svamp", "--model", "t5-base"]
    for seed, (cell, accuracy) in product(range(6), (("DSS", 0.5), ("QCRD", 0.6))):
        made_by = tables.command_of(tables.TABLES["main"][2][cell], seed, flags)
        accuracies = dict.fromkeys(tables.SCORES, accuracy + 0.02 * (seed % 2))
        runs.append({"command": made_by, "model": "t5-base"} | accuracies)
    with scratch() as folder, patch.object(tables, "HERE", folder):
        fetch_data.write_lines(folder / "main-svamp.jsonl", runs)
        text = command(tables, "--print", "main", *flags)
        other = command(tables, "--print", "main", "--task", "svamp", "--model", "t5-small")
        runs[-1] |= {"model": "t5-small"}
        fetch_data.write_lines(folder / "main-svamp.jsonl", runs)
        mixed = mistake(tables, "--print", "main", *flags)
    cell = "61.0 ± 1.1 (+10.0, p 0.031) | "  # 2 / 2^6
    assert f"| QCRD | {cell * 2}61.0 ± 1.1 | 61.0 ± 1.1 | 6 | *69.0* |" in text, text
    assert "have the model t5-base or t5-small" in mixed
    assert "no run of these commands" in other


def test_judge_is_blind_to_the_order():
    def verdict(answers: tuple, body: dict, number: int) -> tuple:
        text = body["messages"][-1]["content"]
        return said(answers[text.index("fine") > text.index("poor")])

    cases = {  # the answer where the fine explanation stands first, and where it stands second
        ("Verdict: 1", "Verdict: 1"): "dss better 0 / both good 4 / qcrd better 0",
        ("1", "Both have merits.\n**Verdict:** 2."): "dss better 0 / both good 0 / qcrd better 4",
        ("__import__('os').abort()", "Verdict: 1"): "alone: 0; unreadable: 4",
    }
    for answers, expected in cases.items():
        home, server = empty_home(OPENAI_API_KEY="sk-hidden"), serving(partial(verdict, answers))
        with home as folder, server as (url, asked):
            for name, text in (("dss", "poor"), ("qcrd", "fine")):
                rows = [{"input": f"q{i}", "gold": "1", "rationale": text} for i in range(6)]
                fetch_data.write_lines(folder / name / "predictions.jsonl", rows)
                fetch_data.write_lines(folder / name / "config.json", [{"task": "svamp"}])
            words = [folder / "dss", folder / "qcrd", "--judge", url, "--questions", 4]
            text = command(judge, *words)
            assert expected in text and "21 / 0 / 29" in text, text
            assert command(judge, *words)
            prompts = [body["messages"][-1]["content"] for _, body in asked]
            assert len(prompts) == len(set(prompts)) == 8  # both orders, and each answer is kept
            assert not any("qcrd" in prompt or "dss" in prompt for prompt in prompts)
            kept = [path.read_text() for path in folder.rglob("*") if path.is_file()]
            assert len(kept) == 6 and "sk-hidden" not in "".join([*kept, text])


def test_audit_page_escapes_and_holds_all():
    bad = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
    with toy_run() as run:
        item = qcrd.audit_question(run, run.train[0], voted(*VOTES, "no idea")[0], 1)
    item |= dict.fromkeys(("question", "label", "majority", "scheme"), bad)
    for i, part in enumerate(item["samples"] + item["candidates"]):
        part["rationale"] = f"rationale {i} {bad}"
    assert {sample["vote"] for sample in item["samples"]} == {"positive", "negative", "none"}
    item["samples"][0]["answer"] = bad
    item["L_total"] = 0.95
    next(c for c in item["candidates"] if c["picked"]).update(weight=0.5, loss=1.0)
    tags, words, reader = set(), [], html.parser.HTMLParser()
    reader.handle_starttag = lambda tag, attrs: tags.update([tag], dict(attrs))
    reader.handle_data = words.append
    page = plot.audit_page([item], bad)
    reader.feed(page)
    text = " ".join("".join(words).split())
    assert not tags & {"script", "img", "link", "a", "src", "href", "onerror"}, tags
    assert not any(word in page for word in ("http:", "https:", "url("))
    assert all(f"rationale {k} {bad}" in text for k in range(i + 1))
    assert text.count("→ picked") == 2 and page.count('class="delta"') == 3
    assert "share 1 · weight 0.5 · ℓ(r⁺) 1 = 0.5000" in text and "0.9500" in text


def test_pictures_and_mistakes_of_the_user():
    with scratch() as folder:
        for words in (["curves", folder], ["rationales", f"{folder}/none"], ["scores", folder]):
            assert mistake(plot, *words).startswith("error: "), words
        if importlib.util.find_spec("matplotlib") is None:
            raise Skip("matplotlib is not installed")
        lines = [{"iteration": 1, "L": 1.0, "l_neg": None}, {"iteration": 2, "s": {"student": 0.2}}]
        run = {"cell": "ED", "command": "--delta 4", "iterations": lines, "seed": 0}
        fetch_data.write_lines(folder / "a.jsonl", [run | dict.fromkeys(tables.SCORES, 0.5)])
        for what in ("curves", "rationales"):
            out = folder / f"{what}.png"
            command(plot, what, folder / "a.jsonl", "--out", out)
            assert out.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------- Speed, and the proof on a GPU

SHAPES = {
    "tiny": dict(vocab_size=1300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2),
    "gated": dict(feed_forward_proj="gated-gelu", tied=False, scaled=False),
    "t5-small": {},
    "t5-base": dict(d_model=768, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12),
}


class Checks(list):
    """Prints values beside their bounds and lists those that miss them."""

    def __call__(self, what: str, value: float, bound: float = 0) -> None:
        line = f"{what}: {value:.2g} (bound {bound:g})"
        good = value <= bound  # NaN is not
        self.extend([] if good else [line])
        print(f"  {'ok' if good else 'MISSED':6s} {line}", flush=True)


def random_run(shape: str, device: str, precision: str = "", dropout: float = 0.0) -> qcrd.Run:
    """Random weights, alike on every device, scaled so that the next token is neither the last one
    again nor any of 32,128 alike: else tokens compare nothing. precision "": a run's own."""
    small = {"model": "demo", "steps": 100, "iterations": 100}  # an iteration is a step
    config = qcrd.resolve(qcrd.Config(**small, device=device, precision=precision))
    student = qcrd.Student(HERE / "weights/demo", config)
    torch.manual_seed(0)
    model = t5.T5(t5.T5Config(dropout_rate=dropout, **SHAPES[shape]))
    with torch.no_grad():
        model.shared.weight *= 0.1
        model.decoder.final_layer_norm.weight *= 40
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    student.model = model.to(device)
    run = qcrd.Run(config, student, qcrd.Discriminator(student, model.encoder_only()), Path())
    run.train = svamp_like(4)
    return run


def svamp_like(n: int, longest: int = 256, vocab: int = 32000) -> list[qcrd.Question]:
    """Random ids, as long as SVAMP's questions and gpt-3.5-turbo's rationales are in T5's ids: 42
    tokens (22 to 65), and 88 in the median, a tenth above 190; inputs too from longest 512 on."""
    rng, questions = np.random.default_rng(0), []
    for i in range(n):
        lengths = [*np.clip(rng.normal(42, 9, 1), 22, 65), rng.integers(8, 14)]
        lengths += [*np.clip(np.exp(rng.normal(4.45, 0.65, 7)), 2, longest)]
        lengths[0] = longest if longest >= 512 else lengths[0]
        ids = [array("i", [*rng.integers(3, vocab, int(k) - 1), t5.EOS]) for k in lengths]
        example = Example(f"question {i}", "")
        questions.append(qcrd.Question(example, str(i), *ids[:2], ids[2:7], ids[7:]))
    return questions


def peers_of(run: qcrd.Run) -> list:
    """transformers' T5 with the student's weights and D's first encoder; [] where it is missing."""
    kinds = ("T5ForConditionalGeneration", "T5EncoderModel")
    try:
        return [peer_of(run.student.model, kind).to(run.student.device) for kind in kinds]
    except Skip:
        return []


def seconds(calls: list, device: str, runs: int = 3) -> list[float]:
    """The median seconds of each call, in turns, so that a drift of the machine falls on all."""
    times: list[list[float]] = [[] for _ in calls]
    for call, own in [*zip(calls, times)] * (runs + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        own.append(time.perf_counter() - start)
    return [float(np.median(own[1:])) for own in times]  # the first one warms up


def step_figures(kind: str, shape: str, device: str, n: int, size: int) -> None:
    """Prints JSON of a step's seconds, peak memory in GiB, and on CUDA operations. kind: qcrd.py
    or plain. size: questions at once, 0: the default."""
    run, plain = random_run(shape, device, dropout=0.1), kind == "plain"
    run.train, run.config.batch, run.config.micro_batch = svamp_like(n), n, size
    size = size or n
    peers = peers_of(run) if plain else []
    parameters = list((peers or [run.student.model])[0].parameters())
    if peers:  # our weights' memory is given back
        run.optimizer = run.d_optimizer = run.student.model = run.discriminator.encoder = None
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0, fused=True)

    def plain_step() -> None:
        optimizer.zero_grad()
        for i in range(0, n, size):
            plain_loss(run, run.train[i : i + size], n, peers).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    step = plain_step if plain else partial(qcrd.iterate, run, 1)
    name = f"plain on {'transformers' if peers else 't5.py'}, {size} questions at once"
    figures = {"name": name if plain else kind, "seconds": seconds([step], device)[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        if not plain:
            with FlopCounterMode(display=False) as counter:
                step()
            figures["operations"] = counter.get_total_flops()
    print(json.dumps(figures | {"memory": peak / 2**30}))


def step_beside_plain(shape: str, device: str, n: int) -> dict:
    """Prints what a step of n questions takes, ours and plain, each in a process; returns ours."""
    found, size = [], 0  # questions at once
    while len(found) < 2:
        call = f"own.step_figures{(('qcrd.py', 'plain')[len(found)], shape, device, n, size)}"
        try:
            found.append(json.loads(python("-c", f"import {Path(__file__).stem} as own; {call}")))
            print("  {name}: {seconds:.3f} s, {memory:.2f} GiB".format(**found[-1]), flush=True)
        except RuntimeError as error:
            if not re.search("out of ?memory|ALLOC_FAILED", str(error), re.I) or size == 1:
                raise
            size = (size or n) // 2
    ours, plain = found
    ratio, part = plain["seconds"] / ours["seconds"], ours["memory"] / plain["memory"]
    print(f"  {ratio:.2f} times as fast, in {part:.0%} of the memory", flush=True)
    return ours


def beside_transformers(shape: str, device: str, rows: int, width: int) -> None:
    """t5.py and transformers' T5 on the same weights and batches, taken in turns."""
    run = random_run(shape, device, dropout=0.1)
    model, peers = run.student.model, peers_of(run)
    if not peers:
        return print("  transformers is not installed: nothing to compare t5.py with")

    def compare(name: str, theirs, ours) -> None:
        with run.student.autocast():
            a, b = seconds([theirs, ours], device)
        print(f"  {name:20s} peer {a:.3f} s, t5.py {b:.3f} s, ratio {a / b:.2f}", flush=True)

    peer = peers[0].train()
    model.train()
    for name, least in (("full", width), ("padded", width // 4)):
        (x, x_mask), (y, y_mask) = (random_batch(1000, rows, width, i, least) for i in (1, 2))
        hf = dict(input_ids=x, attention_mask=x_mask, labels=y.masked_fill(~y_mask, -100))
        hf = {key: value.to(device) for key, value in hf.items()}
        ours = x, x_mask, y, y_mask
        pair = lambda: peer(**hf)[0].backward(), lambda: model.loss(*ours).mean().backward()
        compare(f"training, {name}", *pair)
    peer.eval(), model.eval()
    x, mask = random_batch(1000, 4 * rows, width, 3, width // 4)
    hf = dict(input_ids=x.to(device), attention_mask=mask.to(device), max_new_tokens=width, top_k=0)
    for tau in (0.0, 1.5):
        how = hf | dict(do_sample=tau > 0, temperature=tau or 1.0)
        pair = lambda: peer.generate(**how), lambda: model.generate(x, mask, width, tau)
        compare(f"generation, τ {tau}", *pair)


def bench() -> None:
    """`bench`: what a step and its T5 take on this machine. Nothing is asserted of seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, t5-small's shape: a step of 4 questions")
    step_beside_plain("t5-small", device, 4)  # first: a child's peak begins at its parent's size
    print("t5.py, 16 rows of 64 tokens, 64 rows in generation")
    beside_transformers("t5-small", device, 16, 64)


def beside_logits(tokens, logits, tau: float, uniforms) -> float:
    """How far tokens lie from what these logits write: a greedy one's probability from the best, a
    sampled one's part of [0, 1) from the number drawn."""
    p = (logits.double() / (tau or 1)).softmax(-1)
    own = p.gather(2, tokens[..., None])[..., 0]
    gap = p.amax(-1) - own
    if tau:
        end = p.cumsum(-1).gather(2, tokens[..., None])[..., 0]
        drawn = uniforms[:, : tokens.shape[1]].to(end.device)
        gap = torch.maximum(drawn - end, end - own - drawn)
    written = (tokens == t5.PAD).cumsum(1) == 0
    return gap[written].max().item()


def low_precision(device: str) -> str:
    """bfloat16 where the card computes in it, else float16."""
    emulated = device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "float16" if emulated else "bfloat16"


@torch.no_grad()
def generation(shape: str, device: str, check: Checks, *lengths: int) -> None:
    """What is written in low precision follows the teacher-forced logits of that precision."""
    for precision in {low_precision(device), "float16"}:
        run = random_run(shape, device, precision)
        model = run.student.model
        batch = run.student.inputs(run.student.explain_prefix, svamp_like(8, *lengths))
        uniforms = torch.rand(8, 24, generator=torch.Generator().manual_seed(1))
        for tau in (0.0, 1.5):
            with run.student.autocast():
                tokens = model.generate(*batch, 24, tau, uniforms=uniforms)
                logits = model(*batch, shifted(tokens)).float()
            gap = beside_logits(tokens, logits, tau, uniforms)
            check(f"{shape}, {precision}, τ {tau}: tokens beside the logits", gap, 0.03)


def waits(device: str) -> dict:
    """Waits for the GPU in a step of 16 questions at t5-small's shape, and peaks of memory, GiB."""
    run = random_run("t5-small", device)
    run.train, run.config.discriminator_pretrain = svamp_like(16), 2
    one_step(run)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        one_step(run)
    torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(warning.message) for warning in seen)
    found = {"waits of a step": count - 1}  # one is that of reading its loss
    batch = run.student.inputs(run.student.explain_prefix, svamp_like(128))
    generate = partial(run.student.model.generate, *batch, 96, 1.5)
    calls = {"step": partial(one_step, run), "generation": run.student.autocast()(generate)}
    calls["D's training"] = partial(qcrd.train_discriminator, run, 0, run.train)
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        call()
        found[f"GiB, {name}"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


@torch.no_grad()
def parity(shape: str, device: str, check: Checks, *lengths: int) -> None:
    """Losses, scores, gradients, probabilities, tokens on `device` beside the CPU's float32."""
    there, here = [random_run(shape, where, "float32") for where in (device, "cpu")]
    questions = there.train = here.train = svamp_like(4, *lengths)
    pairs = [(row, r) for row, q in enumerate(questions) for r in q.S_pos + q.minority]
    rows, targets = zip(*pairs)
    low = low_precision(device)

    def figures(run: qcrd.Run, precision: str) -> list[torch.Tensor]:
        run.student.model.eval()
        run.student.dtype = getattr(torch, precision)
        losses = run.student.losses(run.student.explain_prefix, questions, targets, rows)
        scores = run.discriminator.score([(questions[row].x, r) for row, r in pairs])
        return [losses.cpu(), scores.cpu()]

    expected = figures(here, "float32")
    for precision, bound in ((low, 0.02), ("float16", 0.02), ("float32", 1e-4)):
        for name, value, right in zip(("ℓ", "s"), figures(there, precision), expected):
            gap = ((value - right).abs() / right.abs()).max().item()
            check(f"{shape}, {precision}: {name}, relative", gap, bound)
    measure = partial(qcrd.measure, here.student)  # low precision may pick others

    def step(run: qcrd.Run, precision: str) -> tuple[float, torch.Tensor]:
        run.student.dtype = getattr(torch, precision)
        fp16 = precision == "float16"  # small gradients would vanish
        run.scaler = torch.amp.GradScaler(run.config.device, 2.0**10, enabled=fp16)
        run.config.delta = 30.0  # random weights' ℓ is near 18: negatives count too
        with torch.enable_grad(), patch("qcrd.measure", lambda _, *rest: measure(*rest)):
            loss = one_step(run)
        return loss, gradients(run.student.model.eval()).cpu() / run.scaler.get_scale()

    loss, gradient = step(here, "float32")
    # rounding grows with the layers: 0.04 was seen at t5-small's six
    for precision, bound, far in ((low, 0.02, 0.15), ("float32", 1e-4, 1e-3)):
        value, g = step(there, precision)
        check(f"{shape}, {precision}: a step's loss, relative", abs(value / loss - 1), bound)
        distance = ((g - gradient).norm() / gradient.norm()).item()
        check(f"{shape}, {precision}: its gradient, relative", distance, far)
    batch = here.student.inputs(here.student.explain_prefix, questions * 4)
    for tau in (0.0, 0.7, 1.5):
        draws = [torch.Generator().manual_seed(1) for _ in range(2)]
        tokens = there.student.model.generate(*batch, 24, tau, draws[0]).cpu()
        p, q = (run.student.model(*batch, shifted(tokens)).cpu() for run in (here, there))
        gap = beside_logits(tokens, p, tau, torch.rand(16, 24, generator=draws[1]))
        bound = 5e-4 if shape == "gated" else 1e-4  # its logits reach 200
        check(f"{shape}, τ {tau}: tokens beside the CPU's logits", gap, bound)
        gap = (p.softmax(-1) - q.softmax(-1)).abs().max().item()
        check(f"{shape}, τ {tau}: next-token probabilities", gap, bound)


def overflow(name: str, run: qcrd.Run, check: Checks) -> int:
    """float16: a scale that overflows falls, its steps change nothing -> how many did so."""
    how = {"init_scale": 2.0**60, "backoff_factor": 2.0**-12}
    run.scaler, moved = torch.amp.GradScaler(run.student.device.type, **how), []
    run.config.batch, run.config.steps, run.config.iterations = len(run.train), 100, 100
    weight = run.student.model.shared.weight
    while len(moved) < 8 and True not in moved:
        before, scale = weight.detach().clone(), run.scaler.get_scale()
        with patch("qcrd.add_past_negatives"):  # those that are there stay
            qcrd.iterate(run, 1)
        moved.append(not torch.equal(weight, before))
        fell = run.scaler.get_scale() < scale
        check(f"{name}, scale {scale:.0e}: skipped and moved", fell == moved[-1])
    check(f"{name}, float16: no overflow, or never a step", moved[0] or not moved[-1])
    check(f"{name}, float16: weights not finite", not weight.isfinite().all().item())
    return len(moved) - 1


def demo_on(check: Checks, *flags: str) -> None:
    """The demo in four small iterations: every stage, a kill, a resume, an audit."""
    small = "--iterations 4 --steps 20 --lag 1 --discriminator-pretrain 10"
    words = f"{small} --discriminator-steps 2 --run run".split()
    with empty_home():
        child = started([*words, *flags], "step 20", signal.SIGKILL)  # in the second iteration
        check("the demo's process ended before it was killed", ended(child) != [-signal.SIGKILL])
        check("iterations before that, not 1", abs(2 - len(lines_of("run/metrics.jsonl"))))
        qcrd_main("--resume", "run")
        check("iterations that are missing", 5 - len(lines_of("run/metrics.jsonl")))
        items = json.loads(qcrd_main("--audit", "run", 4, "--json"))
        sources = [candidate["source"] for item in items for candidate in item["candidates"]]
        check("an audit without negatives of the past", "student" not in sources)
        print(f"  {lines_of('run/result.json')[0]}")


def two_ranks(check: Checks, bound: float, *words: str) -> None:
    """Two ranks compute what one process does; the student has no dropout."""
    with sums_home() as (flags, _):
        flags = [*words, *flags]
        qcrd_main(*flags, "one")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        ranks = [started([*flags, "two"], RANK=i, LOCAL_RANK=i, **torchrun) for i in "01"]
        codes, log = ended(*ranks), Path("log").read_text()
        assert codes == [0, 0], log
        assert log.count("run folder: two") == 2  # rank 0 alone speaks
        folders = ("tiny", "one/student", "two/student")
        start, one, two = (t5.T5.load(folder).state_dict() for folder in folders)
        moved = max((one[name] - start[name]).abs().max().item() for name in one)
        apart = max((one[name] - two[name]).abs().max().item() for name in one)
        lines = [lines_of(f"{run}/metrics.jsonl")[1:] for run in ("one", "two")]
    check("two ranks: weights that stay where they were", moved <= 1e-3)
    check("two ranks: weights apart", apart, bound)
    for name in "L_pred L_cl L_D l_pos l_neg s_pos s_neg past".split():
        gaps = [abs(a[name] - b[name]) / max(abs(a[name]), 1e-3) for a, b in zip(*lines)]
        check(f"two ranks: {name}, relative", max(gaps), bound)


def in_float16(shape: str, device: str, check: Checks) -> None:
    overflow(shape, random_run(shape, device, "float16"), check)


def speeds(shape: str, device: str) -> dict:
    """Prints what a step of 64 questions, sampling and the paper's run take on this card."""
    a = torch.randn(8192, 8192, device=device, dtype=getattr(torch, low_precision(device)))
    rate = 2 * len(a) ** 3 * 20 / seconds([lambda: [a @ a for _ in range(20)]], device)[0]
    print(f"  products of matrices run at {rate / 1e12:.0f} TFLOP/s")
    gc.collect()  # of earlier stages; the children share the card
    torch.cuda.empty_cache()
    ours = step_beside_plain(shape, device, 64)
    used = ours.get("operations", 0) / ours["seconds"] / rate
    print(f"  {64 / ours['seconds']:.1f} questions a second, {used:.0%} of the rate of products")
    run, rows = random_run(shape, device), []
    batch = run.student.inputs(run.student.explain_prefix, svamp_like(128))
    with run.student.autocast():
        spent = seconds([lambda: rows.append(run.student.model.generate(*batch, 96, 1.5))], device)
    tokens = int((rows[-1] != t5.PAD).sum()) / spent[0]
    print(f"  {tokens:,.0f} tokens a second sampled, 128 rows at once")
    # svamp: before 15 of 20 iterations 720 questions and 80 of validation, some 105 tokens each
    hours, sampling = 10_000 * ours["seconds"] / 3600, 15 * 800 * 105 / tokens / 3600
    print(f"  the paper's 10,000 steps on svamp: {hours:.1f} h, and {sampling:.1f} h of sampling")
    beside_transformers(shape, device, 64, 64)
    return {"TFLOP/s": round(rate / 1e12)}


def cuda_stages(check: Checks, device: str = "cuda") -> dict:
    """The stages of the proof in order of worth."""
    # the kernel that the masks are made for: refused masks are errors
    efficient = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)(parity)
    stages = {}
    for shape in ("t5-small", "t5-base"):
        stages[f"parity {shape}"] = partial(efficient, shape, device, check)
        stages[f"generation {shape}"] = partial(generation, shape, device, check)
        stages[f"float16 {shape}"] = partial(in_float16, shape, device, check)
    stages["parity gated"] = partial(efficient, "gated", device, check)
    stages["parity 512 tokens"] = partial(efficient, "tiny", device, check, 512, 1000)
    stages["demo"] = partial(demo_on, check, "--device", device)
    stages["demo float16"] = partial(demo_on, check, "--device", device, "--precision", "float16")
    stages["waits, memory"] = partial(waits, device)
    if torch.cuda.device_count() > 1:
        words = ["--device", "cuda", "--negative-source", "fixed"]  # the same negatives
        for precision, bound in (("float32", 1e-3), ("bfloat16", 0.05)):
            stage = partial(two_ranks, check, bound, *words, "--precision", precision)
            stages[f"two ranks {precision}"] = stage
    for shape in ("t5-base", "t5-small"):
        stages[f"speed {shape}"] = partial(speeds, shape, device)
    return stages


def run_stages(stages: dict, check: Checks, minutes: float) -> dict:
    """Each stage stands alone: what one raises is printed, and the next one runs."""
    found, start = {}, time.monotonic()
    for name, stage in stages.items():
        spent, missed = time.monotonic() - start, len(check)
        if spent > 60 * minutes:
            found[name] = "left out: --minutes"
            continue
        print(f"== {name}, after {spent:.0f} s", flush=True)
        try:
            figures = stage()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what failed there belongs to this stage
            found[name] = figures or ("ok" if len(check) == missed else "missed")
        except Exception as error:
            traceback.print_exc()
            found[name] = f"raised {type(error).__name__}: {fetch_data.fold(str(error))[:200]}"
        print(json.dumps({name: found[name]}), flush=True)  # what is cut off has told so much
    return found


def cuda() -> int:
    """`cuda`: whether all of it works on a GPU, how fast, and what fits. -> exit code."""
    if not torch.cuda.is_available():
        print("cuda: skipped, torch sees no GPU here")
        return 0
    minutes = math.inf
    if sys.argv[2:]:
        name, _, number = "=".join(sys.argv[2:]).partition("=")
        assert name == "--minutes" and number, "usage: python test_qcrd.py cuda [--minutes N]"
        minutes = float(number)
    torch.backends.cuda.matmul.allow_tf32 = False
    check = Checks()
    card = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    card |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        card["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(card)
    found = run_stages(cuda_stages(check), check, minutes)
    print("\n".join(f"{name}: {result}" for name, result in found.items()))
    print("\n".join(["missed:", *check]) if check else "every bound is kept")
    print(json.dumps(card | {"stages": found, "missed": check}))
    return int(bool(check) or any("raised" in str(result) for result in found.values()))


def test_a_stage_of_the_proof_stands_alone():
    def broken():
        raise RuntimeError("no kernel")

    stages = {"first": broken, "second": lambda: {"GiB": 1}, "third": lambda: None}
    with redirect_stderr(io.StringIO()) as printed:
        found = run_stages(stages, Checks(), math.inf)
        late = run_stages(stages, Checks(), -1.0)
    assert "RuntimeError: no kernel" in found["first"] and "Traceback" in printed.getvalue()
    assert found["second"] == {"GiB": 1} and found["third"] == "ok"
    assert set(late.values()) == {"left out: --minutes"}


def test_ordinary_tests_see_no_gpu():
    """Where torch would see one unless CUDA_VISIBLE_DEVICES is empty."""
    stand_in = "import os, sys, torch; sys.argv = ['x'{}]; torch.cuda.is_available = lambda: "
    stand_in += "os.environ.get('CUDA_VISIBLE_DEVICES') != ''; import test_qcrd, qcrd; "
    stand_in += "print(qcrd.torch.cuda.is_available())"
    seen = []
    with patch.dict(os.environ):
        for word, of_cuda in (("", None), (", 'cuda'", None), ("", "1")):  # last: a child of `cuda`
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            os.environ |= {"TESTS_MAY_USE_A_GPU": of_cuda} if of_cuda else {}
            seen.append(python("-c", stand_in.format(word)))
    assert seen == ["False\n", "True\n", "True\n"], seen


def test_two_ranks_compute_what_one_does():
    check = Checks()
    two_ranks(check, 1e-5)
    assert not check, check


def test_comparisons_of_the_gpu_proof_on_the_cpu():
    check = Checks()
    parity("tiny", "cpu", check, 30, 1000)
    generation("tiny", "cpu", check, 30, 1000)
    assert not check, check
    with patch("t5.draw", lambda logits, uniforms: logits.argmin(1)):
        parity("tiny", "cpu", check, 30, 1000)
        generation("tiny", "cpu", check, 30, 1000)
    assert sum("tokens beside" in line for line in check) == len(check) == 4, check
    check("a bound that is missed", float("nan"), 1.0)
    assert len(check) == 5
    greedy, logits = torch.tensor([[2]]), torch.tensor([[[0.0, 9.0, 0.0]]])
    assert beside_logits(greedy, logits, 0.0, None) > 0.9


# ---------------------------------------------------------------------------------- The runner


def main() -> int:
    """Runs what the command line names -> 1 where something failed."""
    words = sys.argv[1:]
    if words[:1] in (["bench"], ["cuda"]):
        return (bench if words == ["bench"] else cuda)() or 0
    passed, failed = 0, 0
    for name, test in list(globals().items()):
        if not name.startswith("test_") or (words and not any(word in name for word in words)):
            continue
        start = time.perf_counter()
        try:
            test()
            passed += 1
            print(f"ok   {name} ({time.perf_counter() - start:.1f} s)", flush=True)
        except Skip as why:
            print(f"skip {name}: {why}", flush=True)
        except (Exception, SystemExit):  # argparse's own
            failed += 1
            print(f"FAIL {name}\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
