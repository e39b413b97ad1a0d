#!/usr/bin/python3
"""
Train tinylm: tokenizer and model, from text that stories.c makes.

    nice -n 19 python3 train.py --budget 1300          # CPU seconds; resumes by itself
    python3 train.py --export                          # tinylm.f16.bin, tokenizer.bin
    python3 train.py --evaluate                        # held-out loss, bigram, recall

The architecture is llama2.c's (RMSNorm, RoPE on neighbouring pairs, SwiGLU, grouped heads, the
classifier shared with the embedding), so that the C program runs both. Progress is counted in CPU
time, not in wall time or steps: the training may be stopped and continued at will, and the
schedule of learning rate and context length still ends where it should.

What makes a model of this size learn to look facts up within half an hour of one core:
  - the start: a first induction circuit is set into the random weights (Model.prime);
  - the context grows 128, 256, 512, 1024, 2048: the lookup forms on short stories;
  - at short contexts many rows are drills, in which a few facts come again and again;
  - at short contexts the positions jump by random gaps, so that far RoPE distances are not new
    when the long stories come;
  - the answers' tokens weigh more in the loss;
  - matrix products run in bfloat16, with float32 master weights.
"""
import argparse
import collections
import ctypes
import math
import os
import re
import struct
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 448, 3, 4, 2, 64
VOCAB, CONTEXT = 1080, 2048
BOS, BLOCK = 1, 256
# (until this part of the budget, context, rows a step, part of them drills)
PHASES = [(0.185, 128, 32, 0.4), (0.28, 256, 16, 0.3), (0.50, 512, 8, 0.2), (0.75, 1024, 4, 0.1),
          (1.0, 2048, 3, 0.0)]
PEAK_LR, WARMUP_STEPS, ANSWER_WEIGHT = 1.5e-3, 100, 4.0
MATCH, COPY = 1.5, 2.0  # strength of the first circuit: see Model.prime
HELD_OUT = 1 << 40  # seeds from here on are never trained on

# ---------------------------------------------------------------- stories


class Question(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint32) for n in ("fact", "value", "answer_begin", "answer_end")]


class Story(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char_p), ("n_bytes", ctypes.c_size_t),
                ("questions", ctypes.POINTER(Question)), ("n_questions", ctypes.c_size_t)]


class Stories:
    def __init__(self, work):
        so = os.path.join(work, "libstories.so")
        subprocess.check_call(["cc", "-std=c11", "-O2", "-fPIC", "-shared",
                               os.path.join(HERE, "stories.c"), "-o", so])
        self.lib = ctypes.CDLL(so)
        self.lib.story_make.argtypes = [ctypes.POINTER(Story), ctypes.c_uint64, ctypes.c_size_t]
        self.lib.story_free.argtypes = [ctypes.POINTER(Story)]

    def make(self, seed, n_words):
        s = Story()
        if self.lib.story_make(ctypes.byref(s), seed, n_words):
            raise MemoryError
        text = s.text.decode()
        questions = [(q.value, q.answer_begin, q.answer_end)
                     for q in s.questions[:s.n_questions]]
        self.lib.story_free(ctypes.byref(s))
        return text, questions


# ---------------------------------------------------------------- tokenizer

# No token crosses these pieces, so llama2.c's greedy merging over a whole text gives the same
# tokens as merging piece by piece.
PIECE = re.compile(r" ?[A-Za-z]+| ?[^A-Za-z]")


def train_tokenizer(stories):
    words = collections.Counter()
    for seed in range(1500):
        words.update(PIECE.findall(" " + stories.make(seed, 1000)[0]))
    chars = sorted({c for w in words for c in w} - {"\n"})  # a newline stays a byte token
    tokens = chars[:]
    seqs = {w: list(w) for w in words if w.strip()}
    while 259 + len(tokens) < VOCAB:
        pairs = collections.Counter()
        for w, seq in seqs.items():
            for pair in zip(seq, seq[1:]):
                pairs[pair] += words[w]
        if not pairs:
            break
        # Ties by spelling, so that the tokenizer does not depend on the order of a dict.
        a, b = max(pairs, key=lambda p: (pairs[p], p))
        tokens.append(a + b)
        for w, seq in seqs.items():
            i = 0
            while i + 1 < len(seq):
                if seq[i] == a and seq[i + 1] == b:
                    seq[i:i + 2] = [a + b]
                i += 1
    many = {w: len(s) for w, s in seqs.items() if len(s) > 1}
    print(f"tokenizer: {259 + len(tokens)} tokens, {len(seqs)} pieces, "
          f"{len(many)} of more than one token: {sorted(many)[:40]}", flush=True)
    return len(chars), tokens


