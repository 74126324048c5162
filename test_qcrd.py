"""All tests of this project, and its benchmark, with no network and nothing but the four packages.

    python test_qcrd.py              every test; ends with the line `N passed, N failed`
    python test_qcrd.py vote loss    the tests whose names contain one of these words
    python test_qcrd.py bench        speed and memory, no pass or fail
"""
import concurrent.futures
import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest.mock
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import requests
import sentencepiece
import torch
import torch.utils.flop_counter

import fetch_data
import qcrd
import t5

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"            # real data for more tests, where it is there


class Skip(Exception):
    """Raised by a test that cannot run here; its text says what is missing."""


# ---------------------------------------------------------------- t5.py

# Shapes that break habits: heads * d_kv != d_model, more layers on one side, odd vocabularies, few buckets, short maximal distances
ODD_SHAPES = [dict(vocab_size=v, d_model=d, d_kv=k, d_ff=f, num_layers=e, num_decoder_layers=n, num_heads=h,
                   relative_attention_num_buckets=b, relative_attention_max_distance=m)
              for v, d, k, f, e, n, h, b, m in [
                  (101, 32, 8, 64, 2, 2, 4, 32, 128), (97, 24, 16, 40, 1, 3, 3, 32, 128), (130, 40, 4, 96, 3, 1, 5, 8, 16),
                  (256, 16, 32, 16, 2, 2, 1, 4, 5), (64, 48, 12, 100, 2, 1, 2, 16, 300), (201, 8, 8, 24, 1, 1, 7, 6, 20),
                  (333, 64, 16, 32, 2, 4, 4, 64, 128), (75, 20, 10, 33, 4, 2, 2, 10, 11), (129, 36, 6, 72, 1, 2, 6, 32, 64),
                  (1000, 28, 14, 56, 2, 2, 2, 12, 100)]]


def peer_or_skip():
    try:
        import transformers
    except ImportError:
        raise Skip("transformers is not installed") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def hf_model(shape: dict, v11: bool, seed: int = 0, untied: bool = False):
    """A random T5 of transformers with norms and biases away from their degenerate start; untied brings a head of its own."""
    peer = peer_or_skip()
    torch.manual_seed(seed)
    config = peer.T5Config(decoder_start_token_id=0, tie_word_embeddings=not v11, feed_forward_proj="gated-gelu" if v11 else "relu",
                           attn_implementation="eager", **shape)
    model = peer.T5ForConditionalGeneration(config).eval()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative" in name or "layer_norm" in name:
                weight += 0.3 * torch.randn_like(weight)
    return model


def through_disk(model, **how) -> t5.T5:
    """The same weights as t5.T5, by way of transformers' own file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **how)
        if any("lm_head" in name for name in model.state_dict()) and not torch.equal(model.lm_head.weight, model.shared.weight):
            state = t5.read_hf_tensors(Path(folder))[0] | {"lm_head.weight": model.lm_head.weight.detach()}
            t5.write_safetensors(Path(folder) / "model.safetensors", state)
        return t5.T5.from_hf(folder)


def random_batch(vocab: int, rows: int, width: int, seed: int = 0, least: int = 1):
    """Right-padded ids (rows, width) that end in </s>, and their mask; the first row is full."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, width), generator=rng)
    lengths = torch.randint(least, width + 1, (rows,), generator=rng)
    lengths[0] = width
    mask = torch.arange(width)[None] < lengths[:, None]
    ids[torch.arange(rows), lengths - 1] = t5.EOS
    return ids * mask, mask


def shifted(targets: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], 1)


def small_t5(seed: int = 0, **changes) -> t5.T5:
    torch.manual_seed(seed)
    shape = {"vocab_size": 67, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    return t5.T5(t5.Config(**shape | changes)).eval()


def one_line(call, *words: str) -> str:
    """The text of the InputError that `call` must raise: one line with all the words."""
    try:
        call()
    except t5.InputError as error:
        text = str(error)
    else:
        raise AssertionError(f"not refused: {words}")
    assert "\n" not in text and all(word in text for word in words), (text, words)
    return text


def test_t5_equals_transformers_on_odd_shapes():
    for i, shape in enumerate(ODD_SHAPES):
        for v11 in (False, True):
            model = hf_model(shape, v11, seed=i, untied=v11 and i % 2 == 0)
            ours = through_disk(model)
            assert ours.config.tied == (not (v11 and i % 2 == 0)) and ours.config.scaled == (not v11) and ours.config.gated == v11
            x, x_mask = random_batch(shape["vocab_size"], 5, 23, seed=i)
            y, y_mask = random_batch(shape["vocab_size"], 5, 14, seed=i + 50)
            with torch.no_grad():
                expected = model(input_ids=x, attention_mask=x_mask.long(), decoder_input_ids=shifted(y)).logits
                logits = ours(x, x_mask, shifted(y))
                assert (logits - expected)[y_mask].abs().max() <= 1e-4 * expected.abs().max(), (i, v11)
                greedy = model.generate(input_ids=x, attention_mask=x_mask.long(), max_new_tokens=12, do_sample=False, use_cache=False)
                greedy = greedy[:, 1:]                             # without the start token
                written = ours.generate(x, x_mask, 12)
            width = min(greedy.shape[1], written.shape[1])
            assert torch.equal(greedy[:, :width], written[:, :width]) and not greedy[:, width:].any() and not written[:, width:].any()


def test_t5_gradients_and_step_equal_transformers():
    for v11 in (False, True):
        shape = dict(ODD_SHAPES[6], dropout_rate=0.0)
        model = hf_model(shape, v11, untied=v11)
        ours = through_disk(model)
        x, x_mask = random_batch(333, 6, 19)
        y, y_mask = random_batch(333, 6, 11, seed=1)
        model.train(), ours.train()
        logits = model(input_ids=x, attention_mask=x_mask.long(), decoder_input_ids=shifted(y)).logits
        rows = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none").mul(y_mask).sum(1) / y_mask.sum(1)
        losses = ours.loss(x, x_mask, y, y_mask)
        assert torch.allclose(losses, rows, rtol=1e-5)
        (rows * torch.arange(1.0, 7)).sum().backward()
        (losses * torch.arange(1.0, 7)).sum().backward()
        theirs = dict(model.named_parameters())
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, ours)]
        for step in (False, True):
            for name, parts in t5.hf_names(ours.config).items():
                parameter = ours.get_parameter(name)
                a = torch.cat([theirs[part] if step else theirs[part].grad for part in parts])
                b = parameter if step else parameter.grad
                assert (a - b).abs().max() <= 1e-4 * a.abs().max(), (name, step)
            [optimizer.step() for optimizer in optimizers]


def test_t5_dropout_places_equal_transformers():
    """Both libraries drop every seventh element, so that equal losses mean equal places and equal scaling."""
    def every_seventh(x, p):
        return x * (torch.arange(x.numel()).view(x.shape) % 7 != 0)

    for v11 in (False, True):
        model = hf_model(dict(ODD_SHAPES[0], dropout_rate=0.1), v11).train()
        ours = through_disk(model).train()
        x, y = (random_batch(101, 4, width, seed=width, least=width)[0] for width in (9, 7))
        full = [torch.ones(z.shape, dtype=torch.bool) for z in (x, y)]
        fake = lambda x, p=0.5, training=True, inplace=False: every_seventh(x, p) / (1 - p) if training else x    # noqa: E731
        with unittest.mock.patch("torch.nn.functional.dropout", fake), \
                unittest.mock.patch.object(t5.Dropout, "__call__", lambda self, x: every_seventh(x, self.p)):
            expected = model(input_ids=x, attention_mask=full[0].long(), labels=y).loss
            loss = ours.loss(x, full[0], y, full[1]).mean()
            plain = ours.eval().loss(x, full[0], y, full[1]).mean()
        assert abs(loss - expected) <= 1e-5 * expected and abs(plain - expected) > 1e-3 * expected


def test_t5_dropout_is_bernoulli_and_seeded():
    x = torch.ones(2000, 1000)
    for p in (0.1, 0.02, 0.6):
        torch.manual_seed(3)
        drop = t5.Dropout(p, x.device)
        first, second = drop(x) == 0, drop(x) == 0
        torch.manual_seed(3)
        assert torch.equal(first, t5.Dropout(p, x.device)(x) == 0) and not torch.equal(first, second)
        sigma = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(first.float().mean() - p) < 5 * sigma and abs(second.float().mean() - p) < 5 * sigma
        for lag in (1, 2, 1000):                                   # independent of the neighbour and of the element above
            flat = first.flatten()
            both = (flat[lag:] & flat[:-lag]).float().mean()
            assert abs(both - p * p) < 6 * (p * p / x.numel()) ** 0.5 + 2 * p * 5 * sigma * 0.1, (p, lag)
        assert first[0, 0] is not None and 0.5 * p < first[:, -1].float().mean() < 1.5 * p    # the end is dropped as often
    leaf = torch.ones(50, 50, requires_grad=True)
    out = t5.Dropout(0.3, leaf.device)(leaf)
    out.sum().backward()
    assert torch.equal(out.detach(), leaf.grad) and 0 < int((leaf.grad == 0).sum()) < 2500


def test_t5_loss_shares_memory_and_rows():
    model = small_t5()
    x, x_mask = random_batch(67, 4, 9)
    y, y_mask = random_batch(67, 7, 6, seed=1)
    rows = torch.tensor([0, 2, 2, 3, 1, 0, 2])
    weights = torch.linspace(-1, 2, 7)
    plain = model.loss(x[rows], x_mask[rows], y, y_mask)
    (plain * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    shared = model.loss(x, x_mask, y, y_mask, rows=rows)
    assert shared.dtype == torch.float32 and torch.allclose(shared, plain, rtol=1e-5)
    memory = model.encode(x, x_mask)
    assert not memory[~x_mask].any()
    leaf = memory.detach().requires_grad_()
    for group in (slice(0, 3), slice(3, 7)):                       # two calls, one encoding, one backward through the encoder
        (model.loss(None, x_mask, y[group], y_mask[group], memory=leaf, rows=rows[group]) * weights[group]).sum().backward()
    memory.backward(leaf.grad)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-6), name
    with torch.no_grad():
        assert torch.allclose(model.loss(x, x_mask, y, y_mask, rows=rows), plain, rtol=1e-5)


