r"""T5 1.0 and 1.1 from scratch: layers, loss, generation, tokenizer, Hugging Face checkpoints, span-corruption pretraining.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683. Read top to
bottom: shared helpers, Config, the layers, T5, files, Tokenizer, pretrain.

    model, tokenizer = T5.load("weights/demo"), Tokenizer("weights/demo/spiece.model")
    ids = torch.tensor([tokenizer.encode("predict: Ana has 5 hats. Ana buys 4 hats.\nHow many hats does Ana have now?")])
    print(tokenizer.decode(model.generate(ids, ids != 0, max_new_tokens=20)[0].tolist()))

Shapes: B rows of input, S input tokens, R rows of targets, T target tokens, D = d_model, H heads of d_kv, V vocabulary rows.
All masks are bool, True on real tokens, and padding stands on the right. Weights are float32 (bfloat16 works; float16 and float64 are for
autocast and for nobody); backward passes belong outside autocast.

Speed comes from three habits. Position-wise work runs on real tokens only, packed to (N, D); attention alone sees padded rows.
Weights that meet the same input are one matrix. The output layer and its cross-entropy are one function that keeps one tensor.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PAD, EOS, UNK = 0, 1, 2
SENTINELS = 100                 # <extra_id_0> ... <extra_id_99> stand above the SentencePiece pieces, in falling order


# ---------------------------------------------------------------- helpers every file of the project shares


class InputError(Exception):
    """A mistake of the user's, not of the program. Its text is one line: what, where, what to do."""


def require(good: bool, text: str) -> None:
    """Raises InputError(text) unless `good`."""
    if not good:
        raise InputError(text)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place only when the block succeeds, complete and on disk.

    The folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """Says on stderr how far `what` is: one live line on a terminal, elsewhere a line every 30 s and nothing for short work."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.start, self.live = what, total, time.monotonic(), sys.stderr.isatty()
        self.shown = self.start if not self.live else 0.0

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` are finished; `note` stands at the end of the line."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 30):
            return
        self.shown = now
        left = (now - self.start) / max(done, 1) * (self.total - done)
        share = 100 * done / max(self.total, 1)
        line = f"{self.what}: {done}/{self.total} ({share:.0f} %), {left // 60:.0f} min {left % 60:02.0f} s left  {note}"
        print("\r" + line[:139] + "\033[K" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the live line."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a T5, under Hugging Face's names where they exist. The defaults are t5-small's."""
    vocab_size: int = 32128             # rows of the embedding; 32,100 ids are in use, 32,000 of them are SentencePiece pieces
    d_model: int = 512
    d_kv: int = 64                      # per head; heads * d_kv need not be d_model
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    gated: bool = False                 # 1.1: gelu(x W0) * (x W1) in place of relu(x W)
    tied: bool = True                   # the output layer is the embedding
    scaled: bool = True                 # the decoder's output is multiplied by d_model^-0.5 before the output layer

    @staticmethod
    def from_hf(hf: dict, where: str = "config.json") -> "Config":
        """Reads Hugging Face's config (`where` names it in errors). Whether the head is tied stands in the weights: see T5.from_hf.

        Raises InputError naming what this file does not implement or what is missing.
        """
        require(isinstance(hf, dict) and hf.get("model_type") == "t5",
                f"{where}: model_type is not 't5' (T5 1.0, 1.1, Flan-T5); mT5, UMT5 and other models are not supported")
        activation = hf.get("feed_forward_proj", "relu")
        require(activation in ("relu", "gated-gelu"), f"{where}: feed_forward_proj {activation!r} is not supported (relu, gated-gelu are)")
        for key, value in (("pad_token_id", PAD), ("eos_token_id", EOS), ("decoder_start_token_id", PAD)):
            require(hf.get(key) in (value, None), f"{where}: {key} is {hf.get(key)!r}, only {value} is supported")
        values = {f.name: hf[f.name] for f in dataclasses.fields(Config) if hf.get(f.name) is not None and f.name not in OURS}
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            require(name in values, f"{where}: {name} is missing")
        values.setdefault("num_decoder_layers", values["num_layers"])
        scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings") is not False)
        return Config.checked(dict(values, gated=activation == "gated-gelu", scaled=scaled), where)

    @staticmethod
    def checked(values: dict, where: str) -> "Config":
        """Config(**values) after checking every name, type and range. Raises InputError."""
        require(isinstance(values, dict) and set(values) <= {f.name for f in dataclasses.fields(Config)},
                f"{where}: not a configuration that this program wrote")
        for field in dataclasses.fields(Config):
            value, kind = values.get(field.name, field.default), type(field.default)
            good = 0 <= value < 1 if kind is float and type(value) in (int, float) else type(value) is kind and (kind is bool or value > 0)
            wanted = {int: "a positive whole number", float: "a number in [0, 1)", bool: "true or false"}[kind]
            require(good, f"{where}: {field.name} is {value!r}, not {wanted}")
        config = Config(**values)
        require(4 <= config.relative_attention_num_buckets < 2 * config.relative_attention_max_distance,
                f"{where}: relative attention needs at least 4 buckets and a maximal distance above half their number")
        return config