class Tokenizer:
    def __init__(self, n_chars, tokens):
        self.n_chars, self.tokens = n_chars, tokens
        self.ids = {t: 259 + i for i, t in enumerate(tokens)}
        self.cache = {}

    def piece(self, s):
        got = self.cache.get(s)
        if got is None:
            seq = []
            for c in s:
                seq += [c] if c in self.ids else [bytes([b]) for b in c.encode()]
            while True:
                best = None
                for i in range(len(seq) - 1):
                    if isinstance(seq[i], str) and isinstance(seq[i + 1], str):
                        rank = self.ids.get(seq[i] + seq[i + 1])
                        if rank is not None and (best is None or rank < best[0]):
                            best = (rank, i)
                if best is None:
                    break
                i = best[1]
                seq[i:i + 2] = [seq[i] + seq[i + 1]]
            got = [self.ids[t] if isinstance(t, str) else 3 + t[0] for t in seq]
            self.cache[s] = got
        return got

    def encode(self, text, questions=()):
        """BOS and the text's tokens; for each question (value's token, answer's tokens)."""
        ids, at, pos = [BOS], {}, 0
        for p in PIECE.findall(" " + text):
            at[pos - 1] = len(ids)  # the dummy space has offset -1
            ids += self.piece(p)
            pos += len(p)
        at[pos - 1] = len(ids)
        return ids, [(at[v], at[b], at[e]) for v, b, e in questions]

    def save(self, path):
        out = ["<unk>", "\n<s>\n", "\n</s>\n"] + [f"<0x{b:02X}>" for b in range(256)]
        out = [(t, 0.0) for t in out]
        for i, t in enumerate(self.tokens):
            # Merges in the order learned: llama2.c takes the best score first.
            out.append((t, -1e6 if i < self.n_chars else float(-i)))
        with open(path, "wb") as f:
            f.write(struct.pack("<i", max(len(t.encode()) for t, _ in out)))
            for t, score in out:
                b = t.encode()
                f.write(struct.pack("<fi", score, len(b)) + b)


# ---------------------------------------------------------------- model


def linear(x, w):
    return F.linear(x, w.bfloat16())


def norm(x, w):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)) * w