def test_t5_encoder_works_without_the_decoder():
    model = small_t5()
    half = copy.deepcopy(model)
    del half.decoder
    x, x_mask = random_batch(67, 4, 9)
    assert torch.equal(half.encode(x, x_mask), model.encode(x, x_mask))


def test_t5_cached_generation_equals_uncached():
    model = small_t5(vocab_size=30)
    x, x_mask = random_batch(30, 12, 9)
    uniforms = torch.rand(12, 25, generator=torch.Generator().manual_seed(5))
    for temperature in (0.0, 1.5):
        written = model.generate(x, x_mask, 25, temperature=temperature, generator=torch.Generator().manual_seed(5))
        tokens, done = torch.zeros(12, 1, dtype=torch.long), torch.zeros(12, dtype=torch.bool)
        for t in range(written.shape[1]):
            with torch.no_grad():
                logits = model(x, x_mask, tokens)[:, -1]
            new = logits.argmax(1) if temperature == 0 else t5.draw(logits / temperature, uniforms[:, t])
            new[done] = 0
            done |= new == t5.EOS
            tokens = torch.cat([tokens, new[:, None]], 1)
        assert torch.equal(tokens[:, 1:], written)
        assert temperature == 0 or done.sum() > 3                  # rows did finish early, and caches were compacted


def test_t5_sampled_rows_depend_on_their_own_numbers():
    model = small_t5(vocab_size=30).train()
    x, x_mask = random_batch(30, 16, 9)
    uniforms = torch.rand(16, 30)

    def sample(rows):
        with unittest.mock.patch("torch.rand", lambda *size, generator=None: uniforms[rows]):
            out = model.generate(x[rows], x_mask[rows], 30, temperature=1.5)
        return torch.nn.functional.pad(out, (0, 30 - out.shape[1]))

    everything = sample(torch.arange(16))
    for rows in ([3], [15, 0, 7], [9, 8, 7, 6, 5]):
        assert torch.equal(sample(torch.tensor(rows)), everything[rows])
    assert model.training


def test_t5_sampling_fits_the_softmax():
    """Chi-square over 20,000 draws at the two temperatures in use, </s> included; limit holds; one token more than 128 blocks."""
    model = small_t5(seed=3, vocab_size=300)                       # a seed that gives </s> a few per cent
    x, x_mask = random_batch(300, 1, 6)
    with torch.no_grad():
        logits = model(x, x_mask, torch.zeros(1, 1, dtype=torch.long))[0, 0] * 1.0
    for temperature, limit in ((0.7, None), (1.5, None), (1.5, 140)):
        p = (logits / temperature).masked_fill(torch.arange(300) >= (limit or 300), float("-inf")).softmax(-1)
        drawn = model.generate(x.expand(20000, -1), x_mask.expand(20000, -1), 1, temperature=temperature, limit=limit,
                               generator=torch.Generator().manual_seed(11))[:, 0]
        expected, seen = p * 20000, torch.bincount(drawn, minlength=300).float()
        assert expected[t5.EOS] > 20 and not seen[limit or 300:].any()
        rare = expected < 5                                        # pooled, as the test's approximation needs
        expected, seen = (torch.cat([z[~rare], z[rare].sum()[None]]) for z in (expected, seen))
        expected, seen = expected[expected > 0], seen[expected > 0]
        freedom = len(expected) - 1
        statistic = float(((seen - expected) ** 2 / expected).sum())
        # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal
        z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
        assert -4 < z < 4, (temperature, statistic, freedom)


def test_t5_draw_never_takes_what_has_no_probability():
    logits = torch.full((6, 260), float("-inf"))
    logits[:, [5, 130, 131]] = torch.tensor([0.0, 1.0, 0.5])
    edges = torch.tensor([0.0, 1e-7, 0.5, 0.999, 1 - 2**-23, 1 - 2**-24])
    drawn = t5.draw(logits, edges)
    assert set(drawn.tolist()) <= {5, 130, 131} and drawn[0] == 5 and drawn[-1] == 131


def test_t5_low_precision():
    torch.manual_seed(0)
    x, x_mask = random_batch(32000, 3, 20)
    y, y_mask = random_batch(32000, 3, 12, seed=1)
    for shape in (dict(), dict(d_ff=1024, num_layers=2, num_decoder_layers=2, num_heads=6, gated=True, tied=False, scaled=False)):
        model = t5.T5(t5.Config(**shape)).eval()
        full = model.loss(x, x_mask, y, y_mask).mean()
        with torch.autocast("cpu", torch.bfloat16):
            low = model.loss(x, x_mask, y, y_mask).mean()
        low.backward()
        assert low.dtype == torch.float32 and abs(low - full) < 0.02 * full, (low, full)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for gated in (False, True):                                    # activations that pass 65,504, as t5-base's and larger do
        model = small_t5(gated=gated)
        with torch.no_grad():
            for layer in [*model.encoder.layers, *model.decoder.layers]:
                layer.feed_forward.wi.weight *= 300 if gated else 3000
                layer.feed_forward.wo.weight *= 30
        x, x_mask = random_batch(67, 4, 9)
        y, y_mask = random_batch(67, 4, 6, seed=1)
        peaks = []
        hooks = [layer.feed_forward.wo.register_forward_hook(lambda m, a, out, peaks=peaks: peaks.append((out.abs().max(), out.dtype)))
                 for layer in [*model.encoder.layers, *model.decoder.layers]]
        full = model.loss(x, x_mask, y, y_mask)
        with torch.autocast("cpu", torch.float16):
            low = model.loss(x, x_mask, y, y_mask)
        assert max(peak for peak, _ in peaks) > 65504 and all(dtype == torch.float32 for _, dtype in peaks), peaks
        assert low.isfinite().all() and torch.allclose(low, full, rtol=0.02), (low, full)
        (low.mean() * 1024).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        [hook.remove() for hook in hooks]


def test_t5_files_round_trip():
    for changes in (dict(), dict(gated=True, tied=False, scaled=False), dict(gated=True, scaled=False), dict(tied=False)):
        model = small_t5(**changes)
        x, x_mask = random_batch(67, 4, 9)
        y, _ = random_batch(67, 4, 6, seed=1)
        expected = model(x, x_mask, shifted(y))
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "vocab").write_bytes(b"pieces")
            model.save(folder / "ours", vocab=folder / "vocab")
            model.save(folder / "half", dtype=torch.float16)
            model.save_hf(folder / "hf")
            assert (folder / "ours" / "spiece.model").read_bytes() == b"pieces" and not list(folder.rglob("*.tmp"))
            for back in (t5.T5.load(folder / "ours"), t5.T5.from_hf(folder / "hf")):
                assert back.config == model.config and torch.equal(back(x, x_mask, shifted(y)), expected)
                assert all(p.requires_grad for p in back.parameters()) and not back.training
            half = t5.T5.load(folder / "half")
            assert half.shared.weight.dtype == torch.float32 and torch.allclose(half(x, x_mask, shifted(y)), expected, atol=0.02, rtol=0.02)
            peer = peer_or_skip().T5ForConditionalGeneration.from_pretrained(folder / "hf").eval()
            theirs = peer(input_ids=x, attention_mask=x_mask.long(), decoder_input_ids=shifted(y)).logits
            assert (theirs - expected).abs().max() <= 1e-4 * expected.abs().max(), changes