OURS = ("gated", "tied", "scaled")


# ---------------------------------------------------------------- real tokens only


class Move(torch.autograd.Function):
    """x (N, ...) to the rows `index` of zeros (rows, ...), or with rows None the rows `index` of x: each is the other's gradient.

    `index` holds no row twice, so that nothing needs adding up, as the library's own gradient of a selection would.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, rows: int | None) -> Tensor:
        ctx.index, ctx.rows = index, len(x) if rows is None else None
        return x.index_select(0, index) if rows is None else x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, g: Tensor):
        return Move.apply(g, ctx.index, ctx.rows), None, None


class Packing:
    """Where the real tokens of a padded batch are: mask (B, S) bool. Nothing is moved where there is no padding.

    Indices are found on the device that holds the mask: a mask on the CPU spares a wait for the GPU.
    """

    def __init__(self, mask: Tensor, device: torch.device):
        require(bool(mask.any(1).all()), "a row of the mask holds no token: nothing to attend to")
        self.mask, self.device, self.index = mask, device, None
        if not bool(mask.all()):
            self.index = to_device(mask.flatten().nonzero()[:, 0], device)

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (N, ...): the real tokens."""
        x = x.flatten(0, 1)
        return x if self.index is None else Move.apply(x, self.index, None)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, S, ...), 0 on padding."""
        return (x if self.index is None else Move.apply(x, self.index, self.mask.numel())).unflatten(0, (-1, self.mask.shape[1]))

    def bias(self) -> Tensor:
        """(B, 1, 1, S) float32, what the scores of each key get added: 0 on real tokens, -inf on padding."""
        bias = torch.zeros(self.mask.shape, device=self.mask.device).masked_fill_(~self.mask, float("-inf"))
        return to_device(bias[:, None, None], self.device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; from the CPU to a GPU without waiting for the GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.device.type == "cpu" else x.to(device)


# ---------------------------------------------------------------- layers


class Dropout:
    """The dropout of one forward pass: zeroes each element with probability p; the caller multiplies by `scale` = 1 / (1 - p).

    The multiplication is the caller's because it commutes with what is linear: a branch that drops twice is scaled once, at its end.
    On a CPU a random number for each element would take longer than the feed-forward's activation. So this draws the gaps between
    dropped elements instead: they are geometric, floor(E / -log(1 - p)) + 1 with E exponential, which makes each element's fate
    independent and p exact to float32. NumPy's SFC64 draws them, seeded by torch's global generator, so that runs can be resumed.
    """

    def __init__(self, p: float, device: torch.device):
        self.p, self.scale, self.rng = p, 1 / (1 - p), None
        if device.type == "cpu" and p > 0:
            self.rng = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))

    def __call__(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        if self.rng is None:
            return F.dropout(x, self.p) / self.scale
        # six standard deviations more gaps than needed on average: all but once in 1e9 they reach the end
        gaps = self.rng.standard_exponential(int(x.numel() * self.p + 6 * (x.numel() * self.p) ** 0.5) + 8, dtype=np.float32)
        dropped = ((gaps / -math.log1p(-self.p)).astype(np.int64) + 1).cumsum() - 1
        return x.flatten().index_fill(0, torch.from_numpy(dropped[:np.searchsorted(dropped, x.numel())]), 0.0).view_as(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight: no mean, no bias. Always float32, since x is: only matrix products are cast by autocast."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(config.d_model)), config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.epsilon)


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm with its gradient written out, in half the passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + epsilon).rsqrt()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        unit, inverse, weight = ctx.saved_tensors
        along = g * unit
        mean = (along @ weight)[:, None] / g.shape[-1]
        return torch.addcmul(g * weight, unit, mean, value=-1).mul_(inverse), along.sum(0), None


class Attention(nn.Module):
    """Multi-head attention over packed rows; queries are not scaled by 1/sqrt(d_kv): T5's initialisation absorbs it."""

    def __init__(self, config: Config, cross: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.width = config.num_heads, config.d_kv
        if cross:
            self.q = linear(config.d_model, inner, (config.d_model * config.d_kv) ** -0.5)
            self.kv = linear(config.d_model, 2 * inner, config.d_model**-0.5)
        else:
            self.qkv = linear(config.d_model, 3 * inner, config.d_model**-0.5)
            with torch.no_grad():
                self.qkv.weight[:inner] *= config.d_kv**-0.5
        self.out = linear(inner, config.d_model, inner**-0.5)

    def split(self, x: Tensor) -> Tensor:
        """(rows, width, parts * H * d_kv) -> (parts, rows, H, width, d_kv)."""
        return x.unflatten(-1, (-1, self.heads, self.width)).permute(2, 0, 3, 1, 4)

    def forward(self, q: Tensor, kv: Tensor, bias: Tensor, packing: Packing, drop: Dropout) -> Tensor:
        """q (rows, H, T, d), kv (2, rows, H, S, d), bias broadcasting to (rows, H, T, S); packing: of the queries -> (N, D)."""
        scores = (q @ kv[0].transpose(-1, -2)).float()
        scores += bias
        return self.out(packing.pack((drop(scores.softmax(-1)).to(kv.dtype) @ kv[1]).transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """relu(x wi) wo, or gelu(x wi0) * (x wi1) wo with wi0 and wi1 stacked in one matrix."""

    def __init__(self, config: Config):
        super().__init__()
        self.gated = config.gated
        self.wi = linear(config.d_model, config.d_ff * (2 if config.gated else 1), config.d_model**-0.5)
        self.wo = linear(config.d_ff, config.d_model, config.d_ff**-0.5)

    def forward(self, x: Tensor, drop: Dropout) -> Tensor:
        x = self.wi(x)
        # T5's activations pass fp16's 65,504 here, in the product and in wo; under bf16 nothing needs protecting
        half = x.dtype == torch.float16
        with torch.autocast(x.device.type, enabled=False) if half else contextlib.nullcontext():
            x = x.float() if half else x
            if self.gated:
                gate, x = x.chunk(2, -1)
                x = F.gelu(gate, approximate="tanh") * x
            else:
                x = x.relu_()
            return self.wo(drop(x))


class Layer(nn.Module):
    """One block: self-attention, in the decoder cross-attention, feed-forward; each normed before, dropped out and added after."""

    def __init__(self, config: Config, decoder: bool):
        super().__init__()
        self.norm1, self.attention = RMSNorm(config), Attention(config, cross=False)
        if decoder:
            self.norm2, self.cross = RMSNorm(config), Attention(config, cross=True)
        self.norm3, self.feed_forward = RMSNorm(config), FeedForward(config)


class Stack(nn.Module):
    """Encoder or decoder. The relative position bias is layer 0's and serves all layers."""

    def __init__(self, config: Config, decoder: bool):
        super().__init__()
        self.config, self.decoder = config, decoder
        self.bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        nn.init.normal_(self.bias.weight, std=config.d_model**-0.5)
        self.layers = nn.ModuleList(Layer(config, decoder) for _ in range(config.num_decoder_layers if decoder else config.num_layers))
        self.norm = RMSNorm(config)

    def position_bias(self, width: int) -> Tensor:
        """(1, H, width, width): what query i adds to its score of key j; the decoder's is -inf for j > i.

        Each head learns a number for each bucket of distances: half of the buckets hold one distance each, the others ranges that grow
        as its logarithm. The encoder spends half of its buckets on keys to the right; the decoder sees no such keys.
        """
        buckets, far = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        position = torch.arange(width, device=self.bias.weight.device)
        offset = position[None] - position[:, None]
        bucket, distance = torch.zeros_like(offset), offset.abs()
        if not self.decoder:
            buckets //= 2
            bucket = (offset > 0) * buckets
        exact = buckets // 2
        # float32 and this order of operations decide on which side a distance on a boundary falls: they are the published models'
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(far / exact) * (buckets - exact)
        bucket = bucket + torch.where(distance < exact, distance, (exact + growth.long()).clamp(max=buckets - 1))
        bias = self.bias(bucket).permute(2, 0, 1)[None]
        return bias.masked_fill(offset > 0, float("-inf")) if self.decoder else bias

    def forward(self, x: Tensor, packing: Packing, bias: Tensor, dropout: float, cross: Sequence[Tensor] = (),
                cross_bias: Tensor | None = None, caches: Sequence[Tensor] = ()) -> Tensor:
        """x (N, D) packed embeddings -> (N, D).

        bias broadcasts to (rows, H, queries, keys). For each layer of the decoder, cross: the memory's keys and values (2, rows, H, S,
        d_kv). In generation caches: the keys and values of all positions so far (2, rows, H, any number, d_kv), x being the last one.
        """
        drop = Dropout(dropout, x.device)
        x = drop(x) * drop.scale
        for i, layer in enumerate(self.layers):
            qkv = layer.attention.split(packing.unpack(layer.attention.qkv(layer.norm1(x))))
            q, kv = qkv[0], qkv[1:]
            if caches:
                kv = caches[i][..., :bias.shape[-1], :]
                kv[..., -1:, :] = qkv[1:]
            x = torch.add(x, drop(layer.attention(q, kv, bias, packing, drop)), alpha=drop.scale**2)
            if self.decoder:
                (q,) = layer.cross.split(packing.unpack(layer.cross.q(layer.norm2(x))))
                x = torch.add(x, drop(layer.cross(q, cross[i], cross_bias, packing, drop)), alpha=drop.scale**2)
            x = torch.add(x, drop(layer.feed_forward(layer.norm3(x), drop)), alpha=drop.scale**2)
        return drop(self.norm(x)) * drop.scale


def linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A linear layer without bias, normal weights of this standard deviation (Mesh TensorFlow's initialisation)."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class OutputLoss(torch.autograd.Function):
    """Output layer and cross-entropy of N positions: hidden (N, D), weight (V, D), targets (N,) -> (N,) float32.

    One (N, V) tensor is kept, the softmax p, and backward is two products: with g the gradient of the losses,
    d hidden = g (p W - W[target]) and d W = p' (g hidden) - the g hidden added up by target.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
        count, step = len(hidden), 256                       # a chunk's logits stay in cache until they are done with
        p = hidden.new_empty(count if keep else min(step, count), len(weight))
        losses = torch.empty(count, device=hidden.device)
        for i in range(0, count, step):
            rows = p[i:i + step] if keep else p[:count - i]
            logits = torch.mm(hidden[i:i + step], weight.T, out=rows).float()
            top = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, targets[i:i + step, None]) - top
            # e^-64 is 0 for every purpose, and the subnormal numbers below e^-87 would make the products ten times slower
            exponentials = logits.sub_(top).clamp_(min=-64).exp_()
            total = exponentials.sum(1, keepdim=True)
            losses[i:i + step] = (total.log() - chosen)[:, 0]
            if keep:
                rows.copy_(exponentials.div_(total))
        ctx.save_for_backward(hidden, weight, targets, p if keep else None)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        hidden, weight, targets, p = ctx.saved_tensors
        g = g[:, None]
        weighted = (g * hidden).to(hidden.dtype)
        d_hidden = g * (p @ weight - weight[targets])
        d_weight = (p.T @ weighted).float().index_add_(0, targets, weighted.float(), alpha=-1)
        return d_hidden, d_weight, None, None


# ---------------------------------------------------------------- the model


class T5(nn.Module):
    """Text-to-text transformer; weights are float32 whatever the file holds, autocast around it chooses the arithmetic."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder, self.decoder = Stack(config, decoder=False), Stack(config, decoder=True)
        self.head = None if config.tied else linear(config.d_model, config.vocab_size, config.d_model**-0.5)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids (B, S) long, mask (B, S) bool -> memory (B, S, D), 0 on padding. Uses `shared` and `encoder` alone."""
        source = Packing(mask, self.shared.weight.device)
        return source.unpack(self._encode(input_ids, source, self._dropout()))

    def decode(self, target_in: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """target_in (B, T) long, starting with 0; memory (B, S, D) and its mask -> hidden (B, T, D) after the last norm."""
        source, target = Packing(mask, memory.device), Packing(torch.ones(target_in.shape, dtype=torch.bool), memory.device)
        return target.unpack(self._decode(target_in, target, source.pack(memory), source))

    def forward(self, input_ids: Tensor, mask: Tensor, target_in: Tensor) -> Tensor:
        """-> logits (B, T, V)."""
        return F.linear(self._scaled(self.decode(target_in, self.encode(input_ids, mask), mask)), self._head())

    def loss(self, input_ids: Tensor | None, mask: Tensor, targets: Tensor, target_mask: Tensor, memory: Tensor | None = None,
             rows: Tensor | None = None) -> Tensor:
        """Mean token cross-entropy of each target row.

        Args:
            input_ids: (B, S) long; not looked at where `memory` is given.
            mask: (B, S) bool, at least one True a row. It and target_mask may stay on the CPU of a model on a GPU, which spares a wait.
            targets: (R, T) long, each row ending in </s> unless it was cut off; target_mask: (R, T) bool, at least one True a row.
            memory: (B, S, D) from encode(mask); a detached leaf collects the gradient of several calls.
            rows: (R,) long, the memory row that each target row attends to; None: R = B, row r attends to memory row r.
        Returns: (R,) float32, nats a token.
        """
        device = self.shared.weight.device
        attended = len(mask if rows is None else rows)
        require(targets.shape == target_mask.shape and len(targets) == attended,
                f"targets of shape {tuple(targets.shape)}, their mask {tuple(target_mask.shape)}, memory rows for {attended} of them")
        source, target = Packing(mask, device), Packing(target_mask, device)
        packed = self._encode(input_ids, source, self._dropout()) if memory is None else source.pack(memory)
        targets = to_device(targets, device)
        hidden = self._decode(F.pad(targets[:, :-1], (1, 0), value=PAD), target, packed, source, rows)
        losses = OutputLoss.apply(self._scaled(hidden), self._head(), target.pack(targets), torch.is_grad_enabled())
        return target.unpack(losses).sum(1) / to_device(target_mask.sum(1), device)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, mask: Tensor, max_new_tokens: int, temperature: float = 0.0,
                 generator: torch.Generator | None = None, limit: int | None = None) -> Tensor:
        """Writes one answer for each row, without dropout and without gradients.

        Args:
            input_ids: (B, S) long; mask: (B, S) bool.
            temperature: 0 takes the most likely token; else tokens are drawn from softmax(logits / temperature).
            generator: of the CPU. One uniform number for each row and position is drawn from it up front, so that a row's tokens depend
                on its own numbers (given by its place and max_new_tokens) and not on which rows share its batch.
            limit: ids at or above it are never chosen (vocabularies have unused rows at their end).
        Returns: (B, at most max_new_tokens) long, in the caller's order, 0 after </s>.
        """
        device, count = self.shared.weight.device, len(input_ids)
        uniforms = torch.rand(count, max_new_tokens, generator=generator).to(device) if temperature > 0 else None
        with reordered(self.encoder, count), reordered(self.decoder, count):
            source, single = Packing(mask, device), Packing(torch.ones(1, 1, dtype=torch.bool), device)
            cross = [kv.contiguous() for kv in self._cross(self._encode(input_ids, source, 0.0), source)]
            bias, cross_bias = self.decoder.position_bias(max_new_tokens), source.bias()
            caches = [kv.new_empty(*kv.shape[:3], max_new_tokens, kv.shape[4]) for kv in cross]
            written = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
            alive = torch.arange(count, device=device)                  # which of the caller's rows the rows at work are
            tokens, finished = written.new_full((count,), PAD), torch.zeros(count, dtype=torch.bool, device=device)
            head = product(self._head(), count)
            for t in range(max_new_tokens):
                hidden = self.decoder(self.shared(tokens), single, bias[:, :, t:t + 1, :t + 1], 0.0, cross, cross_bias, caches)
                logits = head(self._scaled(hidden)).float()
                if limit is not None:
                    logits[:, limit:] = float("-inf")
                tokens = logits.max(1).indices if uniforms is None else draw(logits.div_(temperature), uniforms[alive, t])
                tokens = tokens.masked_fill(finished, PAD)
                written[alive, t] = tokens
                finished = finished | (tokens == EOS)
                left = (~finished).nonzero()[:, 0]
                if len(left) == 0:
                    return written[:, :t + 1]
                if len(left) <= 0.75 * len(alive):                      # copying the caches is dear: wait until it pays
                    alive, tokens, finished, cross_bias = alive[left], tokens[left], finished[left], cross_bias[left]
                    caches, cross = [[kv.index_select(1, left) for kv in group] for group in (caches, cross)]
        return written

    def _dropout(self) -> float:
        return self.config.dropout_rate if self.training else 0.0

    def _encode(self, input_ids: Tensor, source: Packing, dropout: float) -> Tensor:
        """-> packed memory (N, D)."""
        require(input_ids.shape == source.mask.shape, f"input ids of shape {tuple(input_ids.shape)}, their mask {tuple(source.mask.shape)}")
        bias = self.encoder.position_bias(source.mask.shape[1])
        if source.index is not None:
            bias = bias + source.bias()
        return self.encoder(self.shared(source.pack(to_device(input_ids, bias.device))), source, bias, dropout)

    def _cross(self, memory: Tensor, source: Packing) -> list[Tensor]:
        """Keys and values of the packed memory (N, D), for each decoder layer (2, B, H, S, d_kv)."""
        return [layer.cross.split(source.unpack(layer.cross.kv(memory))) for layer in self.decoder.layers]

    def _decode(self, target_in: Tensor, target: Packing, memory: Tensor, source: Packing, rows: Tensor | None = None) -> Tensor:
        """memory (N, D) packed, rows as in `loss` -> packed hidden (N, D)."""
        cross, cross_bias = self._cross(memory, source), source.bias()
        if rows is not None:
            rows = to_device(rows, memory.device)
            cross, cross_bias = [kv.index_select(1, rows) for kv in cross], cross_bias[rows]
        # padding needs no mask in self-attention: it stands to the right of every real token, which never looks there
        bias = self.decoder.position_bias(target_in.shape[1])
        return self.decoder(self.shared(target.pack(target_in)), target, bias, self._dropout(), cross, cross_bias)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """What the output layer multiplies: hidden, scaled where the checkpoint asks for it."""
        return hidden * self.config.d_model**-0.5 if self.config.scaled else hidden

    def _head(self) -> Tensor:
        """The output layer's weights (V, D)."""
        return self.shared.weight if self.head is None else self.head.weight

    # ------------------------------------------------------------ files

    def save(self, folder: str | Path, vocab: str | Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json, model.pt (weights stored as `dtype`) and, given `vocab`, a copy of that file as spiece.model."""
        # given a path, torch.save writes its name into the file
        with atomic(Path(folder, "model.pt")) as path, open(path, "wb") as file:
            torch.save({name: tensor.detach().to("cpu", dtype) for name, tensor in self.state_dict().items()}, file)
        write_config(folder, dataclasses.asdict(self.config), vocab)

    @staticmethod
    def load(folder: str | Path) -> "T5":
        """Reads what `save` wrote -> T5 in eval mode on the CPU, float32. Raises InputError."""
        folder = Path(folder)
        config = Config.checked(read_json(folder / "config.json"), str(folder / "config.json"))
        return build(config, load_pickle(folder / "model.pt"), str(folder / "model.pt"), {})

    def save_hf(self, folder: str | Path, vocab: str | Path | None = None) -> None:
        """Writes Hugging Face's format: config.json, model.safetensors (float32) and, given `vocab`, spiece.model."""
        config, tensors = self.config, {}
        state = {name: tensor.detach().float().cpu() for name, tensor in self.state_dict().items()}
        for name, parts in hf_names(config).items():
            tensors.update(zip(parts, state[name].chunk(len(parts))))
        if not config.scaled:
            tensors.setdefault("lm_head.weight", tensors["shared.weight"])    # transformers 4 makes up a head where unscaled means untied
        with atomic(Path(folder, "model.safetensors")) as path:
            write_safetensors(path, tensors)
        values = {name: value for name, value in dataclasses.asdict(config).items() if name not in OURS}
        write_config(folder, values | {
            "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True, "pad_token_id": PAD,
            "eos_token_id": EOS, "decoder_start_token_id": PAD, "feed_forward_proj": "gated-gelu" if config.gated else "relu",
            "tie_word_embeddings": config.scaled, "scale_decoder_outputs": config.scaled}, vocab)

    @staticmethod
    def from_hf(folder: str | Path) -> "T5":
        """Reads a T5 that transformers wrote: model.safetensors, its shards, or pytorch_model.bin -> T5 in eval mode, float32.

        Two things that transformers mixes are told apart: the head is tied exactly when lm_head.weight is absent or equal to the
        embedding; the output is scaled when scale_decoder_outputs says so, or without that key unless tie_word_embeddings is false.
        Raises InputError: one line naming the file and what is wrong.
        """
        folder = Path(folder)
        config = Config.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
        tensors, where = read_hf_tensors(folder)
        aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        shared = tensors.setdefault("shared.weight", next((tensors[name] for name in aliases if name in tensors), None))
        require(shared is not None, f"{where}: shared.weight is missing")
        for name in aliases:
            require(torch.equal(tensors.pop(name, shared), shared), f"{where}: {name} differs from shared.weight, which is not supported")
        if torch.equal(tensors.get("lm_head.weight", shared), shared):
            tensors.pop("lm_head.weight", None)
        config = dataclasses.replace(config, tied="lm_head.weight" not in tensors)
        # the first published checkpoints hold a bias for cross-attention that no version of T5 uses
        tensors.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)
        return build(config, tensors, where, hf_names(config))


def product(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x (about `rows`, D) -> x @ weight.T, for many products with one weight.

    On a CPU in float32 oneDNN stores the weight once in the order its kernel reads; the library's usual product would do that anew for
    each token. An internal operator of PyTorch's, so the usual product stands in where it is missing.
    """
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or reorder is None:
        return lambda x: F.linear(x, weight)
    packed = reorder(weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@contextlib.contextmanager
def reordered(model: nn.Module, rows: int) -> Iterator[None]:
    """Within the block the linear layers of `model` multiply by `product`. Not for a model that another thread uses at the same time."""
    # a layer that somebody has changed keeps its own product
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.bias is None and "forward" not in vars(m)]
    try:
        for layer in layers:
            layer.forward = product(layer.weight, rows)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse cumulative sum: logits (B, V) float32, uniforms (B,) in [0, 1) -> (B,) long drawn from softmax(logits)."""

    def place(weights: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """The entry of (B, n) in which `at` (B, 1) of the cumulative sum falls, never one of weight 0, and what is left of it there."""
        ends = weights.cumsum(1)
        at = torch.minimum(at, ends[:, -1:] * (1 - 2**-23))
        index = torch.searchsorted(ends, at, right=True)
        return index, at - ends.gather(1, index) + weights.gather(1, index)

    # a place among V is found by block first, in two cheap steps
    probabilities, gap = logits.softmax(-1), -logits.shape[1] % 128
    parts = (F.pad(probabilities, (0, gap)) if gap else probabilities).unflatten(1, (-1, 128))
    sums = parts.sum(-1)
    block, rest = place(sums, uniforms[:, None] * sums.sum(1, keepdim=True))
    inside, _ = place(parts[torch.arange(len(parts), device=parts.device), block[:, 0]], rest.clamp(min=0))
    return (block * 128 + inside)[:, 0]


# ---------------------------------------------------------------- checkpoints on disk

SAFE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def hf_names(config: Config) -> dict[str, list[str]]:
    """Our parameter -> the Hugging Face tensors that stacked on each other make it."""
    names = {"shared.weight": ["shared.weight"]}
    if not config.tied:
        names["head.weight"] = ["lm_head.weight"]
    blocks = [("norm1", "attention", "SelfAttention", {"qkv": "qkv", "out": "o"}),
              ("norm2", "cross", "EncDecAttention", {"q": "q", "kv": "kv", "out": "o"}),
              ("norm3", "feed_forward", "DenseReluDense", {"wi": ("wi_0", "wi_1") if config.gated else ("wi",), "wo": ("wo",)})]
    for stack, count, inside in (("encoder", config.num_layers, blocks[::2]), ("decoder", config.num_decoder_layers, blocks)):
        names[f"{stack}.bias.weight"] = [f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        names[f"{stack}.norm.weight"] = [f"{stack}.final_layer_norm.weight"]
        for i, (j, (norm, module, theirs, matrices)) in itertools.product(range(count), enumerate(inside)):
            layer, block = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer.{j}"
            names[f"{layer}.{norm}.weight"] = [f"{block}.layer_norm.weight"]
            for name, parts in matrices.items():
                names[f"{layer}.{module}.{name}.weight"] = [f"{block}.{theirs}.{part}.weight" for part in parts]
    return names


def build(config: Config, tensors: dict[str, Tensor], where: str, names: dict[str, list[str]]) -> T5:
    """A T5 in eval mode holding `tensors`; names: for each parameter the tensors that make it, its own name where it is absent.

    Raises InputError for missing, extra, misshapen and non-float tensors, by name.
    """
    with torch.device("meta"):
        model = T5(config)
    state = {}
    for name, parameter in model.state_dict().items():
        parts = names.get(name, [name])
        shape = [parameter.shape[0] // len(parts), *parameter.shape[1:]]
        for part in parts:
            require(part in tensors, f"{where}: {part} is missing, config.json asks for it")
            require(tensors[part].is_floating_point(), f"{where}: {part} holds {tensors[part].dtype}, not floating-point weights")
            require(list(tensors[part].shape) == shape, f"{where}: {part} has shape {list(tensors[part].shape)}, config.json says {shape}")
        state[name] = torch.cat([tensors.pop(part).float() for part in parts])
    require(not tensors, f"{where}: {len(tensors)} tensors that config.json has no place for: {', '.join(sorted(tensors)[:3])}")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


@contextlib.contextmanager
def reading(path: Path, damaged: str, absent: str = "") -> Iterator[None]:
    """Whatever a file's contents make the block raise becomes an InputError about `path`: `damaged`, where {} stands for the reason.

    One that cannot be opened: the system's reason and `absent`.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}{absent}") from None
    # torch raises many kinds for damaged and for forbidden contents, with pages of advice to lift the ban
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {damaged.format(error)}") from None


def read_json(path: Path) -> dict:
    """A JSON file. Raises InputError."""
    with reading(path, "not JSON ({})", absent="; is it the folder of a model?"):
        return json.loads(path.read_text(encoding="utf-8"))


def write_config(folder: str | Path, values: dict, vocab: str | Path | None) -> None:
    """Writes config.json and, given `vocab`, a copy of that file as spiece.model, which it may be."""
    with atomic(Path(folder, "config.json")) as path:
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if vocab is not None:
        with atomic(Path(folder, "spiece.model")) as path:
            shutil.copyfile(vocab, path)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """A state dict that torch.save wrote; a pickle that would run code is refused. Raises InputError."""
    with reading(path, "not a plain file of weights (damaged, or it holds more than tensors, which is never run)"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    require(isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()),
            f"{path}: not a dictionary of tensors")
    return state


def read_hf_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a Hugging Face folder, and the file that errors should name. Raises InputError."""
    single, index, pickled = folder / "model.safetensors", folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    if single.exists():
        return read_safetensors(single), str(single)
    if not index.exists():
        require(pickled.exists(), f"{folder}: neither model.safetensors, nor model.safetensors.index.json, nor pytorch_model.bin in it")
        return load_pickle(pickled), str(pickled)
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    require(isinstance(places, dict) and all(isinstance(f, str) and Path(f).name == f for f in places.values()),
            f"{index}: its weight_map does not name files of this folder")
    shards = [read_safetensors(folder / name) for name in sorted(set(places.values()))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}, str(index)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file: 8 bytes of header length, a JSON header, raw data. Raises InputError.

    https://github.com/huggingface/safetensors#format. Every length is checked before it is used.
    """
    with reading(path, "the header is not JSON ({})"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        require(8 + length <= size, f"{path}: its header says to be {length} bytes long, the file has {size}; fetch it again")
        header = json.loads(file.read(length))
    require(isinstance(header, dict) and all(isinstance(entry, dict) for entry in header.values()), f"{path}: the header names no tensors")
    header.pop("__metadata__", None)

    def counts(x: object) -> bool:
        return isinstance(x, list) and all(type(n) is int and 0 <= n < 2**63 for n in x)

    for name, entry in header.items():
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        require(isinstance(dtype, str) and dtype in SAFE_DTYPES, f"{path}: {name} has dtype {dtype!r}; {', '.join(SAFE_DTYPES)} are read")
        require(counts(offsets) and len(offsets) == 2, f"{path}: {name} has data_offsets {offsets!r}")
        require(counts(shape) and math.prod(shape) * SAFE_DTYPES[dtype].itemsize == offsets[1] - offsets[0],
                f"{path}: {name} has shape {shape!r} and dtype {dtype}, but offsets {offsets}")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        require(stop <= len(data), f"{path}: {name} ends at byte {stop} of the data, which has {len(data)}: truncated, fetch it again")
        require(begin >= end, f"{path}: {name} overlaps the tensor before it")
        tensors[name], end = data[begin:stop].clone().view(SAFE_DTYPES[entry["dtype"]]).view(entry["shape"]), stop
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes float32 tensors in the format that `read_safetensors` reads."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().tobytes())


# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """Text to ids and back with a SentencePiece model whose pad, </s> and <unk> are 0, 1 and 2, as T5's are."""

    def __init__(self, path: str | Path):
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.Load(str(path))
        except (OSError, RuntimeError):
            raise InputError(f"{path}: not a SentencePiece model that can be read") from None
        special = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        require(special == (PAD, EOS, UNK), f"{path}: pad, </s> and <unk> have ids {special}, T5's are (0, 1, 2)")
        self.size = self.pieces.get_piece_size()
        self.names = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK} | {f"<extra_id_{i}>": self.sentinel(i) for i in range(SENTINELS)}
        self.special = re.compile(f"({'|'.join(self.names)})")

    def sentinel(self, i: int) -> int:
        """Id of <extra_id_i>, 0 <= i < 100."""
        return self.size + SENTINELS - 1 - i

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids of `text` with </s> at the end; at most max_length (above 0) of them, </s> included."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            ids += [self.names[part]] if i % 2 else self.pieces.encode(part)
        return ids[:None if max_length is None else max(max_length - 1, 0)] + [EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: pad, </s>, sentinels and ids that it does not know are dropped, <unk> shows as SentencePiece shows it."""
        return self.pieces.decode([int(i) for i in ids if EOS < i < self.size])


# ---------------------------------------------------------------- pretraining


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lists or arrays of ids, one at least not empty -> (rows, longest) long, padded with 0, and its mask."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.full(mask.shape, PAD)
    ids[mask] = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
    return ids, mask


def corrupt(ids: Sequence[int], tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[int]]:
    """Span corruption (section 3.1.4 of the paper): ids without </s> -> input and target, both ending in </s>.

    15 % of the tokens are masked in spans of 3 on average; each span becomes one sentinel in the input, and the target lists the
    sentinels with what they hide.
    """
    noise = min(max(round(len(ids) * 0.15), 1), len(ids) - 1)
    spans = min(max(round(noise / 3.0), 1), noise, len(ids) - noise, SENTINELS)

    def cut(total: int) -> list[int]:
        points = sorted(rng.sample(range(1, total), spans - 1))
        return [b - a for a, b in zip([0] + points, points + [total])]

    source, target, at = [], [], 0
    for i, (kept, hidden) in enumerate(zip(cut(len(ids) - noise), cut(noise))):
        source += [*ids[at:at + kept], tokenizer.sentinel(i)]
        target += [tokenizer.sentinel(i), *ids[at + kept:at + kept + hidden]]
        at += kept + hidden
    return source + [EOS], target + [EOS]


def pretrain(model: T5, tokenizer: Tokenizer, texts: Sequence[str], steps: int, batch: int = 64, lr: float = 1e-3,
             pairs: Sequence[tuple[str, str]] = (), share: float = 0.5, seed: int = 0, max_length: int = 256) -> float:
    """Trains `model` in place on span corruption of `texts`, with supervised `pairs` (input, target) as `share` of the rows.

    T5 1.0's own pretraining mixture held supervised tasks too (section 3.5.3 of the paper). AdamW without weight decay, the learning
    rate rising over the first 5 % of the steps and then falling linearly to 0. Same arguments, same machine: same weights.
    Returns the mean loss (nats a token) of the last 50 steps.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    token_rows = [row for row in (tokenizer.encode(text, max_length)[:-1] for text in texts) if len(row) > 1]
    pair_rows = [(tokenizer.encode(x, max_length), tokenizer.encode(y, max_length)) for x, y in pairs]
    require(bool(token_rows or pair_rows), "pretraining needs texts of at least two tokens, or pairs")
    share = share if pair_rows and token_rows else float(bool(pair_rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, (steps - i) / max(1, steps - warmup)))
    progress, recent, waiting = Progress("pretraining", steps), [], []
    model.train()
    for step in range(steps):
        if not waiting:                                              # several batches at once, cut by length: little padding
            rows = [rng.choice(pair_rows) if rng.random() < share else corrupt(rng.choice(token_rows), tokenizer, rng)
                    for _ in range(batch * 16)]
            rows.sort(key=lambda row: (len(row[0]), len(row[1])))
            waiting = [rows[i:i + batch] for i in range(0, len(rows), batch)]
            rng.shuffle(waiting)
        sources, targets = zip(*waiting.pop())
        loss = model.loss(*pad(sources), *pad(targets)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = recent[-49:] + [loss.item()]
        progress.update(step + 1, f"loss {sum(recent) / len(recent):.3f}")
    progress.close()
    model.eval()
    return sum(recent) / max(len(recent), 1)
