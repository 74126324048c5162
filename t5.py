"""T5 1.0, T5 1.1 and Flan-T5 in plain PyTorch, under Hugging Face's parameter names.

T5: Raffel et al., "Exploring the Limits of Transfer Learning ...", JMLR 2020, arXiv 1910.10683.

    model, tokenizer = T5.load("weights/demo"), Tokenizer("weights/demo/spiece.model")
    ids, mask = pad([tokenizer.encode("predict: Ana has 5 hats. Ana buys 4 hats. How many now?")])
    print(tokenizer.decode(model.generate(ids, mask, max_new_tokens=20)[0]))

Shapes: B input rows of S tokens, R target rows of T tokens, D = d_model, H heads, V = vocab_size;
"packed" (N, D): the N real tokens of a batch. Masks are bool, True on tokens; padding stands right.
Weights are float32; torch.autocast may run the matrix products in bfloat16 or float16.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, EOS, UNK = 0, 1, 2
SENTINELS = 100  # <extra_id_0> to <extra_id_99>: ids above the SentencePiece pieces, falling
FUSED = ("cuda",)  # devices whose attention torch computes without keeping the weights
torch.backends.cuda.enable_cudnn_sdp(False)  # plans for each new shape; NaN with some masks


# ---------------------------------------------------------------- helpers for the whole project


class InputError(Exception):
    """A mistake in the user's input. The text is one line: what, where, and what to do."""


def require(good: bool, text: str) -> None:
    if not good:
        raise InputError(text)


def safe(text: str) -> str:
    """Foreign text for a terminal: what could control it becomes a space; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def run_program(main: Callable[[], object], memory_help: str = "") -> int:
    """main() -> exit code: 0; 2 after one line for what comes from outside, wherever it comes up;
    130 for Ctrl-C; 141 where nobody reads what is printed. A bug keeps its traceback."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal in ASCII or latin-1 has no ℓ
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Ctrl-C does
    try:
        code = main()
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except InputError as error:
        text = str(error)
    except OSError as error:
        text = f"{error.filename or 'input or output'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        known = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in known):
            raise
        text = f"out of memory; {memory_help}"
    print("error:", safe(" ".join(text.split())), file=sys.stderr)
    return 2


def lock(path: str | Path, busy: str = "") -> filelock.AcquireReturnProxy:
    """Hold a lock file while the process lives or a `with` lasts. Where another process has it:
    InputError(busy), or without such a text a line and a wait."""
    held = filelock.FileLock(path)
    try:
        return held.acquire(timeout=0)  # the lock itself would be acquired twice by `with`
    except filelock.Timeout:
        require(not busy, busy)
        print(f"waiting for another process, which holds {path}", file=sys.stderr, flush=True)
        return held.acquire()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; if the block succeeds, sync it and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: str | Path, problem: str) -> Iterator[None]:
    """Turn the errors of opening and parsing a file into one InputError; {} is their text."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or problem}; check the path") from None
    except Exception as error:  # torch.load alone raises a dozen kinds
        problem = problem.replace("{}", textwrap.shorten(str(error), 400))
        raise InputError(f"{path}: {problem}; mend or replace it") from error


def read_pt(path: str | Path) -> dict:
    """A dict of tensors and plain values, on the CPU. Code in the file is never run. InputError."""
    with reading(path, "damaged, or it holds more than tensors and plain values"):
        return dict(**torch.load(path, map_location="cpu", weights_only=True))


def write_pt(path: Path, values: dict) -> None:
    """Write what `read_pt` reads, atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:  # torch's, in place of that of a Ctrl-C or a full disk
            raise error.__context__ or error