def test_t5_reads_shards_and_bin():
    model = small_t5(gated=True, tied=False, scaled=False)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_hf(folder)
        tensors = t5.read_safetensors(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        places = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(places.values()):
            t5.write_safetensors(folder / file, {name: tensors[name] for name in names if places[name] == file})
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        for name, weight in t5.T5.from_hf(folder).state_dict().items():
            assert torch.equal(weight, model.state_dict()[name])
        index.write_text(json.dumps({"weight_map": {"shared.weight": "../elsewhere.safetensors"}}))
        one_line(lambda: t5.T5.from_hf(folder), "index.json", "weight_map")
        index.unlink()
        one_line(lambda: t5.T5.from_hf(folder), "neither")
        torch.save(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, folder / "pytorch_model.bin")
        assert torch.equal(t5.T5.from_hf(folder).head.weight, model.head.weight)
        torch.save({"shared.weight": Bomb(folder / "ran")}, folder / "pytorch_model.bin")
        one_line(lambda: t5.T5.from_hf(folder), "pytorch_model.bin", "never run")
        assert not (folder / "ran").exists()


class Bomb:
    """Unpickling it with a careless reader writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_t5_refuses_broken_checkpoints():
    model = small_t5()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_hf(folder)
        file, config = folder / "model.safetensors", folder / "config.json"
        good, settings = file.read_bytes(), json.loads(config.read_text())
        length = int.from_bytes(good[:8], "little")
        header = json.loads(good[8:8 + length])

        def broken(*words, head=None, **entry):
            """Refused after header[shared.weight] or the whole header is changed, or for the file as it stands."""
            if entry or head is not None:
                changed = json.loads(json.dumps(header)) if head is None else head
                if entry:
                    changed["shared.weight"].update(entry)
                text = json.dumps(changed).encode()
                file.write_bytes(len(text).to_bytes(8, "little") + text + good[8 + length:])
            one_line(lambda: t5.T5.from_hf(folder), *words)

        for cut in (0, 5, 8, 100, 8 + length, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:cut])
            broken("model.safetensors")
        broken("truncated")
        file.write_bytes((2**62).to_bytes(8, "little") + good[8:])
        broken("header", "fetch it again")
        file.write_bytes((4).to_bytes(8, "little") + good[8:])
        broken("not JSON")
        size = header["shared.weight"]["data_offsets"][1] - header["shared.weight"]["data_offsets"][0]
        broken("shared.weight", "truncated", data_offsets=[10**9, 10**9 + size])
        broken("overlaps", data_offsets=[8, 8 + size])
        for bad in ([8, 0], [-4, 0], [0], "0", None, [0, 2.5], [True, 4]):
            broken("shared.weight", data_offsets=bad)
        broken("shared.weight", "F64", dtype="F64")
        broken("shared.weight", "['F32']", dtype=["F32"])
        broken("shared.weight", "shape", shape=[0, 10**30], data_offsets=[0, 0])
        broken("shared.weight", "I32", dtype="I32")
        broken("shared.weight", "BF16", dtype="BF16")              # half the bytes that the offsets hold
        broken("shared.weight", "shape", shape=[66, 16])
        broken("shared.weight", "shape", shape=[-67, -16])
        broken("shared.weight", "shape", "config.json", shape=[16, 67])
        broken("header", head=[1, 2])
        broken("header", head={"shared.weight": 3})
        lost = {name: entry for name, entry in header.items() if "EncDecAttention.k" not in name}
        broken("EncDecAttention.k.weight", "missing", head=lost)
        broken("shared.weight", "missing", head={name: entry for name, entry in header.items() if name != "shared.weight"})
        broken("encoder.block.7.extra", head=header | {"encoder.block.7.extra": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
        file.write_bytes(good)
        for key, value, word in (
                ("model_type", "mt5", "mT5"), ("model_type", None, "t5"), ("feed_forward_proj", "gated-silu", "gated-silu"),
                ("feed_forward_proj", "gelu", "gelu"), ("eos_token_id", 2, "eos_token_id"), ("pad_token_id", 1, "pad_token_id"),
                ("decoder_start_token_id", 5, "decoder_start_token_id"), ("d_model", -1, "d_model"), ("d_kv", "64", "d_kv"),
                ("num_heads", None, "num_heads"), ("d_ff", 25, "config.json says"), ("dropout_rate", 1.5, "dropout_rate"),
                ("relative_attention_num_buckets", 2, "buckets"), ("num_layers", 3, "encoder.block.2")):
            config.write_text(json.dumps(settings | {key: value}))
            broken(word)
        for text in ("{", "[" * 100_000):
            config.write_text(text)
            broken("config.json", "not JSON")
        config.unlink()
        broken("config.json")
        ours = folder / "ours"
        model.save(ours)
        (ours / "model.pt").write_bytes((ours / "model.pt").read_bytes()[:-100])
        one_line(lambda: t5.T5.load(ours), "model.pt")
        torch.save({"shared.weight": Bomb(folder / "ran")}, ours / "model.pt")
        one_line(lambda: t5.T5.load(ours), "model.pt", "never run")
        torch.save([1, 2], ours / "model.pt")
        one_line(lambda: t5.T5.load(ours), "model.pt", "tensors")
        torch.save(dict(model.state_dict(), **{"shared.weight": torch.ones(67, 16, dtype=torch.long)}), ours / "model.pt")
        one_line(lambda: t5.T5.load(ours), "shared.weight", "int64")
        (ours / "config.json").write_text(json.dumps({"layers": 2}))
        one_line(lambda: t5.T5.load(ours), "config.json")
        assert not (folder / "ran").exists()


def test_t5_golden_checkpoint():
    """A checkpoint that transformers 5.23 made, with the logits and the greedy tokens that it gave: parity where it is not installed."""
    for name in ("v1_0", "v1_1"):
        folder = HERE / "weights" / "golden" / name
        model, golden = t5.T5.from_hf(folder), torch.load(folder / "expected.pt", weights_only=True)
        with torch.no_grad():
            logits = model(golden["input_ids"], golden["mask"], golden["target_in"])
        assert (logits - golden["logits"]).abs().max() <= 1e-4 * golden["logits"].abs().max()
        assert torch.equal(model.generate(golden["input_ids"], golden["mask"], golden["greedy"].shape[1]), golden["greedy"])


def make_golden() -> None:
    """Writes weights/golden with the transformers that is installed:  python -c "import test_qcrd; test_qcrd.make_golden()"."""
    for name, v11 in (("v1_0", False), ("v1_1", True)):
        folder = HERE / "weights" / "golden" / name
        shape = {"vocab_size": 97, "d_model": 16, "d_kv": 12, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
        model = hf_model(shape, v11, seed=7, untied=v11)
        model.save_pretrained(folder)
        if v11:
            state = t5.read_hf_tensors(folder)[0] | {"lm_head.weight": model.lm_head.weight.detach()}
            t5.write_safetensors(folder / "model.safetensors", state)
        (folder / "generation_config.json").unlink(missing_ok=True)
        x, x_mask = random_batch(97, 3, 40)
        y, _ = random_batch(97, 3, 12, seed=1, least=12)
        with torch.no_grad():
            logits = model(input_ids=x, attention_mask=x_mask.long(), decoder_input_ids=shifted(y)).logits
            greedy = model.generate(input_ids=x, attention_mask=x_mask.long(), max_new_tokens=20, do_sample=False, use_cache=False)[:, 1:]
        torch.save(dict(input_ids=x, mask=x_mask, target_in=shifted(y), logits=logits, greedy=greedy), folder / "expected.pt")


def small_tokenizer(folder: Path) -> t5.Tokenizer:
    """A SentencePiece model trained here, with T5's special ids."""
    rng = random.Random(0)
    words = "how many apples pears did Tom Ann buy sell give 1 2 3 17 28 then more were left in the box , . ( + ) ?".split()
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, vocab_size=90, minloglevel=2,
                                                 pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False)
    return t5.Tokenizer(folder / "spiece.model")


def test_t5_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = small_tokenizer(folder)
        ids = tokenizer.encode("how many apples did Tom buy ?")
        assert ids[-1] == t5.EOS and t5.UNK not in ids and tokenizer.decode(ids) == "how many apples did Tom buy ?"
        cut = tokenizer.encode("apples " * 50, 7)
        assert tokenizer.encode("") == [t5.EOS] and len(cut) == 7 and cut[-1] == t5.EOS
        assert tokenizer.encode("Tom</s>Ann") == tokenizer.encode("Tom") + tokenizer.encode("Ann")
        assert tokenizer.encode("<extra_id_0>")[0] == tokenizer.size + 99 == tokenizer.sentinel(0)
        assert tokenizer.sentinel(99) == tokenizer.size
        assert tokenizer.decode([tokenizer.sentinel(3), 0, 1, 10**6]) == ""
        (folder / "other").write_bytes(b"nothing of the kind")
        one_line(lambda: t5.Tokenizer(folder / "other"), "other")
        one_line(lambda: t5.Tokenizer(folder / "absent"), "absent")


def test_t5_tokenizer_equals_transformers():
    peer = peer_or_skip()
    texts = ["", " ", "\n", "Hello  world ", "line\nbreak\ttab", "( 3 + 4 ) * 2 = 14", "1,234.5", "5 ÷ 6 × 7", "naïve café", "e\u0301",
             "日本語", "🙂", "premise</s>hypothesis", "a </s> b", "x <extra_id_0> y<extra_id_12>z", "<pad> <unk>", "<s>",
             "\u00a0nbsp\u3000wide", "a" * 300, "word " * 300]
    with tempfile.TemporaryDirectory() as folder:
        small_tokenizer(Path(folder))
        for file in (Path(folder) / "spiece.model", *SHARED.glob("mirror/huggingface.co/google-t5/t5-small/resolve/*/spiece.model")):
            if file.parent != Path(folder):
                shutil.copyfile(file, Path(folder) / "spiece.model")
                lines = (SHARED / "teacher" / "svamp_train.jsonl").read_text(encoding="utf-8").splitlines()[:150]
                texts += [text for line in lines for text in [json.loads(line)["input"], *json.loads(line)["samples"][:2]]]
            try:
                theirs = peer.T5Tokenizer.from_pretrained(folder)
            except (ImportError, ValueError):
                raise Skip("transformers reads spiece.model only with protobuf installed") from None
            ours = t5.Tokenizer(Path(folder) / "spiece.model")
            assert len(theirs) == ours.size + 100
            for text in texts:
                assert theirs(text).input_ids == ours.encode(text), text
                assert theirs(text, truncation=True, max_length=5).input_ids == ours.encode(text, 5), text


def test_t5_span_corruption():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizer(Path(folder))
    rng = random.Random(0)
    masked = total = 0
    for length in [2, 3, 5, 20, 100, 400] * 20:
        ids = [rng.randrange(3, tokenizer.size) for _ in range(length)]
        source, target = t5.corrupt(ids, tokenizer, rng)
        assert source[-1] == target[-1] == t5.EOS
        pieces, current = {}, None
        for token in target[:-1]:
            if token >= tokenizer.size:
                current = token
                pieces[current] = []
            else:
                pieces[current].append(token)
        assert all(pieces.values()) and [t for s in source[:-1] for t in pieces.get(s, [s])] == ids
        if length >= 20:
            masked, total = masked + sum(map(len, pieces.values())), total + length
    assert abs(masked / total - 0.15) < 0.01


def test_t5_pretraining_learns_and_repeats():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizer(Path(folder))
    pairs = [(f"say {word}", word) for word in "apples pears Tom Ann box more".split()]
    questions, answers = (t5.pad([tokenizer.encode(text) for text in side]) for side in zip(*pairs))
    texts, runs = ["how many apples did Tom buy ?", "Ann did sell 17 pears"], []
    for _ in range(2):
        model = small_t5(vocab_size=tokenizer.size + 100, d_model=32, d_ff=64, dropout_rate=0.1)
        before = model.loss(*questions, *answers).mean().item()
        last = t5.pretrain(model, tokenizer, texts, 60, batch=16, lr=3e-3, pairs=pairs, seed=4)
        after = model.loss(*questions, *answers).mean().item()
        runs.append((last, model.state_dict()))
        assert not model.training and after < 0.5 * before, (before, after)
    assert runs[0][0] == runs[1][0] and all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values()))
    one_line(lambda: t5.pretrain(model, tokenizer, [], 1), "texts")


def test_t5_atomic_leaves_no_half_file():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_text("old")
        with contextlib.suppress(ZeroDivisionError), t5.atomic(path) as temporary:
            temporary.write_text("half")
            1 / 0
        assert path.read_text() == "old" and os.listdir(folder) == ["file"]
        with t5.atomic(path) as temporary:
            assert temporary.parent == path.parent and temporary.name.endswith(".tmp")
            temporary.write_text("new")
        assert path.read_text() == "new" and os.listdir(folder) == ["file"]

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


DEMO_DIGEST = "54c39e24750fb378"           # of all problems; the numbers in the README were measured on these
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
    assert digest.startswith(DEMO_DIGEST), digest
    for p in problems["train"][:200] + problems["test"][:200]:
        numbers = [n for n in re.findall(r"\d+", p.text) if n != str(p.distractor)]
        assert sorted(numbers) == sorted(re.findall(r"\d+", p.label)) and len(set(numbers)) == len(numbers), p
        equation, amounts = fetch_data.solve(p.first, p.steps)
        assert equation == p.label and None not in amounts and max(amounts) < 100, p
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