class Model(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.vocab = vocab

        def matrix(rows, cols, gain=1.0):
            return torch.nn.Parameter(torch.randn(rows, cols) * gain / math.sqrt(cols))

        out = 1 / math.sqrt(2 * LAYERS)
        self.embed = torch.nn.Parameter(torch.randn(vocab, DIM) * 0.04)
        kv = KV_HEADS * HEAD_DIM
        self.layers = torch.nn.ModuleList()
        for _ in range(LAYERS):
            m = torch.nn.Module()
            m.att_norm = torch.nn.Parameter(torch.ones(DIM))
            m.wq, m.wk, m.wv = matrix(HEADS * HEAD_DIM, DIM), matrix(kv, DIM), matrix(kv, DIM)
            m.wo = matrix(DIM, HEADS * HEAD_DIM, out)
            m.ffn_norm = torch.nn.Parameter(torch.ones(DIM))
            m.w1, m.w3 = matrix(HIDDEN, DIM), matrix(HIDDEN, DIM)
            m.w2 = matrix(DIM, HIDDEN, out)
            self.layers.append(m)
        self.final_norm = torch.nn.Parameter(torch.ones(DIM))
        self.prime()

    @torch.no_grad()
    def prime(self):
        """
        Initialize with an induction circuit instead of training until one forms (Olsson et al.
        2022, arXiv 2209.11895). With a feature that is the same for all tokens the first layer's
        four heads attend 1, 2, 3 and 4 tokens back, each writing its output into a subspace of its
        own. In the second layer's first group the query is the tokens 1, 2, 3 back and the key the
        tokens 2, 3, 4 back of a candidate, in the low-frequency dims of RoPE; its value copies the
        candidate. All of it is trained afterwards like the other weights.
        """
        self.embed[:, 0] = 0.5
        level = 0.5 / math.sqrt(0.04 ** 2 + 0.5 ** 2 / DIM)  # of that feature after the norm
        m, n = self.layers[0], self.layers[1]
        freq = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        sharp = 12  # RoPE pairs whose frequency separates adjacent positions
        c = math.sqrt(8 * 4.0) / level
        m.w2.mul_(0.1)  # else its noise exceeds the heads' output
        m.wq.mul_(0.3)
        m.wk.mul_(0.3)
        for g in range(KV_HEADS):
            m.wk[g * HEAD_DIM:g * HEAD_DIM + 2 * sharp:2, 0] = c
        m.wv[:, 0] = 0  # the constant feature is not copied
        m.wv[HEAD_DIM:] = m.wv[:HEAD_DIM]
        space = torch.linalg.qr(torch.randn(DIM, DIM))[0]
        space[0] = 0
        for h in range(HEADS):
            # q rotated to align with k h + 1 positions back: angle(q) + p*f = angle(k) + (p-h-1)*f
            rows = m.wq[h * HEAD_DIM:(h + 1) * HEAD_DIM]
            angle = -(h + 1) * freq[:sharp]
            rows[0:2 * sharp:2, 0] = c * angle.cos()
            rows[1:2 * sharp:2, 0] = c * angle.sin()
            m.wo[:, h * HEAD_DIM:(h + 1) * HEAD_DIM] = \
                0.1 * space[:, h * HEAD_DIM:(h + 1) * HEAD_DIM]
        slow = HEAD_DIM // 2  # dims from here on rotate little over the context
        q = torch.zeros(HEAD_DIM, DIM)
        k = torch.zeros(HEAD_DIM, DIM)
        for j in range(3):
            p = torch.randn(HEAD_DIM - slow, HEAD_DIM) / HEAD_DIM ** 0.5
            q[slow:] += p @ space[:, j * HEAD_DIM:(j + 1) * HEAD_DIM].T
            k[slow:] += p @ space[:, (j + 1) * HEAD_DIM:(j + 2) * HEAD_DIM].T
        n.wq[:HEAD_DIM] = MATCH * q + 0.1 * n.wq[:HEAD_DIM]
        n.wq[HEAD_DIM:2 * HEAD_DIM] = MATCH * q + 0.1 * n.wq[HEAD_DIM:2 * HEAD_DIM]
        n.wk[:HEAD_DIM] = MATCH * k + 0.1 * n.wk[:HEAD_DIM]
        n.wo[:, :HEAD_DIM] = n.wv[:HEAD_DIM].T * COPY
        n.wo[:, HEAD_DIM:2 * HEAD_DIM] = n.wv[:HEAD_DIM].T * COPY

    @staticmethod
    def rope(x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def forward(self, ids, pos):
        """ids, pos: [B][T]; the logits in bfloat16."""
        B, T = ids.shape
        freq = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angle = (pos.float()[..., None] * freq)[:, None]
        cos, sin = angle.cos(), angle.sin()
        mask = torch.full((T, T), -torch.inf, dtype=torch.bfloat16).triu(1)
        x = F.embedding(ids, self.embed)
        for m in self.layers:
            h = norm(x, m.att_norm).bfloat16()
            q = linear(h, m.wq).view(B, T, HEADS, HEAD_DIM).transpose(1, 2).float()
            k = linear(h, m.wk).view(B, T, KV_HEADS, HEAD_DIM).transpose(1, 2).float()
            v = linear(h, m.wv).view(B, T, KV_HEADS, HEAD_DIM).transpose(1, 2)
            q = self.rope(q, cos, sin) * HEAD_DIM ** -0.5
            k = self.rope(k, cos, sin)
            # The heads of a group share K and V: fold them into the rows.
            group = HEADS // KV_HEADS
            q = q.bfloat16().view(B * KV_HEADS, group, T, HEAD_DIM)
            k = k.bfloat16().reshape(B * KV_HEADS, T, HEAD_DIM).transpose(1, 2)
            v = v.reshape(B * KV_HEADS, T, HEAD_DIM)
            parts = []
            for i in range(0, T, BLOCK):  # queries in blocks: no work far above the diagonal
                j = min(T, i + BLOCK)
                s = torch.bmm(q[:, :, i:j].reshape(-1, group * (j - i), HEAD_DIM), k[:, :, :j])
                s = (s.view(-1, j - i, j) + mask[i:j, :j]).softmax(-1)
                o = torch.bmm(s.view(-1, group * (j - i), j), v[:, :j])
                parts.append(o.view(B, HEADS, j - i, HEAD_DIM))
            o = torch.cat(parts, 2)
            o = o.transpose(1, 2).reshape(B, T, HEADS * HEAD_DIM)
            x = x + linear(o, m.wo).float()
            h = norm(x, m.ffn_norm).bfloat16()
            x = x + linear(F.silu(linear(h, m.w1)) * linear(h, m.w3), m.w2).float()
        return linear(norm(x, self.final_norm).bfloat16(), self.embed)

    def export(self, path):
        """Magic, llama2.c's seven integers, its weights in its order as f16, no RoPE tables."""
        names = ["att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"]
        parts = [self.embed] + [getattr(m, n) for n in names for m in self.layers]
        parts.append(self.final_norm)
        with open(path, "wb") as f:
            f.write(b"TLM1" + struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS,
                                          self.vocab, CONTEXT))
            for p in parts:
                f.write(p.detach().numpy().astype("<f2").tobytes())
        print(f"{path}: {os.path.getsize(path)} bytes")


# ---------------------------------------------------------------- data and scores


FACT = re.compile(r"The (\w+) of \w+ is [a-z ]*\w+\.")


def drill(stories, seed, n_words, rng):
    """
    A story's facts, few kinds at a time, said again and again in random order. Stories ask a
    fact once; here most sentences can be completed from memory, and the lookup is learned
    from that dense signal before it can be learned from stories.
    """
    text, _ = stories.make(seed, 2048)
    facts = [(m.group(1), m.group(0)) for m in FACT.finditer(text)]
    kinds = sorted({k for k, _ in facts})
    kinds = rng.choice(kinds, rng.integers(1, 4))
    facts = sorted({s for k, s in facts if k in kinds})
    rng.shuffle(facts)
    facts = facts[:max(3, n_words // 25)]
    out, pos, said, questions = [], 0, {}, []
    for _ in range(n_words // 8):
        s = facts[rng.integers(len(facts))]
        v, e = s.rindex(" "), len(s) - 1
        if s in said:
            questions.append((said[s] + v, pos + v, pos + e))
        said[s] = pos
        out.append(s)
        pos += len(s) + 1
    return " ".join(out), questions


def batch(stories, tok, seeds, T, rng=None, drills=0.0):
    ids = np.zeros((len(seeds), T + 1), dtype=np.int64)
    weight = np.zeros((len(seeds), T), dtype=np.float32)
    pos = np.tile(np.arange(T), (len(seeds), 1))
    questions = []
    for i, seed in enumerate(seeds):
        if rng is not None and rng.random() < drills:
            text, qs = drill(stories, seed, T, rng)
        else:
            text, qs = stories.make(seed, T)
        t, qs = tok.encode(text, qs)
        t = t[:T + 1]
        ids[i, :len(t)] = t
        weight[i, :len(t) - 1] = 1
        qs = [q for q in qs if q[2] <= len(t)]
        for _, b, e in qs:
            weight[i, b - 1:e - 1] = ANSWER_WEIGHT
        questions.append(qs)
        if rng is not None and T < CONTEXT and rng.random() < 0.5:
            jumps = rng.integers(1, 4)
            total = int((CONTEXT - T) * rng.random())
            for at in rng.integers(1, T, jumps):
                pos[i, at:] += total // jumps
    return (torch.from_numpy(ids), torch.from_numpy(weight), torch.from_numpy(pos), questions)


BINS = [(1, 128), (128, 512), (512, 1024), (1024, 2048)]


@torch.no_grad()
def evaluate(model, stories, tok, T, n):
    """Loss in nats a token, and recall by the distance from the stated value to the answer."""
    total = count = 0
    hit, seen = [0] * 4, [0] * 4
    for i in range(n):
        ids, w, pos, qs = batch(stories, tok, [HELD_OUT + i], T)
        logits = model(ids[:, :-1], pos).float()[0]
        live = w[0] > 0
        total += F.cross_entropy(logits[live], ids[0, 1:][live], reduction="sum").item()
        count += int(live.sum())
        top = logits.argmax(-1)
        for v, b, e in qs[0]:
            k = next(j for j, (lo, hi) in enumerate(BINS) if lo <= b - v < hi)
            seen[k] += 1
            hit[k] += bool((top[b - 1:e - 1] == ids[0, b:e]).all())
    recall = " ".join(f"{lo}-{hi - 1}: {100 * h / s:.1f}% of {s}" if s else f"{lo}-{hi - 1}: none"
                      for (lo, hi), h, s in zip(BINS, hit, seen))
    return total / count, recall


def bigram(stories, tok, n_train, n_test):
    counts = np.zeros((VOCAB, VOCAB))
    for seed in range(n_train):
        t = np.array(tok.encode(stories.make(seed, CONTEXT)[0])[0])
        np.add.at(counts, (t[:-1], t[1:]), 1)
    test = [np.array(tok.encode(stories.make(HELD_OUT + i, CONTEXT)[0])[0][:CONTEXT + 1])
            for i in range(n_test)]
    best = None
    for k in (0.001, 0.01, 0.1, 1.0):
        p = (counts + k) / (counts.sum(1, keepdims=True) + k * VOCAB)
        loss = float(np.concatenate([-np.log(p[t[:-1], t[1:]]) for t in test]).mean())
        best = min(best, (loss, k)) if best else (loss, k)
    return best


# ---------------------------------------------------------------- training


def train(args, stories, tok, model, state):
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), eps=1e-9)
    step, cpu, seed, tokens = 0, 0.0, 1_000_000, 0
    if state and "opt" in state:
        opt.load_state_dict(state["opt"])
        step, cpu, seed, tokens = state["step"], state["cpu"], state["seed"], state["tokens"]
        print(f"resumed at step {step}, {cpu:.0f} CPU s", flush=True)
    rng = np.random.default_rng(step)
    last, saved, shown = time.process_time(), cpu, time.process_time()
    losses = []

    def save():
        path = os.path.join(args.work, "checkpoint.pt")
        torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step,
                    "cpu": cpu, "seed": seed, "tokens": tokens,
                    "tokenizer": (tok.n_chars, tok.tokens)}, path + ".tmp")
        os.replace(path + ".tmp", path)

    while cpu < args.budget:
        part = cpu / args.budget
        _, T, B, drills = next(p for p in PHASES if part < p[0])
        lr = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS)
        lr *= 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * part))
        for g in opt.param_groups:
            g["lr"] = lr
        ids, w, pos, _ = batch(stories, tok, range(seed, seed + B), T, rng, drills)
        seed += B
        logits = model(ids[:, :-1], pos)
        ce = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        w = w.flatten()
        loss = (ce * w).sum() / w.sum()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append((float((ce.detach() * (w > 0)).sum() / (w > 0).sum()),
                       float((ce.detach() * (w > 1)).sum() / max(1, int((w > 1).sum())))))
        tokens += int((w > 0).sum())
        step += 1
        now = time.process_time()
        cpu += now - last
        last = now
        if step % 50 == 0:
            a = np.mean(losses, 0)
            losses = []
            print(f"step {step} T {T} cpu {cpu:.0f} s {tokens / 1e6:.2f} M tokens "
                  f"lr {lr:.2e} loss {a[0]:.3f} answers {a[1]:.3f}", flush=True)
        if cpu - saved > args.save_every:
            saved = cpu
            save()
            print(f"  held out at {T}: loss %.3f, recall %s" %
                  evaluate(model, stories, tok, T, max(2, 16384 // T)), flush=True)
            if T != CONTEXT:
                print(f"  held out at {CONTEXT}: loss %.3f, recall %s" %
                      evaluate(model, stories, tok, CONTEXT, 3), flush=True)
    save()
    print(f"done: {step} steps, {tokens} tokens, {cpu:.0f} CPU s")


def main():
    ap = argparse.ArgumentParser(description="train, evaluate and export tinylm")
    ap.add_argument("--work", default="/tmp/tinylm-train", help="checkpoints and helpers")
    ap.add_argument("--budget", type=float, default=1300, help="CPU seconds of training")
    ap.add_argument("--save-every", type=float, default=120, help="CPU seconds")
    ap.add_argument("--export", action="store_true")
    ap.add_argument("--evaluate", action="store_true")
    ap.add_argument("--out", default=HERE, help="where --export writes")
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    os.makedirs(args.work, exist_ok=True)
    stories = Stories(args.work)
    path = os.path.join(args.work, "checkpoint.pt")
    state = torch.load(path) if os.path.exists(path) else None
    if state is None and (args.export or args.evaluate):
        sys.exit(f"no checkpoint in {args.work}")
    tok = Tokenizer(*(state["tokenizer"] if state else train_tokenizer(stories)))
    model = Model(VOCAB)
    if state:
        model.load_state_dict(state["model"])
    if args.export:
        model.export(os.path.join(args.out, "tinylm.f16.bin"))
        tok.save(os.path.join(args.out, "tokenizer.bin"))
    elif args.evaluate:
        print("bigram: held-out loss %.4f with k = %g" % bigram(stories, tok, 1500, 50))
        print("model:  held-out loss %.4f, recall %s" %
              evaluate(model, stories, tok, CONTEXT, 50))
    else:
        print("%d parameters" % sum(p.numel() for p in model.parameters()), flush=True)
        print("bigram: held-out loss %.4f with k = %g" % bigram(stories, tok, 300, 20), flush=True)
        train(args, stories, tok, model, state)


if __name__ == "__main__":
    main()
