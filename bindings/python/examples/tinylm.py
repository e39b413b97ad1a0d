"""tinylm in NumPy: the model of examples/tinylm over kvtile, and the same text as its C program.

    python3 tinylm.py --prompt "One day, Anna and" -n 100 --k i8 --v i8

A transformer of llama2.c's architecture: RMSNorm, RoPE on adjacent pairs, grouped-query attention,
SwiGLU. What an engine needs of kvtile is in `Model.forward`: a step, and for each layer an append
and an attend.

Sums are rounded in another order than in C, so that two tokens that are nearly as likely could be
told apart differently; the text has been the same for all prompts that were tried.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
from typing import Dict, Iterator, List, Tuple

import numpy as np

import kvtile

BOS, EOS = 1, 2
PREFILL_TOKENS = 256


class Model:
    """tinylm.f16.bin: "TLM1", seven int32, then f16 weights, kind after kind for all layers."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as f:
            data = f.read()
        if data[:4] != b"TLM1" or len(data) < 32:
            raise SystemExit(f"{path}: not a model of tinylm")
        self.dim, self.hidden, self.n_layers, self.n_heads, self.n_kv_heads, vocab, self.seq_len = \
            struct.unpack("<7i", data[4:32])
        self.vocab_size, self.head_dim = abs(vocab), self.dim // self.n_heads
        weights, at = np.frombuffer(data, "<f2", offset=32), 0

        def take(*shape: int) -> np.ndarray:
            nonlocal at
            n = int(np.prod(shape))
            if at + n > len(weights):
                raise SystemExit(f"{path}: cut")
            at += n
            return weights[at - n:at].astype(np.float32).reshape(shape)

        layers, dim, kv = self.n_layers, self.dim, self.n_kv_heads * self.head_dim
        self.embedding = take(self.vocab_size, dim)
        self.att_norm = take(layers, dim)
        self.wq, self.wk = take(layers, dim, dim), take(layers, kv, dim)
        self.wv, self.wo = take(layers, kv, dim), take(layers, dim, dim)
        self.ffn_norm = take(layers, dim)
        self.w1, self.w2 = take(layers, self.hidden, dim), take(layers, dim, self.hidden)
        self.w3 = take(layers, self.hidden, dim)
        self.final_norm = take(dim)
        self.classifier = self.embedding if vocab > 0 else take(self.vocab_size, dim)
        if at != len(weights):
            raise SystemExit(f"{path}: {len(weights) - at} weights too many")
        pairs = np.arange(self.head_dim // 2, dtype=np.float32)
        self.frequencies = (1 / np.float32(10000) ** (2 * pairs / self.head_dim)).astype(np.float32)

    def cache(self, k_type: str, v_type: str) -> kvtile.Cache:
        """A cache for this model; with its RoPE described, positions could be moved."""
        rope = kvtile.Rope(kvtile.RopePairing.NEIGHBOURS, self.frequencies)
        return kvtile.Cache(kvtile.Group(self.n_layers, self.n_heads, self.n_kv_heads,
                                         self.head_dim, k_type=k_type, v_type=v_type, rope=rope),
                            self.seq_len)

    def rope(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Turns dims 2i and 2i + 1 of [n][heads][head_dim] by position * frequency."""
        angles = (positions.astype(np.float32)[:, None] * self.frequencies)[:, None, :]
        c, s = np.cos(angles), np.sin(angles)
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
        out[..., 1::2] = x[..., 0::2] * s + x[..., 1::2] * c
        return out

    def forward(self, seq: kvtile.Sequence, tokens: List[int]) -> np.ndarray:
        """The logits behind the last of these tokens, which become part of seq."""
        n = len(tokens)
        positions = np.arange(seq.length, seq.length + n)
        x = self.embedding[tokens]
        with seq.step(n, tokens) as step:
            for i in range(self.n_layers):
                h = norm(x, self.att_norm[i])
                q, k, v = ((h @ w[i].T).reshape(n, -1, self.head_dim)
                           for w in (self.wq, self.wk, self.wv))
                step.append(i, self.rope(k, positions), v)
                out = step.attend(i, self.rope(q, positions))
                x = x + out.reshape(n, -1) @ self.wo[i].T
                h = norm(x, self.ffn_norm[i])
                gate = h @ self.w1[i].T
                x = x + (gate / (1 + np.exp(-gate)) * (h @ self.w3[i].T)) @ self.w2[i].T
        return norm(x[-1], self.final_norm) @ self.classifier.T


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    mean = (x * x).mean(-1, keepdims=True, dtype=np.float32)
    return weight * (x / np.sqrt(mean + np.float32(1e-5)))


class Tokenizer:
    """llama2.c's tokenizer.bin: scores and bytes of each token."""

    def __init__(self, path: str, vocab_size: int) -> None:
        with open(path, "rb") as f:
            data = f.read()
        self.tokens: List[bytes] = []
        self.scores: List[float] = []
        at = 4
        for _ in range(vocab_size):
            score, size = struct.unpack_from("<fI", data, at)
            self.tokens.append(data[at + 8:at + 8 + size])
            self.scores.append(score)
            at += 8 + size
        if at != len(data):
            raise SystemExit(f"{path}: not the tokens of this model")
        self.ids: Dict[bytes, int] = {}
        for i, t in enumerate(self.tokens):
            self.ids.setdefault(t, i)

    def encode(self, text: str) -> List[int]:
        """BOS, a space before the text, characters (or bytes), then the best-scored merges."""
        ids = [self.ids[b" "]] if text and b" " in self.ids else []
        for c in text:
            raw = c.encode()
            ids += [self.ids[raw]] if raw in self.ids else [b + 3 for b in raw]
        while True:
            best, where = -1e10, -1
            for i in range(len(ids) - 1):
                joint = self.ids.get(self.tokens[ids[i]] + self.tokens[ids[i + 1]])
                if joint is not None and self.scores[joint] > best:
                    best, where = self.scores[joint], i
            if where < 0:
                return [BOS, *ids]
            ids[where:where + 2] = [self.ids[self.tokens[ids[where]] + self.tokens[ids[where + 1]]]]

    def decode(self, previous: int, token: int) -> bytes:
        text = self.tokens[token]
        if previous == BOS and text.startswith(b" "):
            text = text[1:]
        if len(text) == 6 and text.startswith(b"<0x") and text.endswith(b">"):
            return bytes([int(text[3:5], 16)])
        return text


def coin(seed: int, position: int) -> np.float32:
    """A number in [0, 1) for a position: splitmix64, as tinylm's sampler has it."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    z = (seed * golden + position) & mask
    for _ in range(2):
        z = (z + golden) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return np.float32(z >> 40) * np.float32(2**-24)


def sample(logits: np.ndarray, temperature: float, top_p: float, seed: int, position: int) -> int:
    """The most likely token, or one of the most likely ones that together reach top_p."""
    if temperature <= 0:
        return int(logits.argmax())
    p = np.exp((logits - logits.max()) / np.float32(temperature))
    order = np.argsort(-p, kind="stable")
    sums = np.cumsum(p[order], dtype=np.float32)
    n = int(np.searchsorted(sums, np.float32(top_p) * p.sum(dtype=np.float32))) + 1
    n = min(n, len(order))
    picked = int(np.searchsorted(sums[:n], coin(seed, position) * sums[n - 1], side="right"))
    return int(order[min(picked, n - 1)])


def generate(model: Model, seq: kvtile.Sequence, tokens: List[int], n: int,
             options: Tuple[float, float, int]) -> Iterator[Tuple[int, int]]:
    """(the token before, the token) for n tokens behind these; appends them to `tokens`."""
    while seq.length < len(tokens) - 1:  # the last token is always a step of its own
        first = seq.length
        model.forward(seq, tokens[first:min(first + PREFILL_TOKENS, len(tokens) - 1)])
    logits = model.forward(seq, tokens[-1:])
    for _ in range(n):
        token = sample(logits, *options, len(tokens))
        if token in (BOS, EOS) or len(tokens) == model.seq_len:
            return
        tokens.append(token)
        yield tokens[-2], token
        logits = model.forward(seq, [token])


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.path.join(here, "../../../examples/tinylm"),
                        help="the folder of tinylm.f16.bin and tokenizer.bin")
    parser.add_argument("--prompt", default="One morning, Anna and Tom went to the")
    parser.add_argument("-n", type=int, default=128, help="tokens")
    parser.add_argument("--k", default="f32", help="f32, f16, i8 or i4")
    parser.add_argument("--v", default="f32", help="f32, f16, i8, i4 or i5")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ids", action="store_true", help="print token ids, one a line")
    o = parser.parse_args()
    model = Model(os.path.join(o.data, "tinylm.f16.bin"))
    tokenizer = Tokenizer(os.path.join(o.data, "tokenizer.bin"), model.vocab_size)
    tokens = tokenizer.encode(o.prompt)
    if len(tokens) > model.seq_len:
        raise SystemExit(f"the prompt has {len(tokens)} tokens, the context {model.seq_len}")
    out = sys.stdout.buffer
    if not o.ids:
        out.write(o.prompt.encode())
    with model.cache(o.k, o.v) as cache, cache.sequence() as seq:
        for previous, token in generate(model, seq, tokens, o.n, (o.temperature, o.top_p, o.seed)):
            out.write(b"%d\n" % token if o.ids else tokenizer.decode(previous, token))
            out.flush()
        if not o.ids:
            out.write(b"\n")
        print(f"[{seq.length} tokens in {seq.memory_bytes / 1024:.1f} KiB]", file=sys.stderr)


if __name__ == "__main__":
    main()