def test_pretrain_demo_makes_the_committed_vocabulary():
    with tempfile.TemporaryDirectory() as folder:
        made = fetch_data.pretrain_demo(Path(folder, "demo"), steps=2)
        committed = HERE / "weights" / "demo"
        assert (made / "spiece.model").read_bytes() == (committed / "spiece.model").read_bytes()
        assert t5.T5.load(made).config == t5.T5.load(committed).config
        assert next(iter(torch.load(made / "model.pt", weights_only=True).values())).dtype == torch.float16


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
            assert r.status_code == 400 and name in r.json()["error"]["message"], (fields, r.text)
        for body in (b"", b"{", b"[]", b'{"messages": []}', b'{"messages": [{"content": null}]}', b"[" * 100_000):
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
    some = [qcrd.Rationale(None, None, positive, place=place, loss=loss) for place, positive, loss in
            zip([0, 0, 0, 0, 0, 1, 1, 1], [True, True, False, False, False, True, False, False], losses)]
    by_hand = {  # ℓ_pos s - 0.2 (1 - s⁻) min(ℓ⁻ - 3, 0)
        ("min", "max"): ([1, 3, 5], 0.5 * 0.4 + 0.2 * 0.9 * 0.5 + 1.5, 1),       # B's negative beyond δ: its term is 0
        ("min", "min"): ([1, 4, 5, 7], 0.5 * 0.4 + 0.2 * 0.4 * 2.0 + 1.5 + 0.2 * 0.1 * 2.5, 0),
        ("max", "max"): ([0, 3, 5], 0.8 * 0.9 + 0.2 * 0.9 * 0.5 + 1.5, 1),
        ("mean", "mean"): ([0, 1, 2, 3, 4, 5, 7], (0.8 * 0.9 + 0.5 * 0.4) / 2 + 0.2 * (0.7 * 1.0 + 0.9 * 0.5 + 0.4 * 2.0) / 3 + 1.5
                           + 0.2 * 0.1 * 2.5 / 2, 0.5)}
    for (positive, negative), (rows, expected, left_out) in by_hand.items():
        config = qcrd.Config(positive=positive, negative=negative)
        picks = qcrd.pick(some, config, tiny_student(config), None)
        picked = [some.index(c) for c in picks.rationales]
        assert (picked, picks.left_out) == (rows, left_out), (positive, negative, picked, picks)
        chosen = torch.tensor([losses[r] for r in picked], requires_grad=True)
        s = torch.tensor([score[r] for r in picked], requires_grad=True)
        cl = qcrd.contrastive_terms(chosen, s, picks.share, picks.positive, config.beta, config.delta).sum()
        assert abs(cl.item() - expected) < 1e-6, (positive, negative, cl.item(), expected)
        cl.backward()
        assert s.grad is None                                                    # weights carry no gradient
        if (positive, negative) == ("min", "max"):
            assert torch.allclose(chosen.grad, torch.tensor([0.5, -0.2 * 0.9, 1.0]))
    clipped = torch.tensor([3.5, 2.9], requires_grad=True)                       # the training pass clamps again
    terms = qcrd.contrastive_terms(clipped, torch.tensor([0.0, 0.0]), torch.ones(2), torch.tensor([False, False]), 0.2, 3.0)
    terms.sum().backward()
    assert torch.allclose(terms, torch.tensor([0.0, 0.02])) and torch.allclose(clipped.grad, torch.tensor([0.0, -0.2]))
    assert abs(qcrd.total_loss(2.0, 3.0, 4.0, (0.5, 0.5, 0.405)) - 4.12) < 1e-9


def test_loss_ties_and_alphas():
    config = qcrd.Config()
    some = [qcrd.Rationale(None, None, loss < 2, loss=loss) for loss in (1.0, 1.0, 2.0, 2.0)]
    assert qcrd.pick(some, config, tiny_student(config), None).rationales == [some[0], some[2]]      # the first on a tie
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
        total = total + config.alpha_predict * row_loss(student.predict_prefix, x, data.labels[q])
        for rows, how, positive in ((data.of(q, True), config.positive, True), (data.of(q, False) + negatives.get(q, []), config.negative, False)):
            if not rows:
                continue
            losses = torch.stack([row_loss(student.explain_prefix, x, row) for row in rows])
            with torch.no_grad():
                s = torch.cat([torch.sigmoid(d(student, [qcrd.Rationale(x, row)])) for row in rows]) if d else torch.full((len(rows),), float(positive))
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
        some = qcrd.candidates(data, batch, negatives)
        needed = qcrd.need_losses(some, config)
        for c, loss in zip(needed, qcrd.candidate_losses(student, needed).tolist()):
            c.loss = loss
        picks = qcrd.pick(some, config, student, d)
        labels, rationales = qcrd.backward(student, data, config, batch, picks, (0.5, 0.5, 0.0), len(batch))
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


def test_step_under_fp16_skips_what_overflows():
    """GPUs without bf16 train with a scaler: a step whose scaled gradient overflows changes nothing but the scale; the next that fits is near float32's."""
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float32", "fp16"):
            config = qcrd.Config(precision=precision, iterations=100, batch=5, delta=30.0)
            student = tiny_student(config, seed=3)
            data, negatives = toy(student)
            trainers[precision] = qcrd.Trainer(config, student, Path(folder), None, data, data)
        full, half = trainers["float32"], trainers["fp16"]
        assert half.scaler.is_enabled() and not full.scaler.is_enabled()
        half.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        start = [p.detach().clone() for p in half.params]
        skipped = 0
        while all(map(torch.equal, start, half.params)):
            assert skipped < 40 and half.scaler.get_scale() == 2.0 ** (40 - skipped)
            half.step(list(range(5)), negatives, (0.5, 0.5, 0.5), 0, torch.zeros(0))
            skipped += 1
        assert skipped > 5                                           # 2^40 is far beyond 65,504
        full.step(list(range(5)), negatives, (0.5, 0.5, 0.5), 0, torch.zeros(0))
        a, b = (torch.cat([p.grad.flatten() for p in t.params]) for t in (full, half))
        assert torch.isfinite(b).all() and (a - b).norm() < 0.02 * a.norm(), (a - b).norm() / a.norm()


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
        rows, targets = qcrd.discriminator_batch(data, student, config, rng, questions, negatives, 20)
        assert len(rows) == 20 and targets.sum() == 10
    assert qcrd.discriminator_batch(data, student, config, rng, [2, 3], negatives, 20)[0] == []
    changed = [qcrd.corrupt("one two three four five six seven eight nine ten", ["x"], 0.3, rng) for _ in range(200)]
    kept = np.mean([sum(w != "x" for w in text.split()) for text in changed])
    assert 6.5 < kept < 7.5 and all("x" in text or len(text.split()) < 10 for text in changed)
    flipped = qcrd.Config(discriminator_noise=1.0)
    assert (qcrd.discriminator_batch(data, student, flipped, rng, [0], {}, 8)[1] == torch.tensor([0.0] * 4 + [1.0] * 4)).all()


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
        flags = [*SHORT, "--iterations", 7, "--lr", 1.23456789e-3]               # more digits than a line of metrics shows
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


def test_export_equals_transformers():
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
            qcrd.write_json(run / "config.json", dict(config=dataclasses.asdict(config), kind="number", answer_tokens=12))
            qcrd.export(run, folder / f"out{gated}")
            theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder / f"out{gated}").eval()
            data, _ = toy(student)
            unused = list(range(student.tokenizer.size, student.model.config.vocab_size))    # rows without a piece are never written
            ours = student.write(student.predict_prefix, [data.questions[i] for i in range(5)], 12, 0.0, (), "")
            for i, row in enumerate(ours):
                x = torch.tensor([student.predict_prefix + list(data.questions[i])])
                y = theirs.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False, use_cache=False,
                                    suppress_tokens=unused)[0, 1:].tolist()
                assert list(row) == (y[:y.index(1) + 1] if 1 in y else y), (gated, i)


# -- tasks, answers, teacher