class Progress:
    """Progress on stderr: a live line on a terminal, elsewhere one line every 30 seconds."""

    def __init__(self, what: str, total: int):
        self.what = what
        self.total = total
        self.live = sys.stderr.isatty()
        self.start = time.monotonic()
        self.shown = -math.inf if self.live else self.start

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 30):
            return
        self.shown = now
        left = (now - self.start) / max(done, 1) * max(self.total - done, 0)
        line = f"{self.what}: {done}/{self.total}, {left // 60:.0f} min {left % 60:02.0f} s left"
        if self.live:
            line = f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K"
        print(line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def track(what: str, items: Sequence) -> Iterator:
    """Iterate over `items` and show the progress."""
    progress = Progress(what, len(items))
    for i, item in enumerate(items):
        yield item
        progress.update(i + 1)
    progress.close()


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (R, W) int64 padded with 0 and mask (R, W) bool, on the CPU."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; a copy from the CPU to a GPU does not wait for the GPU."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---------------------------------------------------------------- the model


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5, in Hugging Face's names. The defaults are t5-small's."""

    vocab_size: int = 32128  # rows of the embedding; T5's tokenizer has 32,100 ids
    d_model: int = 512
    d_kv: int = 64  # per head; num_heads * d_kv may differ from d_model
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # 1.0: relu; 1.1 and Flan: gated-gelu
    tied: bool = True  # the output layer is the embedding
    scaled: bool = True  # hidden states are multiplied by d_model^-0.5 before the output layer


class Attention(nn.Module):
    """Multi-head attention. T5 does not divide the scores by sqrt(d_kv)."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool = False):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = linear(config.d_model, inner, scale=config.d_kv**-0.5)
        self.k = linear(config.d_model, inner)
        self.v = linear(config.d_model, inner)
        self.o = linear(inner, config.d_model)
        self.dropout = Dropout(config.dropout_rate)
        if has_relative_attention_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)
            nn.init.normal_(self.relative_attention_bias.weight, std=config.d_model**-0.5)

    def heads(self, x: Tensor, packing: "Packing") -> Tensor:
        """x (N, H * d_kv) packed -> (B, H, S, d_kv)."""
        return packing.unpack(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, packing, bias, pair=None, past=None) -> Tensor:
        """x (N, D) packed; bias broadcasts to (B, H, queries, keys) -> (N, D) packed.
        pair: keys and values (2, B, H, S, d_kv) instead of x's; past: of a text in generation."""
        queries = self.heads(self.q(x), packing)
        if pair is None:
            pair = self.heads(self.k(x), packing), self.heads(self.v(x), packing)
        if past is not None:
            length = bias.shape[-1]
            past[:, :, :, length - 1 : length] = torch.stack(pair)
            pair = past[:, :, :, :length]
        keys, values = pair
        if x.device.type in FUSED:
            bias = bias.expand(*queries.shape[:3], keys.shape[2])  # of `aligned`
            p = self.dropout.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(queries, keys, values, bias, p, scale=1.0)
        else:
            scores = (queries @ keys.transpose(-1, -2)).float() + bias
            mixed = self.dropout(scores.softmax(-1)).to(values.dtype) @ values
        return self.o(packing.pack(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """T5 1.0: wo(relu(wi(x))). T5 1.1 and Flan: wo(gelu(wi_0(x)) * wi_1(x))."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ["wi_0", "wi_1"] if self.gated else ["wi"]:
            setattr(self, name, linear(config.d_model, config.d_ff))
        self.wo = linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wi_0(x) if self.gated else self.wi(x)
        half = hidden.dtype == torch.float16  # overflows in the product and in wo; bfloat16 not
        hidden = hidden.float() if half else hidden
        hidden = F.gelu(hidden, approximate="tanh") if self.gated else F.relu(hidden)
        if self.gated:
            hidden = hidden * self.wi_1(x)
        with torch.autocast(x.device.type, enabled=False) if half else contextlib.nullcontext():
            return self.wo(self.dropout(hidden))


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """A linear layer without bias; normal initial weights, as in Mesh TensorFlow's T5."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale * inputs**-0.5)
    return layer


class Sublayer(nn.Module):
    """x + dropout(module(layer_norm(x))), the module under Hugging Face's name."""

    def __init__(self, config: T5Config, name: str, module: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, module)
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor, *arguments) -> Tensor:
        return x + self.dropout(getattr(self, self.name)(self.layer_norm(x), *arguments))


class Stack(nn.Module):
    """Encoder or decoder. All layers use the relative position bias of block 0."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.config = config
        self.is_decoder = is_decoder
        self.block = nn.ModuleList()
        for i in range(config.num_decoder_layers if is_decoder else config.num_layers):
            layer = [Sublayer(config, "SelfAttention", Attention(config, i == 0))]
            if is_decoder:
                layer.append(Sublayer(config, "EncDecAttention", Attention(config)))
            layer.append(Sublayer(config, "DenseReluDense", FeedForward(config)))
            self.block.append(nn.ModuleDict({"layer": nn.ModuleList(layer)}))
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x, packing, bias, cross=None, cross_bias=None, past=None) -> Tensor:
        """x (N, D) packed embeddings -> (N, D). cross and past: for each layer, see Attention."""
        x = self.dropout(x)
        if x.device.type in FUSED:
            bias = aligned(bias)
            cross_bias = None if cross_bias is None else aligned(cross_bias)
        for i, block in enumerate(self.block):
            x = block.layer[0](x, packing, bias, None, None if past is None else past[i])
            if self.is_decoder:
                x = block.layer[1](x, packing, cross_bias, cross[i])
            x = block.layer[-1](x)
        return self.dropout(self.final_layer_norm(x))

    def position_bias(self, length: int) -> Tensor:
        """(1, H, length, length) float32, added to the scores; -inf on a decoder's later keys."""
        embedding = self.block[0].layer[0].SelfAttention.relative_attention_bias
        offset = torch.arange(1 - length, length)
        distance = offset.abs()
        buckets = self.config.relative_attention_num_buckets // (1 if self.is_decoder else 2)
        exact = buckets // 2  # buckets of one distance; the others hold growing ranges
        # as published: on the CPU, in float32, in this order; it decides distances on a boundary
        growth = torch.log(distance.clamp(min=1).float() / exact)
        growth = growth / math.log(self.config.relative_attention_max_distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = torch.where(distance < exact, distance, far)
        if not self.is_decoder:
            bucket = bucket + buckets * (offset > 0)
        of_offset = embedding(to_device(bucket, embedding.weight.device)).T  # (H, 2 length - 1)
        if self.is_decoder:
            of_offset = of_offset.masked_fill(to_device(offset > 0, of_offset.device), -math.inf)
        place = torch.arange(length, device=of_offset.device)
        return of_offset[:, place[None] - place[:, None] + length - 1][None]


class T5(nn.Module):
    """Encoder, decoder and output layer."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = None if config.tied else linear(config.d_model, config.vocab_size)

    def encoder_only(self) -> "T5":
        """A copy without decoder and output layer, for `encode` alone."""
        model = copy.deepcopy(self)
        model.decoder = model.lm_head = None
        return model

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, S) int64, mask (B, S) bool -> memory (B, S, D), 0 on padding."""
        require(ids.shape == mask.shape, "ids and mask differ in shape")
        source = Packing(mask, self.shared.weight.device)
        bias = self.encoder.position_bias(ids.shape[1]) + source.key_bias
        return source.unpack(self.encoder(self.shared(source.pack(ids)), source, bias))

    def forward(self, ids: Tensor, mask: Tensor, target_in: Tensor) -> Tensor:
        """ids (B, S), mask (B, S), target_in (B, T) that starts with 0 -> logits (B, T, V)."""
        target = Packing(torch.ones(target_in.shape, dtype=torch.bool), self.shared.weight.device)
        hidden = self._decode(target_in, target, *self._cross(self.encode(ids, mask), mask))
        return target.unpack(F.linear(hidden, (self.lm_head or self.shared).weight))

    def loss(self, ids, mask, targets, target_mask, memory=None, rows=None) -> Tensor:
        """Mean cross-entropy over each target row's tokens: (R,) float32, nats. Raises InputError.
        ids (B, S) int64, mask (B, S) bool; targets (R, T) int64 with </s>, target_mask (R, T) bool.
        memory (B, S, D) of `encode` replaces ids; rows (R,) int64: each target's memory row."""
        attended = len(mask) if rows is None else len(rows)
        fits = targets.shape == target_mask.shape and len(targets) == attended
        require(fits, f"loss: {tuple(targets.shape)} targets, mask and memory rows do not fit")
        memory = self.encode(ids, mask) if memory is None else memory
        target = Packing(target_mask, memory.device)
        target_in = F.pad(targets[:, :-1], (1, 0), value=PAD)
        hidden = self._decode(target_in, target, *self._cross(memory, mask, rows))
        weight = (self.lm_head or self.shared).weight
        nats = OutputLoss.apply(hidden, weight, target.pack(targets), torch.is_grad_enabled())
        return target.unpack(nats).sum(1) / to_device(target_mask.sum(1), memory.device)

    @torch.no_grad()
    def generate(
        self, ids, mask, max_new_tokens, temperature=0.0, generator=None, limit=None, uniforms=None
    ) -> Tensor:
        """Write an answer for each row: (B, <= max_new_tokens) int64, 0 after </s>; no dropout.
        temperature 0 takes the best token, else softmax(logits / temperature) is sampled with one
        uniform number for each row and position, of `uniforms` (B, max_new_tokens) float32 or drawn
        from `generator` (both on the CPU), so that no row depends on others. Only ids < limit."""
        was_training = self.training
        self.eval()
        device, count = self.shared.weight.device, len(ids)
        if temperature > 0:
            if uniforms is None:
                uniforms = torch.rand(count, max_new_tokens, generator=generator)
            uniforms = to_device(uniforms, device)
        step = Packing(torch.ones(count, 1, dtype=torch.bool), device)
        cross, cross_bias = self._cross(self.encode(ids, mask), mask)
        past = cross.new_empty(*cross.shape[:4], max_new_tokens, self.config.d_kv)
        bias = self.decoder.position_bias(max_new_tokens)
        written = torch.full((count, 1 + max_new_tokens), PAD, device=device)  # starts from pad
        alive = torch.arange(count, device=device)  # the caller's rows still in the batch
        with reordered(self.decoder, (self.lm_head or self.shared).weight, count) as head:
            for t in range(max_new_tokens):
                now = bias[:, :, t : t + 1, : t + 1]
                hidden = self._decode(written[alive, t : t + 1], step, cross, cross_bias, now, past)
                logits = head(hidden).float()[:, :limit]
                if temperature == 0:
                    written[alive, t + 1] = logits.argmax(1)
                else:
                    written[alive, t + 1] = draw(logits / temperature, uniforms[alive, t])
                going = (written[alive] != EOS).all(1).nonzero()[:, 0]
                if len(going) == 0:
                    break
                if len(going) <= 0.75 * len(alive):  # dropping rows copies the others
                    alive = alive[going]
                    cross, cross_bias = cross.index_select(2, going), cross_bias[going]
                    past = past.index_select(2, going)
        ended = (written[:, :-1] == EOS).cumsum(1) > 0  # before this position
        self.train(was_training)
        return written[:, 1:].masked_fill(ended, PAD)[:, : t + 1]

    def _cross(self, memory: Tensor, mask: Tensor, rows=None) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, 2, R, H, S, d_kv) of `rows` of the memory, bias (R, 1, 1, S)."""
        source = Packing(mask, memory.device)
        packed = source.pack(memory)
        attentions = [block.layer[1].EncDecAttention for block in self.decoder.block]
        parts = [a.heads(w(packed), source) for a in attentions for w in (a.k, a.v)]
        cross = torch.stack(parts).unflatten(0, (-1, 2))
        if rows is None:
            return cross, source.key_bias
        rows = to_device(rows, memory.device)
        return cross.index_select(2, rows), source.key_bias[rows]

    def _decode(self, target_in, target, cross, cross_bias, bias=None, past=None) -> Tensor:
        """target_in (R, T) -> hidden (N, D). Padding stands right, where no token looks."""
        bias = self.decoder.position_bias(target_in.shape[1]) if bias is None else bias
        embedded = self.shared(target.pack(target_in))
        hidden = self.decoder(embedded, target, bias, cross, cross_bias, past)
        return hidden * self.config.d_model**-0.5 if self.config.scaled else hidden

    @staticmethod
    def load(folder: str | Path) -> "T5":
        """Read a Hugging Face T5 folder -> T5 in eval mode, float32, on the CPU. InputError."""
        tensors, file = read_tensors(Path(folder))
        names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        copies = [tensors.pop(name) for name in names if name in tensors]
        same = bool(copies) and all(torch.equal(copies[0], x) for x in copies)
        require(same, f"{file}: shared.weight is missing or differs from embed_tokens; no T5")
        tensors["shared.weight"] = copies[0]
        tied = torch.equal(tensors.get("lm_head.weight", copies[0]), copies[0])
        if tied:
            tensors.pop("lm_head.weight", None)
        # the first published checkpoints hold it, no version of T5 uses it
        tensors.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)
        config = read_config(Path(folder, "config.json"), tied)
        with reading(file, "does not fit config.json: {}"), torch.device("meta"):
            model = T5(config)
            model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save(self, folder: str | Path, vocab=None, dtype=torch.float32) -> None:
        """Write a Hugging Face folder, weights as `dtype`; `vocab` is copied to spiece.model."""
        tensors = {k: v.detach().to("cpu", dtype) for k, v in self.state_dict().items()}
        if not self.config.scaled:  # transformers 4 takes an unscaled output for an untied head
            tensors.setdefault("lm_head.weight", tensors["shared.weight"])
        values = dataclasses.asdict(self.config) | IDS | {"model_type": "t5", "dtype": "float32"}
        values |= {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
        del values["tied"]
        # transformers 4 reads whether to scale from the first of these, transformers 5 from both
        values["tie_word_embeddings"] = values["scale_decoder_outputs"] = values.pop("scaled")
        write_safetensors(Path(folder, "model.safetensors"), tensors)
        with atomic(Path(folder, "config.json")) as path:
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if vocab is not None:
            with atomic(Path(folder, "spiece.model")) as path:
                shutil.copyfile(vocab, path)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample softmax(logits): logits (B, V) float32, uniforms (B,) in [0, 1) -> ids (B,)."""
    ends = logits.softmax(-1).cumsum(-1)
    place = uniforms[:, None].clamp(max=1 - 2**-23) * ends[:, -1:]
    return torch.searchsorted(ends, place, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


# ---------------- fast paths (gains: t5-small's shape, two cores of an AMD EPYC, 16 x 64 tokens)


class Packing:
    """The tokens of a padded batch, mask (B, S): all but attention runs on (N, D) without padding.
    A mask on the CPU spares a wait for the GPU. Gain: 22 % of a step on rows of SVAMP's lengths."""

    def __init__(self, mask: Tensor, device: torch.device):
        require(bool(mask.any(1).all()), "a row of the mask has no token; leave empty rows out")
        self.mask = mask
        bias = mask[:, None, None].float().log()  # (B, 1, 1, S): 0 on tokens, -inf on padding
        self.key_bias = to_device(bias, device)
        self.index = None if mask.all() else to_device(mask.flatten().nonzero()[:, 0], device)

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (N, ...) on the device."""
        x = to_device(x, self.key_bias.device).flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, S, ...), 0 on padding."""
        if self.index is not None:
            x = x.new_zeros(self.mask.numel(), *x.shape[1:]).index_copy_(0, self.index, x)
        return x.unflatten(0, (-1, self.mask.shape[1]))


def aligned(bias: Tensor) -> Tensor:
    """A position bias as the fused kernels want it, once for all layers of a stack: in the dtype of
    the products, rows that start at a multiple of 8. Gain: not measured, no GPU was at hand."""
    kind = bias.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else bias.dtype
    return F.pad(bias.to(dtype), (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]]


class Dropout(nn.Dropout):
    """Dropout. On a CPU it draws the gaps between dropped elements, which are geometric: p numbers
    an element, of torch's global generator. Gain: 12 % of a training step."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        # six standard deviations more gaps than expected: they pass the end all but once in 1e9
        expected = x.numel() * self.p
        uniforms = torch.rand(int(expected + 6 * expected**0.5) + 8)
        gaps = 1 + (uniforms.neg_().log1p_() / math.log1p(-self.p)).long()
        dropped = gaps.cumsum(0) - 1
        dropped = dropped[dropped < x.numel()]
        x = x / (1 - self.p)
        x.view(-1).index_fill_(0, dropped, 0.0)
        return x


class OutputLoss(torch.autograd.Function):
    """Output layer and its cross-entropy: hidden (N, D), weight (V, D), targets (N,) -> (N,).
    Chunks stay in the cache; one (N, V) tensor is kept: softmax - one-hot. Gain: 9 %, memory."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        losses = torch.empty(len(hidden), device=hidden.device)
        gradient = hidden.new_empty(len(hidden) if keep else 0, len(weight))
        chunk = 256 if device == "cpu" else 4096
        for i in range(0, len(hidden), chunk):
            rows = slice(i, i + chunk)
            log_p = F.linear(hidden[rows], weight).float().log_softmax(1)
            target = targets[rows, None]
            losses[rows] = -log_p.gather(1, target)[:, 0]
            if keep:
                # e^-64 counts as 0; without the bound, subnormal numbers slow the products down
                p = log_p.clamp_(min=-64).exp_()
                gradient[rows] = p.scatter_add_(1, target, -torch.ones_like(p[:, :1]))
        ctx.save_for_backward(hidden, weight, gradient)
        return losses

    @staticmethod
    def backward(ctx, g: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("OutputLoss has no second derivative")
        hidden, weight, gradient = ctx.saved_tensors
        g = g[:, None]
        d_weight = gradient.T @ (g * hidden).to(hidden.dtype)
        return g * (gradient @ weight), d_weight.float(), None, None


@contextlib.contextmanager
def reordered(decoder: Stack, head: Tensor, rows: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside the block the decoder's linear layers multiply x (rows, D) by weights that oneDNN has
    reordered once; F.linear does so in every call, and stays where PyTorch lacks these operators.
    Yields the output layer of weight `head`, alike. One thread at a time. Gain: 16 %."""
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)

    def product(weight: Tensor) -> Callable[[Tensor], Tensor]:
        plain = weight.device.type == "cpu" and weight.dtype == torch.float32
        if reorder is None or not plain or torch.is_autocast_enabled("cpu"):
            return lambda x: F.linear(x, weight)
        packed = reorder(weight.detach(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    layers = [m for m in decoder.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    for layer in layers:
        layer.forward = product(layer.weight)
    try:
        yield product(head)
    finally:
        for layer in layers:
            del layer.forward


# ---------------------------------------------------------------- Hugging Face's files, tokenizer

SAFE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}


def read_config(path: Path, tied: bool) -> T5Config:
    """Hugging Face's config.json -> T5Config. Raises InputError."""
    with reading(path, "not a JSON object"):
        given = dict(**json.loads(path.read_text(encoding="utf-8")))
    choices = {key: [value] for key, value in IDS.items()}
    choices |= {"model_type": ["t5"], "feed_forward_proj": ["relu", "gated-gelu"]}
    for key, supported in choices.items():
        value = given.get(key, supported[0])
        require(value in supported, f"{path}: {key} is {value!r}; supported is {supported}")
    values = dataclasses.asdict(T5Config()) | {"num_decoder_layers": given.get("num_layers", 6)}
    values |= {k: v for k, v in given.items() if k in values and v is not None}
    tied_key = given.get("tie_word_embeddings") is not False
    values |= {"tied": tied, "scaled": bool(given.get("scale_decoder_outputs", tied_key))}
    with reading(path, "a value is not a number"):
        deepest = max(values["num_layers"], values["num_decoder_layers"])
        reach = 2 * values["relative_attention_max_distance"]
        good = 4 <= values["relative_attention_num_buckets"] < reach and deepest < 1000
        good = good and 0 <= values["dropout_rate"] < 1
    require(good, f"{path}: number of layers, of buckets or dropout_rate out of range; correct it")
    return T5Config(**values)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a Hugging Face folder, and the file that errors name. Raises InputError."""
    names = ["model.safetensors", "pytorch_model.bin"]  # one file: T5s of this size have no parts
    file = next((folder / name for name in names if (folder / name).exists()), None)
    require(file is not None, f"{folder}: none of {', '.join(names)} is there; check the path")
    if file.suffix == ".safetensors":
        return read_safetensors(file), file
    tensors = read_pt(file)
    good = all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors.values())
    require(good, f"{file}: holds more than floating-point tensors; take a plain state dict")
    return {name: x.float() for name, x in tensors.items()}, file


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, https://github.com/huggingface/safetensors#format. InputError."""
    with reading(path, "truncated, or its header is not JSON"):
        data = memoryview(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        with reading(path, f"{name!r} is truncated, or no well-formed F32, F16 or BF16 tensor"):
            begin, end = entry["data_offsets"]
            part = bytearray(data[start + begin : start + end])
            if begin < 0 or len(part) != end - begin:
                raise ValueError("outside of the file")
            x = torch.frombuffer(part, dtype=SAFE_DTYPES[entry["dtype"]])
            tensors[name] = x.view(entry["shape"]).float()
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write what `read_safetensors` reads, atomically."""
    names = {dtype: name for name, dtype in SAFE_DTYPES.items()}
    header, end = {}, 0
    for name, x in tensors.items():
        offsets = [end, end + x.nbytes]
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        end += x.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.contiguous().view(torch.uint8).numpy().tobytes())


class Tokenizer:
    """T5's SentencePiece model; above its `size` pieces come the sentinels. Raises InputError."""

    def __init__(self, path: str | Path):
        with reading(path, "not a SentencePiece model"):
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        special = (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())
        require(special == (PAD, EOS, UNK), f"{path}: special ids {special}; T5's are 0, 1, 2")
        self.size = self.pieces.get_piece_size()
        self.ids = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK}
        self.sentinels = [self.size + SENTINELS - 1 - i for i in range(SENTINELS)]
        self.ids |= {f"<extra_id_{i}>": number for i, number in enumerate(self.sentinels)}

    def encode(self, text: str, max_length: int = sys.maxsize) -> list[int]:
        """Ids of `text` and </s>, at most max_length of them, </s> included."""
        ids = []
        for part in re.split(f"({'|'.join(self.ids)})", text):
            ids += [self.ids[part]] if part in self.ids else self.pieces.encode(part)
        return ids[: max(max_length - 1, 0)] + [EOS]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of `ids`; pad, </s>, sentinels and ids above them are left out."""
        return self.pieces.decode([int(i) for i in ids if EOS < i < self.size])


# ---------------------------------------------------------------- pretraining


def corrupt(ids: Sequence[int], tokenizer: Tokenizer, rng: random.Random) -> tuple[list, list]:
    """Span corruption [T5, 3.1.4]: at least two ids without </s> -> input, target, both with </s>.
    15 % of the tokens are hidden, in spans of 3 on average, each behind a sentinel."""
    hidden = min(max(round(len(ids) * 0.15), 1), len(ids) - 1)
    spans = min(max(round(hidden / 3), 1), len(ids) - hidden, SENTINELS)

    def lengths(total: int) -> list[int]:
        points = [0, *sorted(rng.sample(range(1, total), spans - 1)), total]
        return [end - start for start, end in zip(points, points[1:])]

    source, target, start = [], [], 0
    for i, (kept, masked) in enumerate(zip(lengths(len(ids) - hidden), lengths(hidden))):
        middle = start + kept
        source += [*ids[start:middle], tokenizer.sentinels[i]]
        target += [tokenizer.sentinels[i], *ids[middle : middle + masked]]
        start = middle + masked
    return source + [EOS], target + [EOS]


def pretrain(
    model, tokenizer, texts, steps, batch=64, lr=1e-3, pairs=(), share=0.5, seed=0, max_length=256
) -> float:
    """Train `model` in place on span corruption of `texts` and on `pairs` of (input, target) texts.
    share: the pairs' part of the rows. AdamW; the rate rises to `lr` over 5 % of the steps, then
    falls to 0. Same arguments, same machine: same weights. Returns the last 50 steps' mean loss."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = [tokenizer.encode(text, max_length)[:-1] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    pair_rows = [[tokenizer.encode(text, max_length) for text in pair] for pair in pairs]
    require(bool(rows or pair_rows), "pretrain: no text of two tokens and no pair; give some")
    share = share if rows and pair_rows else float(bool(pair_rows))
    warmup = max(1, steps // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    batches, losses = [], []
    model.train()
    for step in track("pretraining", range(steps)):
        if not batches:  # 16 at once, cut from examples sorted by length: little padding
            examples = []
            for _ in range(16 * batch):
                supervised = rng.random() < share
                row = rng.choice(pair_rows if supervised else rows)
                examples.append(row if supervised else corrupt(row, tokenizer, rng))
            examples.sort(key=lambda example: (len(example[0]), len(example[1])))
            batches = [examples[i : i + batch] for i in range(0, len(examples), batch)]
            rng.shuffle(batches)
        sources, targets = zip(*batches.pop())
        loss = model.loss(*pad(sources), *pad(targets)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = (steps - step) / max(1, steps - warmup)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, decay)
        optimizer.step()
        losses = losses[-49:] + [loss.item()]
    model.eval()
    return sum(losses) / max(len(losses), 1)