CHOICES = "Where do people keep jam?\nAnswer Choices:\n(a) cellar\n(b) train\n(c) kitchen cupboard\n(d) train station\n(e) math problem"
# kind, what a model says, the answer that a person reads in it (numbers by value; None: no answer can be read)
ANSWER_FORMS = [
    ("number", "There are 84 sweets for 2 children. The answer is (84 / 2).", "42"),
    ("number", "Half of 84 is 42.\nAnswer: 42", "42"),
    ("number", "So 84 / 2 = 42. Hence the answer is 42.", "42"),
    ("number", "It is half.\n#### 42", "42"),
    ("number", "Half of them, thus \\boxed{42}.", "42"),
    ("number", "We get $84 / 2 = \\boxed{42}$ sweets.", "42"),
    ("number", "The final answer is: $\\boxed{\\frac{84}{2}}$", "42"),
    ("number", "Final Answer: The final answer is $42$. I hope it is correct.", "42"),
    ("number", "**Answer:** 42 sweets", "42"),
    ("number", "**Answer: 42**", "42"),
    ("number", "### Solution\nHalve it.\n\n**The answer is 42.**", "42"),
    ("number", "The answer is **42**.", "42"),
    ("number", "the answer is $1,234.50.", "1234.5"),
    ("number", "The answer is 1,234,567 people.", "1234567"),
    ("number", "The answer is 42 sweets for each child.", "42"),
    ("number", "The answer is (42 sweets).", "42"),
    ("number", "The answer is 10 (5 for each of 2).", "10"),
    ("number", "The answer is: 42", "42"),
    ("number", "Answer = 42", "42"),
    ("number", "ANSWER:\n\n42", "42"),
    ("number", "The correct answer is 84 / 2 = 42 sweets.", "42"),
    ("number", "So, the answer to the question is 6 * 7.", "42"),
    ("number", "The answer should be 42.", "42"),
    ("number", "The answer is 6 × 7.", "42"),
    ("number", "The answer is 84 ÷ 2.", "42"),
    ("number", "The answer is 6 x 7.", "42"),
    ("number", "The answer is \\(6 \\times 7\\).", "42"),
    ("number", "The answer is 50 − 8.", "42"),
    ("number", "The answer is -3.", "-3"),
    ("number", "The answer is +5.", "5"),
    ("number", "The answer is .5", "0.5"),
    ("number", "The answer is 0.5.", "0.5"),
    ("number", "The answer is 25%.", "25"),
    ("number", "The answer is 007.", "7"),
    ("number", "The answer is ((52 - 17) + 30)).", "65"),
    ("number", "The answer is ( ( 52.0 - 17.0 ) + 30.0 ).", "65"),
    ("number", "My answer is 4. Wait, that forgets two of them. The answer is 6.", "6"),
    ("number", "The answer is 42. I hope this answer is helpful!", "42"),
    ("number", "<think>The answer is 7? No, 8.</think>Eight of them. The answer is 8.", "8"),
    ("number", "<think>The answer is 7? Let me see", None),
    ("number", "84 shared by 2 children are 42 each.", "42"),
    ("number", "Therefore each child has 84 / 2 = 42 sweets.", "42"),
    ("number", "Each child has\n84 / 2", "42"),
    ("number", "Rationale: Half of 84 is 42. Hence the answer is 42.\n\nQ: Tom has 3 cats. How many?\nA: The answer is 3.", "42"),
    ("number", "A 3-day trip costs 42.", "42"),
    ("number", "We need more information. How many were there at first?", None),
    ("number", "", None),
    ("number", "The answer is (some - 12).", None),
    ("number", "The answer is (2 * x).", None),
    ("number", "The answer is (some pens + 4 pens).", None),
    ("number", "He had 491 - 216 left. The answer is ((491 - 21", None),
    ("number", "The answer is 9**9**9.", None),
    ("number", "The answer is 1 / 0.", None),
    ("number", "The answer is not known.", None),
    ("choice", "Jam keeps in a cupboard. So the answer is (c) kitchen cupboard.", "kitchen cupboard"),
    ("choice", "It asks for a sum. So the answer is (e) math problem.\n\nQ: What is red?\nAnswer Choices:\n(a) blood", "math problem"),
    ("choice", "So the answer is (c).", "kitchen cupboard"),
    ("choice", "Answer: c", "kitchen cupboard"),
    ("choice", "Answer: C) kitchen cupboard", "kitchen cupboard"),
    ("choice", "The answer is B. The others make no sense.", "train"),
    ("choice", "The correct answer is option (d).", "train station"),
    ("choice", "The correct choice. Final answer: **(d) train station**", "train station"),
    ("choice", "The answer is kitchen cupboard, because jam is food.", "kitchen cupboard"),
    ("choice", "The answer is a train station.", "train station"),
    ("choice", "(a) cellar", "cellar"),
    ("choice", "c. kitchen cupboard", "kitchen cupboard"),
    ("choice", "Jam belongs into the kitchen cupboard.", "kitchen cupboard"),
    ("choice", "The answer must be a place for jam. Of the above choices, only the cellar fits. So the answer is (a) cellar.", "cellar"),
    ("choice", "The answer is \\boxed{\\text{(b)}}", "train"),
    ("choice", "So the answer is one of these four.", None),
    ("choice", "So the answer is either (c) or (d).", None),
    ("choice", "So the answer is (h).", None),
    ("choice", "It may be the cellar or the kitchen cupboard.", None),
    ("nli", "Rain is wet. So the answer is entailment.", "entailment"),
    ("nli", "So the answer is Contradiction.", "contradiction"),
    ("nli", "Answer: neutral, since nothing is said of the girls.", "neutral"),
    ("nli", "The answer is \"neutral\".", "neutral"),
    ("nli", "Nothing is said of it.\n\n**Neutral**", "neutral"),
    ("nli", "Asleep people repair nothing, so this is a contradiction.", "contradiction"),
    ("nli", "It is entailment. So the answer is entailment.\n\nPremise: A dog runs.\nHypothesis: It sits.\nAnswer: contradiction", "entailment"),
    ("nli", "It could be entailment or neutral.", None),
    ("nli", "I cannot say.", None),
    ("text", "Two weeks later. The answer is 05/17/2021.", "05/17/2021"),
    ("text", "The answer is Paris. It is the capital.", "Paris"),
    ("text", "The answer is Dr. No.", "Dr. No"),
    ("text", "So the answer is \"green tea\".", "green tea"),
    ("text", "Answer:\n\n**Monday**", "Monday"),
    ("text", "It is \\boxed{\\text{Monday}}.", "Monday"),
    ("text", "It is a Monday, I think.", None),
]
QUESTION_OF = {"choice": CHOICES, "nli": "A dog runs.</s>It sits."}


def test_answers_as_models_write_them():
    assert len(ANSWER_FORMS) >= 60
    for kind, said, wanted in ANSWER_FORMS:
        options = qcrd.NLI if kind == "nli" else []
        rationale, answer = qcrd.read_sample(said, QUESTION_OF.get(kind, "How many sweets?"), kind, options)
        assert qcrd.answer_key(answer, kind) == qcrd.answer_key(wanted, kind) and (wanted is None) == (answer is None), (said, answer, wanted)
        assert rationale in said


def test_rationale_is_cleaned():
    question = "Tom has 84 sweets for 2 children.\nHow many for each?"
    for said, wanted in [
        ("Half of 84 is 42. So the answer is 42.", "Half of 84 is 42."),
        ("Rationale: Half of 84 is 42. Hence the answer is Answer: 42", "Half of 84 is 42."),
        ("Q: Tom has 84 sweets for 2 children. How many for each?\nA: Half of 84 is 42. The answer is 42.", "Half of 84 is 42."),
        ("Tom has 84 sweets for 2 children.\nHow many for each? Half of 84 is 42. The answer is 42.", "Half of 84 is 42."),
        ("Half of 84 is 42. The answer is 42.\n\nQ: How many legs has a cat?\nA: It has 4. The answer is 4.", "Half of 84 is 42."),
        ("<think>Hm. The answer is 3?</think>\nHalf of 84 is 42.\n\n**Answer:** 42", "Half of 84 is 42."),
        ("Half of 84 is 42. This gives \\boxed{42} sweets.", "Half of 84 is 42."),
        ("Answer: 42. Half of 84 is 42.", "Half of 84 is 42."),                     # the answer first, its reason after it
        ("The answer is 42.", ""),
        ("Half of 84 \ud83d is 42. The answer is 42.", "Half of 84 ? is 42."),        # half an emoji, where max_tokens cut it
    ]:
        rationale, answer = qcrd.read_sample(said, question, "number")
        assert (rationale, qcrd.answer_key(answer, "number")) == (wanted, "42.0000"), (said, rationale, answer)


def test_no_answer_is_an_exception_or_takes_long():
    rng, kinds = random.Random(0), ["number", "choice", "nli", "text"]
    forms = [said for _, said, _ in ANSWER_FORMS]
    pieces = ["(" * 50, ")" * 50, "{" * 50, "\\boxed{", "answer is ", "the answer ", "so, ", "####", " \n", "-", "**", ",", ".", "=", "\0", "९", "４²", "½", "\ud800",
              "9" * 40, "\\frac{1}{", "</think>", "<think>", "Q:", "e9", "x", "_" * 9]
    hostile = [piece * n for piece in [*pieces, "\n\t ", "so the answer", "answer to ", "(1+", "1,", "a. ", "\n(a) ", "The answer is 1\n"] for n in (100, 400_000 // len(piece))]
    for i in range(3000 + len(hostile)):
        text = hostile[i - 3000] if i >= 3000 else rng.choice(forms)
        for _ in range(rng.randrange(4) if i < 3000 else 0):
            at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = rng.choice([text[:at] + text[end:], text[:end] + text[at:end] * 3 + text[end:], text[end:] + text[at:end] + text[:at],
                               text[:at] + rng.choice(pieces) + text[at:]])
        for kind in kinds if i >= 3000 else (kinds[i % 4],):
            start = time.perf_counter()
            rationale, answer = qcrd.read_sample(text, QUESTION_OF.get(kind, "How many?"), kind, qcrd.NLI if kind == "nli" else [])
            assert time.perf_counter() - start < 2, (kind, text[:50])                # a hundred times what it takes
            assert answer is None or (answer and len(answer) <= 300), (kind, text[:50])
            assert kind != "number" or answer is None or qcrd.value(answer) is not None
            rationale.encode()


def test_value_is_arithmetic_and_nothing_else():
    for text, wanted in {"( 84.0 / 2.0 )": 42, "-(3 + 4) * 2": -14, "1,234.5": 1234.5, "6 × 7": 42, "84 ÷ 2": 42, "5 − 8": -3, "+5": 5, "--5": 5, ".5": 0.5, "007": 7,
                         "1 / 3": 1 / 3, "((((1))))": 1, "12,34": None, "1 / 0": None, "9**9": None, "9**9**9": None, "7 // 2": None, "5 % 3": None, "(1)(2)": None,
                         "()": None, "": None, "1 2": None, "1.2.3": None, "9" * 16: None, "1e5": None, "0x10": None, "x": None, "len('a')": None, "__import__('os')": None,
                         "４２": None, "1+" * 100 + "1": None, "(" * 150 + "1" + ")" * 40: None, "-" * 199 + "1": -1, "(" * 99 + "1" + ")" * 99: 1,
                         "1" + "0" * 14 + "* 999999999999999" * 11: None, "3 +": None, "1\n+ 2": None, "True": None, "...": None, "1 + ... + 9": None}.items():
        got = qcrd.value(text)
        assert got == wanted or (got is not None and wanted is not None and abs(got - wanted) < 1e-12), (text, got)
    assert qcrd.is_right("1 / 3", "0.33333", "number") and not qcrd.is_right("0.3332", "1 / 3", "number")
    assert qcrd.is_right("-0.00001", "0", "number") and not qcrd.is_right("1 / 0", "1 / 0", "number")
    assert qcrd.is_right("Stand by the  door.", "stand by the door", "choice") and not qcrd.is_right("-5", "5", "text") and not qcrd.is_right("", "", "text")


def task_folder(folder: Path, **files: list | bytes) -> Path:
    """A folder task: a list of (input, label) or raw bytes for each split."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        raw = rows if isinstance(rows, bytes) else "".join(json.dumps({"input": x, "label": y}) + "\n" for x, y in rows).encode()
        (folder / f"{name}.jsonl").write_bytes(raw)
    return folder


def test_broken_data_files_name_line_and_remedy():
    good = b'{"input": "One and one?", "label": "2"}\n'
    with elsewhere() as home:
        for raw, words in [(good + b"no JSON\n", ":2: not JSON; each line must be an object"), (b"[" * 5000, ":1: not JSON"),
                           (b'{"input": "1?"}\n', ':1: no "input" or no "label"'), (good + b"\n[1, 2]\n", ':3: no "input"'), (b'"text"\n', ':1: no "input"'),
                           (b'{"input": ["1?"], "label": "2"}\n', ':1: "input" and "label" must be text'), (b'{"input": "1?", "label": true}\n', ':1: "input" and'),
                           (b'{"input": " ", "label": "2"}\n', ':1: "input" and "label" must be text'), (b"", ": holds no question"), (b"\n\n", ": holds no question"),
                           (good + b'{"input": "caf\xe9", "label": "2"}\n', ":2: not UTF-8; save the file as UTF-8"),
                           (b'{"input": "half \\ud800", "label": "2"}\n', ":1: not UTF-8"), (good.decode().encode("utf-16"), ":1: not UTF-8"),
                           (b'{"input": "1?", "label": "two"}\n', ":1: label 'two' is neither a number nor an equation; --answer text")]:
            folder = task_folder(home / "mine", train=good * 3, test=raw)
            printed = command("--task", folder, "--answer", "number", "--show-prompt", code=2)
            last = printed.strip().splitlines()[-1]
            assert last.startswith(f"error: {folder / 'test.jsonl'}{words}"), (raw, printed)
        (home / "mine" / "test.jsonl").unlink()
        assert "test.jsonl: No such file or directory; a task is a folder with" in command("--task", home / "mine", code=2)
        assert "neither one of demo, svamp" in command("--task", home / "absent", code=2)
        try:
            qcrd.read_split(task_folder(home / "nli", test=[("It rains.</s>It is wet.", "maybe")]) / "test.jsonl", "nli")
            raise AssertionError("a label outside the three was accepted")
        except t5.InputError as e:
            assert ":1: label 'maybe' must be one of entailment, neutral, contradiction" in str(e)
        rows = [(f"{i} + {i}?", str(2 * i)) for i in range(20)]
        folder = task_folder(home / "notes", train=b"\xef\xbb\xbf" + good * 2 + task_folder(home / "x", y=rows).joinpath("y.jsonl").read_bytes(), test=rows[:3])
        printed = command("--task", folder, "--show-prompt")
        assert "note: " in printed and "train.jsonl: 1 questions stand there twice" in printed
        assert "no valid.jsonl; the last 2 training questions are held out" in printed and "warning: 3 training questions" in printed
        task = qcrd.load_task(qcrd.Config(task=str(folder), fraction=0.5))
        assert (len(task.train.inputs), len(task.valid.inputs), len(task.test.inputs)) == (10, 2, 3)
        assert task_folder(home / "one", train=rows[:1], test=rows) and "too few to hold any out" in command("--task", home / "one", code=2)


def test_prompts_end_in_a_form_that_the_parser_knows():
    for name, kind in qcrd.KINDS.items():
        task = qcrd.Task(name, kind, Path(), *[qcrd.Split([], [])] * 3, qcrd.NLI if kind == "nli" else [])
        prompt = qcrd.prompt_for(task, QUESTION_OF.get(kind, "How many?"))[0]["content"]
        shots = prompt.split("\n\nQ: ")[1:-1]
        assert len(shots) >= 2 and prompt.endswith("\nA:") and prompt.count(QUESTION_OF.get(kind, "How many?").split("</s>")[-1]) == 1
        for shot in shots:
            question, _, said = shot.partition("\nA: ")
            rationale, answer = qcrd.read_sample(said, question, kind, task.options)
            assert rationale and qcrd.answer_key(answer, kind), shot
    few = qcrd.Task("mine", "text", Path(), *[qcrd.Split([], [])] * 3, ["good", "bad"])
    assert "one of: good, bad." in qcrd.prompt_for(few, "How was it?")[0]["content"]
    assert qcrd.prompt_for(few, "How was it?", "My own prompt.\n")[0]["content"] == "My own prompt.\n\nQ: How was it?\nA:"


def results_module(name: str):
    sys.path.insert(0, str(HERE / "results"))
    return importlib.import_module(name)


def test_problems_of_the_svamp_student_hold_what_they_say():
    """results/svamp_student.py: each story's questions can be asked; label, text and explanation agree on numbers and result."""
    student, rng = results_module("svamp_student"), random.Random(0)
    assert student.work_out("( w - x ) * y", dict(w=9, x=4, y=3)) == ([(9, "-", 4, 5), (5, "*", 3, 15)], 15)
    assert student.work_out("w / x", dict(w=9, x=4)) is None and student.work_out("w - x", dict(w=4, x=9)) is None
    for i in range(3000):
        story, questions = student.STORIES[i % len(student.STORIES)]
        with unittest.mock.patch.object(student, "STORIES", [(story, [questions[i // len(student.STORIES) % len(questions)]])]):
            text, label, said = student.problem(rng, ["novel", "words"] if i % 2 else ())
        body, asked = text.split("\n")
        result = qcrd.value(label)
        assert asked.endswith("?") and "{" not in text + label + said and result == int(result) > 0
        assert all(re.search(rf"(?<!\d){n}(?!\d)", text) for n in re.findall(r"(\d+)\.0", label)), (text, label)
        assert re.search(rf"(?<!\d){int(result)}(?!\d)", said.rstrip(".").rpartition(". ")[2]), (said, label)


def test_tables_of_results_are_cells_that_can_be_run():
    """results/run.py: every cell's flags are ones that qcrd.py knows, no two different cells share a folder, and p is exact."""
    run, folders = results_module("run"), {}
    for table in run.TABLES:
        for _, flags, seed in run.cells(table):
            qcrd.parser().parse_args(flags.split())
            assert folders.setdefault(run.keep(flags, seed), (flags, seed)) == (flags, seed)
        assert run.TABLES[table][2] in run.TABLES[table][3]
    assert run.p_value([1.0, 2.0, 0.5]) == 0.25 and run.p_value([1.0, -1.0]) == 1.0 and run.p_value([2.0, 1.0, -1.0]) == 0.75


def test_results_are_run_once_resumed_and_kept():
    """results/run.py: a cell runs once; one that another process holds is left to it; a stopped one is resumed; other flags' leftovers go."""
    run = results_module("run")
    flags = "--method finetune --overfit 4 --iterations 1 --iteration-steps 1 --rationale-tokens 12"
    with elsewhere() as home, unittest.mock.patch.object(run, "HERE", home), unittest.mock.patch.dict(run.TABLES, tiny=("", 1, "a", {"a": flags})):
        folder, target, printed = home / "runs" / f"results-{run.keep(flags, 0).name}", run.keep(flags, 0), io.StringIO()
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")                  # of a command that nobody knows: it goes
        with contextlib.redirect_stdout(printed):
            with open(f"{folder}.lock", "a+") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                run.run("tiny", 1, [])
            assert "left to another process" in printed.getvalue() and not target.exists()
            run.run("tiny", 1, [])
            kept = run.read_result(flags, 0)
            assert kept["command"] == f"qcrd.py {flags} --seed 0" and kept["cpu_minutes"] > 0 and not (folder / "checkpoint.pt").exists()
            with unittest.mock.patch.object(run.subprocess, "Popen", side_effect=AssertionError("was run again")):
                run.run("tiny", 1, [])                             # kept: skipped
                shutil.rmtree(target)
                run.run("tiny", 1, [])                             # its run is finished: collected
                assert run.read_result(flags, 0) == kept
                shutil.rmtree(target)
                (folder / "result.json").unlink()
                with unittest.mock.patch.object(run.subprocess, "Popen") as popen:
                    popen.return_value.wait.return_value = 3
                    try:
                        run.run("tiny", 1, [])                     # stopped before its end: resumed
                        raise AssertionError("a failed child was passed over")
                    except SystemExit as e:
                        assert e.code == 3 and popen.call_args[0][0][2:] == ["--resume", str(folder.relative_to(home))]
            run.show("tiny", 1)
            assert printed.getvalue().endswith("tiny: not run yet\n")


def test_judge_is_blind_to_the_order():
    """results/judge.py: one preferred in both orders wins; a judge that always says 1 contradicts itself; no verdict is counted apart."""
    judge = results_module("judge")

    def answer(body: dict, number: int) -> dict:
        text = body["messages"][0]["content"].split("Right answer:")[1]
        first = text.index("good") < text.index("bad")
        if "Q1" in body["messages"][0]["content"]:
            first = True                                           # whatever stands first
        return said("no idea" if "Q2" in body["messages"][0]["content"] else f"It is clearer. The answer is {1 if first else 2}.")

    with elsewhere() as home, stub_teacher(answer) as (url, asked):
        for name, word in (("a", "good"), ("b", "bad")):
            (home / name).mkdir()
            rows = [dict(input=f"Q{i}", gold="5", rationale=f"{word} reason {i}") for i in range(6)]
            (home / name / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = qcrd.Config(task="judge", method="dss", samples=1, teacher_temperature=0.0, teacher=url)
        with contextlib.redirect_stdout(io.StringIO()):
            verdicts, questions = judge.judge([home / "a", home / "b"], 5, config)
            assert verdicts == [["0", "0"], ["0", "1"], [None, None], ["0", "0"], ["0", "0"]] and questions == [f"Q{i}" for i in range(5)]
            assert len(asked) == 10 and judge.judge([home / "b", home / "a"], 5, config)[0][0] == ["1", "1"]
            assert len(asked) == 10                                # the other way round is the same ten questions: nothing is asked twice
        try:
            judge.read_predictions(home / "none")
            raise AssertionError
        except t5.InputError as e:
            assert "predictions.jsonl" in str(e)


def test_ctrl_c_ends_long_work_at_once_and_training_after_saving():
    """Sampling, validation and the discriminator's steps stop after the item under way; the steps of training go on to where they save."""
    for stops, expected in ((True, [0, 1]), (False, [0, 1, 2, 3])):
        seen, stopped = [], False
        try:
            for i in qcrd.shown("work", range(4), stops):
                seen.append(i)
                if i == 1:
                    qcrd.STOP.set()
        except qcrd.Stopped:
            stopped = True
        qcrd.STOP.clear()
        assert (seen, stopped) == (expected, stops), (seen, stopped)


def test_t5_second_backward_and_wrong_shapes():
    """A graph can be run backward twice, padding included; a second derivative is refused, not wrong; shapes and empty rows are refused."""
    model = small_t5()
    ids, targets = torch.tensor([[5, 6, 1], [7, 1, 0]]), torch.tensor([[8, 9, 1], [9, 1, 0]])
    loss = model.loss(ids, ids != 0, targets, targets != 0).sum()
    weight = model.encoder.layers[0].attention.qkv.weight
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0
    (again,) = torch.autograd.grad(loss, weight, create_graph=True)
    try:
        again.sum().backward()
        raise AssertionError("a second derivative")
    except RuntimeError as e:
        assert "once_differentiable" in str(e)
    empty = torch.tensor([[True, True, True], [False, False, False]])
    for arguments in ((ids, empty, targets, targets != 0), (ids[:, :2], ids != 0, targets, targets != 0), (ids, ids != 0, targets[:1], targets[:1] != 0),
                      (ids, ids != 0, targets, targets[:, :2] != 0)):
        try:
            model.loss(*arguments)
            raise AssertionError(arguments)
        except t5.InputError:
            pass
    model.encoder.layers[0].attention.qkv.forward = own = lambda x: x @ weight.T
    model.generate(ids, ids != 0, 3)
    assert vars(model.encoder.layers[0].attention.qkv)["forward"] is own
    assert sum("forward" in vars(module) for module in model.modules()) == 1


def said(*texts: object, finish: str = "stop") -> dict:
    """The body of a good answer."""
    return {"choices": [{"message": {"content": text}, "finish_reason": finish} for text in texts], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


@contextlib.contextmanager
def stub_teacher(answer):
    """A server whose POSTs are answered by answer(body, number of this request) -> body as JSON or bytes, or (status, body, headers), or None: hang up.

    Yields its URL and the list of what it was sent, (headers, body)."""
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send({"data": [{"id": "stub/model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((dict(self.headers), body))
                number = len(asked)
            got = answer(body, number)
            if got is None:
                self.close_connection = True
                return
            status, content, headers = got if isinstance(got, tuple) else (200, got, {})
            self.send(content, status, headers)

        def send(self, content: object, status: int = 200, headers: dict | None = None) -> None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def collected(url: str, questions: int = 4, **changes) -> tuple[list[list], str]:
    """All slots of a small folder task, asked from `url` with quick retries -> slots, what was printed."""
    rows = [(f"What is {i} plus {i}?", str(2 * i)) for i in range(questions)]
    folder, out = task_folder(Path("sums"), train=rows, valid=rows[:1], test=[("1?", "1")]), io.StringIO()
    config = qcrd.Config(task=str(folder), answer="number", teacher=url, concurrency=3, **changes)
    wait = threading.Event.wait
    with contextlib.redirect_stdout(out), unittest.mock.patch.object(threading.Event, "wait", lambda self, s=None: wait(self, s and min(s, 0.01))):
        train, valid = qcrd.collect(qcrd.load_task(config), config)
    assert valid == train[:1]                                                          # the same question is asked once
    return train, out.getvalue()


def test_teacher_survives_what_servers_do():
    trouble = [b"<html>bad gateway</html>", (500, {"error": "down"}, {}), (429, {"error": {"message": "slow"}}, {"Retry-After": "0.01"}), None, {"choices": []},
               said(None), said(""), {}, [], b"", b"[" * 100000, (503, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), {"choices": [None, {"message": 3}]},
               {"choices": "none"}, (200, b'{"choices": [{"mess', {}), (408, {}, {"Retry-After": "nonsense"}), {"choices": {"a": 1}}, (429, {}, {"Retry-After": "nan"})]
    with elsewhere(), stub_teacher(lambda body, n: trouble[n // 2 % len(trouble)] if n % 2 else said(*[f"The answer is {n}."] * body["n"])) as (url, asked):
        slots, printed = collected(url, questions=30)
        assert all(slot and slot[1] == "stop" for row in slots for slot in row) and "failures" in printed
        assert all(len({slot[0] for slot in row}) == 1 for row in slots)
        assert {(b["temperature"], b["max_tokens"], b["n"], b["model"]) for _, b in asked} == {(0.7, 512, 5, "stub/model")}
        before = len(asked)
        assert collected(url, questions=30)[0] == slots and len(asked) == before       # filled slots are not asked for again
        more, _ = collected(url, questions=30, samples=7)
        assert [row[:5] for row in more] == slots and all(b["n"] == 2 for _, b in asked[before:])
        for changed in ({"teacher_temperature": 0.5}, {"teacher_tokens": 99}, {"teacher_model": "other"}):
            before = len(asked)
            assert collected(url, questions=1, **changed)[0] and len(asked) > before   # what decides a sample is part of its key
    letters = b"".join(b"1\r\n%c\r\n" % letter for letter in json.dumps(said("The answer is 1.")).encode()) + b"0\r\n\r\n"
    for headers in ({"Connection": "close"}, {"Transfer-Encoding": "chunked"}):        # as proxies and small servers do; a chunk is a letter here
        body = letters if "Transfer-Encoding" in headers else said("The answer is 1.") | {"usage": {"prompt_tokens": math.inf, "completion_tokens": 1}}
        with elsewhere(), stub_teacher(lambda _, n, body=body, headers=headers: (200, body, headers)) as (url, asked):
            slots, printed = collected(url)
            assert all(slot for row in slots for slot in row) and ", 0 failures" in printed and len(asked) == 20, printed


def test_teacher_meets_servers_that_know_fewer_fields():
    def refuse(name: str, message: str, limit: int = 5, status: int = 400):
        def answer(body: dict, n: int) -> object:
            if name in body and (name != "n" or body["n"] > 1):
                return status, {"error": {"message": message}}, {}
            return said(*[f"The answer is {body.get('seed')}."] * min(limit, body.get("n", 1)))
        return answer
    for name, message, status in [("n", "Only one completion choice is allowed", 400), ("seed", "Extra inputs are not permitted: seed", 422),
                                  ("temperature", "Unsupported value: 'temperature' does not support 0.7", 400),
                                  ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", 400)]:
        with elsewhere(), stub_teacher(refuse(name, message, status=status)) as (url, asked):
            slots, printed = collected(url)
            assert all(slot for row in slots for slot in row) and f"without {name}, which this server refuses" in printed
            assert sum(name in b and (name != "n" or b["n"] > 1) for _, b in asked) <= 3           # once for each thread, then remembered
            assert name != "max_tokens" or asked[-1][1]["max_completion_tokens"] == 512
    with elsewhere(), stub_teacher(refuse("nothing", "", limit=1)) as (url, asked):                # n is ignored
        slots, _ = collected(url)
        assert len(asked) == 20 and all(len({slot[0] for slot in row}) == 5 for row in slots)      # each slot has its own seed


def test_teacher_stops_where_no_retry_helps():
    key = "sk-Secret/0123+456"
    echo = {"error": {"message": f"Incorrect API key provided: {key}, see https://example.org/keys?key=sk-Secret%2F0123%2B456"}}
    environment = unittest.mock.patch.dict(os.environ, OPENAI_API_KEY=key)
    for status, words in [(401, "the key in OPENAI_API_KEY is not accepted"), (403, "not accepted"), (404, "is --teacher-model stub/model right"),
                          (400, "status 400: Incorrect API key provided: ***, see https://example.org/keys?key=***"), (301, "status 301")]:
        with elsewhere() as home, environment, stub_teacher(lambda body, n, status=status: (status, echo, {})) as (url, asked):
            folder = task_folder(home / "sums", train=[(f"{i}?", "1") for i in range(50)], test=[("a?", "1")])
            flags = ["--task", folder, "--stage", "teacher", "--teacher", url, "--model", HERE / "weights" / "demo", "--concurrency", 4]
            printed = command(*flags, code=2)
            assert words in printed.strip().splitlines()[-1] and printed.count("error:") == 1 and "Traceback" not in printed, printed
            assert len(asked) <= 4 * (2 if status == 400 else 1) and asked[0][0]["Authorization"] == f"Bearer {key}"
            files = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
            assert not any(secret in text for secret in ("Secret", "0123") for text in [printed, *map(repr, files)])
    with elsewhere(), unittest.mock.patch.dict(os.environ, OPENAI_API_KEY=key + "\ncut"):
        for url in (f"http://me:{key}@127.0.0.1:9/v1", f"http://127.0.0.1:9/v1?key={key}", "gpt-4", "http://127.0.0.1:9/v1"):
            message = refused_collect(url)
            assert "OPENAI_API_KEY" in message and "Secret" not in message
    with elsewhere():
        assert "no connection (ConnectionError); is the server running" in refused_collect("http://127.0.0.1:9/v1")
        with stub_teacher(lambda body, n: said("")) as (url, asked):
            assert "--teacher-tokens" in refused_collect(url)
            assert len(asked) <= 10 * 3                                                            # the bound, for each thread


def refused_collect(url: str) -> str:
    try:
        collected(url)
    except t5.InputError as e:
        return str(e)
    raise AssertionError(f"{url} was accepted")


def test_teacher_budget_refusals_and_torn_cache():
    with elsewhere(), stub_teacher(lambda body, n: said("The answer is 1.", finish="length")) as (url, asked):
        slots, printed = collected(url, teacher_budget=7)
        assert len(asked) == 7 and sum(slot is not None for row in slots for slot in row) == 7 and "samples are missing (over --teacher-budget" in printed
        assert all(slot[1] == "length" for row in slots for slot in row if slot)                   # cut ones are kept
        cache = next(Path("data/sums").glob("teacher-*.jsonl"))
        assert cache.name == "teacher-stub_model.jsonl"
        cache.write_bytes(cache.read_bytes()[:-20])                                                # a kill in the middle of a line
        slots, printed = collected(url)
        assert all(slot for row in slots for slot in row) and len(asked) == 7 + 14 and "1 line cut off by a crash" in printed
        lines = list(filter(None, cache.read_bytes().splitlines()))
        assert len(lines) == 21 and sum(line.endswith(b"}") for line in lines) == 20
    with elsewhere(), stub_teacher(lambda body, n: (400, {"error": {"message": "content policy"}}, {}) if "3 plus" in body["messages"][0]["content"] and n > 9
                                   else said(*["The answer is 1."] * body.get("n", 1))) as (url, asked):
        slots, printed = collected(url, questions=12)                                              # one question is refused, the others go on
        assert sum(row.count(None) for row in slots) in (0, 5) and all(None not in row for i, row in enumerate(slots) if i != 3)


def test_a_folder_goes_from_teacher_to_student():
    """40 date problems, made here; a teacher that solves four of five; nothing but flags."""
    day = __import__("datetime").date
    dates = [(day.fromordinal(737000 + 37 * i), 3 + i % 9) for i in range(40)]
    texts = [f"Today is {d:%d.%m.%Y}. What day of the month is it {n} days later?" for d, n in dates]
    numbers = [day.fromordinal(d.toordinal() + n).day for d, n in dates]

    def answer(body: dict, count: int) -> dict:
        i = max(range(40), key=lambda i: body["messages"][-1]["content"].rfind(texts[i]))
        return said(*[f"Day by day, {dates[i][1]} days on it is day {numbers[i] + (k == 4)}. The answer is {numbers[i] + (k == 4)}." for k in range(body["n"])])
    with elsewhere() as home, stub_teacher(answer) as (url, asked):
        rows = list(zip(texts, map(str, numbers)))
        folder, student = task_folder(home / "dates", train=rows[:26], valid=rows[26:32], test=rows[32:]), tiny_student(qcrd.Config())
        student.model.save(home / "tiny", vocab=student.vocab)
        for kind in ("number", "text"):
            printed = command("--task", folder, "--answer", kind, "--teacher", url, "--model", home / "tiny", "--iterations", 2, "--iteration-steps", 2, "--batch", 8,
                              "--lag", 1, "--rationale-tokens", 24, "--discriminator-pretrain", 2, "--discriminator-steps", 1, "--run", home / kind)
            assert "vote, training questions: 4.00 positives and 1.00 negatives a question" in printed and "majority right on 100.0% of 26" in printed, printed
            assert len((home / kind / "predictions.jsonl").read_text().splitlines()) == 8 and (home / kind / "student" / "model.pt").exists()
        assert len(asked) == 32                                                                    # the second run asked for nothing


def test_real_answers_of_language_models():
    if not (SHARED / "teacher").is_dir():
        raise Skip("no ../shared with the published answers")
    with elsewhere(), unittest.mock.patch.dict(os.environ, QCRD_MIRROR=str(SHARED / "mirror")):
        rows = [json.loads(line) for line in (SHARED / "teacher" / "svamp_train.jsonl").read_text("utf-8").splitlines()]
        task = qcrd.load_task(qcrd.Config(task="svamp"))
        labels = {fetch_data.fold(x): y for split in (task.train, task.valid) for x, y in zip(*split)}
        positives = right = 0
        turbo = [row for row in rows if row["source"] == "gpt-3.5-turbo"]
        for row in turbo:                                                                          # two votes of five samples drawn from its ten
            keys = [qcrd.answer_key(qcrd.read_sample(s, row["input"], "number")[1], "number") for s in row["samples"]]
            assert keys.count(None) <= 8
            random.Random(row["input"]).shuffle(keys)
            for five in (keys[:5], keys[5:]):
                best, same_answer, _ = qcrd.majority(five)
                positives, right = positives + len(same_answer), right + (best == qcrd.answer_key(labels[fetch_data.fold(row["input"])], "number"))
        assert len(turbo) == 564 and abs(positives / 1128 - 3.87) < 0.05 and abs(right / 1128 - 0.83) < 0.02, (positives / 1128, right / 1128)
    with elsewhere():
        config = qcrd.Config(task="svamp", archive=str(SHARED / "upstream" / "datasets.zip"), teacher="palm")
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()) as printed:
            task = qcrd.load_task(config)
            slots = sum(qcrd.collect(task, config), [])
        answers = [qcrd.read_sample(row[0][0], x, "number")[1] for row, x in zip(slots, task.train.inputs + task.valid.inputs)]
        right = sum(qcrd.is_right(a or "", y, "number") for a, y in zip(answers, task.train.labels + task.valid.labels))
        assert len(answers) == 800 and abs(right / 800 - 0.735) < 0.0101 and "ONE a question" in printed.getvalue(), right


# ---------------------------------------------------------------- benchmark


def bench_step(questions: str) -> None:
    """One QCRD step (five positives, two negatives a question) in t5-small's shape, float32, on the CPU: seconds, tokens, memory, arithmetic.

    On real rationales of a language model where ../shared has them, else on the demo's."""
    n, vocab = int(questions), HERE / "weights" / "demo" / "spiece.model"
    if SHARED.exists():
        sys.path.insert(0, str(SHARED / "bench"))
        import plain_step
        vocab = next((SHARED / "mirror/huggingface.co/google-t5/t5-small/resolve").glob("*/spiece.model"))
        items = plain_step.batch(n)
    else:
        problems = fetch_data.demo_problems("train")[:n]
        said = [[fetch_data.teacher_answer(p, k, 0.7).rpartition("The answer")[0].strip() for k in range(7)] for p in problems]
        items = [(p.text, p.label, texts[:5], texts[5:]) for p, texts in zip(problems, said)]
    torch.manual_seed(0)
    config = qcrd.Config(iterations=1, batch=n)
    student = qcrd.Student(t5.T5(t5.Config()), vocab, config, torch.device("cpu"))
    voted = [qcrd.Voted(label, [*map(qcrd.to_student, pos)], [*map(qcrd.to_student, neg)]) for _, label, pos, neg in items]
    data = qcrd.Data(student, qcrd.Split([x for x, *_ in items], [label for _, label, *_ in items]), voted)
    trainer = qcrd.Trainer(config, student, Path(), None, data, data)
    step, seconds = functools.partial(trainer.step, list(range(n)), {}, (0.5, 0.5, 0.5), 0, torch.zeros(0)), []
    step()
    trainer.state.tokens = 0
    for _ in range(3):
        start = time.perf_counter()
        step().tolist()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        step()
    a, start = torch.randn(2048, 2048), time.perf_counter()
    for _ in range(5):
        a @ a
    rate, second = 5 * 2 * 2048**3 / (time.perf_counter() - start), sorted(seconds)[1]
    print(f"one QCRD step, {n} questions: {second:.2f} s, {trainer.state.tokens / 3 / second:,.0f} target tokens scored or trained on a second, peak memory "
          f"{peak:.2f} GiB, {counter.get_total_flops() / second / 1e9:.0f} GFLOP/s of the {rate / 1e9:.0f} that a matrix product alone reaches "
          f"({counter.get_total_flops() / second / rate:.0%})", flush=True)


def bench_t5() -> None:
    """t5.py in t5-small's shape, float32; beside it, where transformers is installed, the same weights and batches there."""
    print(f"t5.py, t5-small's shape, random weights, {torch.get_num_threads()} threads; ratio: transformers' time / ours")
    shape = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
    try:
        peer = hf_model(shape, v11=False)
        ours = through_disk(peer)
    except Skip as why:
        peer, ours = None, t5.T5(t5.Config())
        print(f"no ratios: {why}")

    def line(what: str, mine, theirs, note: str = "") -> None:
        """Median of three turns each, taken alternately, so that a drift of the machine falls on both."""
        seconds = {f: [] for f in ([mine] if peer is None else [mine, theirs])}
        for turn in range(4):
            for f, taken in seconds.items():
                start = time.perf_counter()
                f()
                taken += [time.perf_counter() - start] if turn else []        # the first turn warms up
        medians = [sorted(taken)[1] for taken in seconds.values()]
        ratio = f"{medians[1]:9.3f} {medians[1] / medians[0]:7.2f}" if peer is not None else ""
        print(f"{what:34s} {medians[0]:9.3f} {ratio}   {note}", flush=True)

    def backward(model, loss) -> None:
        model.train().zero_grad(set_to_none=True)
        loss().backward()

    print(f"{'work':34s} {'ours s':>9s}" + (f" {'peer s':>9s} {'ratio':>7s}" if peer is not None else ""))
    for name, least in (("full", 64), ("padded", 19)):
        (x, x_mask), (y, y_mask) = (random_batch(32000, 16, 64, seed, least) for seed in (0, 1))
        note = ""
        if peer is not None:
            with torch.no_grad():
                a = peer.eval()(input_ids=x, attention_mask=x_mask.long(), decoder_input_ids=shifted(y)).logits
                b = ours.eval()(x, x_mask, shifted(y))
            note = f"largest logit difference {(a - b)[y_mask].abs().max() / a.abs().max():.0e} of the largest logit"
        labels = y.masked_fill(~y_mask, -100)
        line(f"16 x 64 forward+backward, {name}", lambda: backward(ours, lambda: ours.loss(x, x_mask, y, y_mask).mean()),
             lambda: backward(peer, lambda: peer(input_ids=x, attention_mask=x_mask.long(), labels=labels).loss), note)
    x, x_mask = random_batch(32000, 64, 64, 0, 19)
    if peer is not None:
        peer.eval()
    for name, temperature, how in (("greedy", 0.0, {"do_sample": False}),
                                   ("sample at 1.5", 1.5, {"do_sample": True, "temperature": 1.5, "top_k": 0})):
        line(f"64 rows, 64 tokens, {name}", lambda: ours.generate(x, x_mask, 64, temperature=temperature),
             lambda: peer.generate(input_ids=x, attention_mask=x_mask.long(), max_new_tokens=64, **how))


def bench() -> None:
    for questions in ("4", "16"):                    # a process each for its peak memory, and first: a child starts with its parent's peak
        subprocess.run([sys.executable, __file__, "bench_step", questions], check=True)
    bench_t5()


def main() -> int:
    words = sys.argv[1:]
    if words[:1] == ["two_ranks"]:                 # a rank of test_two_ranks_compute_what_one_does
        two_ranks(*words[1:])
        return 0
    if words == ["bench"]:
        bench()
        return 0
    if words[:1] == ["bench_step"]:
        bench_step(*words[1:])
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
