"""The binding against C: the structs' layout, and the same bits."""

import ctypes
import itertools
import os
import subprocess
import tempfile
import unittest

import numpy as np

import kvtile
from kvtile import _lib
from support import REFERENCE, attention, fill, group, random

STEPS = (1, 70, 1, 1, 150, 3, 64)  # of reference.c


@unittest.skipUnless(REFERENCE, "KVTILE_REFERENCE is not set")
class Reference(unittest.TestCase):
    def test_layout(self):
        text = subprocess.run([REFERENCE, "layout"], check=True, capture_output=True, text=True)
        found = {}
        for line in text.stdout.splitlines():
            struct, field, offset, size = line.split()
            found.setdefault(struct, {})[field] = (int(offset), int(size))
        self.assertEqual(set(found), set(_lib.STRUCTS))
        for name, cls in _lib.STRUCTS.items():
            ours = {"-": (0, ctypes.sizeof(cls))}
            for field in cls._fields_:
                d = getattr(cls, field[0])
                ours[field[0]] = (d.offset, d.size)
            self.assertEqual(ours, found[name], name)

    def run_case(self, k_type, v_type, dtype):
        rng = np.random.default_rng(7)
        steps, raw = [], b""
        for n in STEPS:
            for _ in range(2):
                arrays = []
                for heads in (2, 2, 8):
                    a = rng.standard_normal((n, heads, 64), dtype=np.float32)
                    if dtype == "f16":
                        a = a.astype(np.float16)
                    elif dtype == "bf16":
                        a = kvtile.BFloat16((a.view(np.uint32) >> 16).astype(np.uint16))
                    arrays.append(a)
                    raw += (a.array if dtype == "bf16" else a).tobytes()
                steps.append(arrays)
        ours = b""
        with tempfile.TemporaryDirectory() as folder:
            names = [os.path.join(folder, x) for x in ("in", "out", "c.kvt", "python.kvt")]
            with open(names[0], "wb") as f:
                f.write(raw)
            subprocess.run([REFERENCE, "run", str(int(kvtile.Type[k_type])),
                            str(int(kvtile.Type[v_type])), str(("f32", "f16", "bf16").index(dtype)),
                            *names[:3]], check=True)
            g = group(k_type=k_type.lower(), v_type=v_type)
            with kvtile.Cache(g, 1000, fingerprint=b"reference") as cache, \
                    cache.sequence() as seq:
                for i, n in enumerate(STEPS):
                    with seq.step(n, range(seq.length, seq.length + n)) as step:
                        for layer in range(2):
                            k, v, q = steps[2 * i + layer]
                            step.append(layer, k, v)
                            out, lse = step.attend(layer, q, np.empty((n, 8, 64), np.float32),
                                                   lse=True)
                            ours += out.tobytes() + lse.tobytes()
                for layer in range(2):
                    ours += seq.keys(layer).tobytes() + seq.values(layer).tobytes()
                seq.save(names[3])
                self.assertEqual(seq.save_bytes(), open(names[3], "rb").read())
            with open(names[1], "rb") as f:
                self.assertEqual(f.read(), ours)
            with open(names[2], "rb") as a, open(names[3], "rb") as b:
                self.assertEqual(a.read(), b.read())

    def test_same_bits(self):
        types = list(itertools.product(("F32", "F16", "I8", "I4"),
                                       ("F32", "F16", "I8", "I4", "I5")))
        for i, (k_type, v_type) in enumerate(types):
            with self.subTest(k=k_type, v=v_type):
                self.run_case(k_type, v_type, ("f32", "f16", "bf16")[i % 3])


class Numbers(unittest.TestCase):
    """Against attention in f64: that arguments reach the library at all."""

    def setUp(self):
        self.cache = kvtile.Cache(group(), 1000)
        self.seq = self.cache.sequence()
        self.data = fill(self.seq, 100)
        self.q = random((5, 8, 64), 9)

    def tearDown(self):
        self.cache.close()

    def close_to(self, out, expected):
        np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)

    def test_causal_and_lse(self):
        k, v = self.data[1]
        expected, expected_lse = attention(self.q, k, v)
        out, lse = self.seq.attend(1, self.q, lse=True)
        self.close_to(out, expected)
        self.close_to(lse, expected_lse)
        given = np.empty((5, 8), np.float32)
        self.assertIs(self.seq.attend(1, self.q, lse=given)[1], given)
        self.assertEqual(given.tobytes(), lse.tobytes())
        everything, _ = attention(self.q, k, v, visible=np.ones((5, 100), bool))
        self.close_to(self.seq.attend(1, self.q, causal=False), everything)

    def test_scale_mask_softcap_sinks(self):
        k, v = self.data[0]
        self.close_to(self.seq.attend(0, self.q, scale=0.3), attention(self.q, k, v, 0.3)[0])
        mask = np.random.default_rng(3).random((5, 37)) < 0.5
        visible = np.concatenate([np.ones((5, 63), bool), mask], 1)
        self.close_to(self.seq.attend(0, self.q, mask=mask),
                      attention(self.q, k, v, visible=visible)[0])
        plain = self.seq.attend(0, self.q)
        self.assertGreater(abs(self.seq.attend(0, self.q, softcap=0.1) - plain).max(), 1e-3)
        sink = self.seq.attend(0, self.q, sink_logits=[100.0] * 8)
        self.assertLess(abs(sink).max(), 1e-6)

    def test_alibi_and_positions(self):
        k, v = self.data[0]
        out = self.seq.attend(0, self.q, alibi_slopes=[1000 / 1000] * 8, causal=False,
                              query_positions=[0] * 5)
        logits = np.einsum("nhd,thd->nht", self.q, np.repeat(k, 4, 1)) / 8 - np.arange(100)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        self.close_to(out, np.einsum("nht,thd->nhd", e / e.sum(-1, keepdims=True),
                                     np.repeat(v, 4, 1)))

    def test_precision(self):
        g = group(k_type="i8", v_type="i8", residual_tokens=kvtile.RESIDUAL_NONE)
        with kvtile.Cache(g, 1000) as cache, cache.sequence() as seq:
            k, v = fill(seq, 128)[0]
            exact, _ = attention(self.q, seq.keys(0), seq.values(0))
            error = {p: abs(seq.attend(0, self.q, precision=p) - exact).max()
                     for p in kvtile.Precision}
        self.assertLess(error[kvtile.Precision.F32], error[kvtile.Precision.FAST])
        self.assertLess(error[kvtile.Precision.F32], 1e-4)

    def test_batch(self):
        """Sequences in one call: as each alone, bit for bit; masks and counts of their own."""
        other = self.cache.sequence()
        fill(other, 70, 5)
        seqs = [self.seq, self.seq.fork(), other]
        mask = np.random.default_rng(3).random((2, 9)) < 0.5
        out, lse = self.cache.attend(0, seqs, self.q, n_queries=[1, 2, 2], masks=[None, mask, None],
                                     lse=True)
        alone = [seqs[0].attend(0, self.q[:1], lse=True),
                 seqs[1].attend(0, self.q[1:3], mask=mask, lse=True),
                 seqs[2].attend(0, self.q[3:], lse=True)]
        self.assertEqual(out.tobytes(), np.concatenate([a for a, _ in alone]).tobytes())
        self.assertEqual(lse.tobytes(), np.concatenate([b for _, b in alone]).tobytes())
        many = [s.fork() for s in (self.seq,) * 100]
        q = random((100, 8, 64), 4)
        out = self.cache.attend(0, many, q)
        self.assertEqual(out[77].tobytes(), self.seq.attend(0, q[77]).tobytes())

    def test_latent(self):
        g = kvtile.Group(1, 4, 1, 64, 32, "f32", "f32", kvtile.GroupFlag.V_IN_K)
        with kvtile.Cache(g, 100) as cache, cache.sequence() as seq:
            k = random((10, 1, 64))
            with seq.step(10) as step:
                step.append(0, k)
            q = random((2, 4, 64), 1)
            self.close_to(seq.attend(0, q), attention(q, k, k)[0][..., :32])
            self.assertEqual(seq.values(0).tobytes(), k[..., :32].tobytes())
            seq.begin(1)
            with self.assertRaises(kvtile.ArgError):
                seq.append(0, k[:1], k[:1, :, :32])

    def test_window(self):
        g = [group(n_layers=1), group(n_layers=1, window_tokens=16, sink_tokens=2)]
        with kvtile.Cache(g, 1000) as cache, cache.sequence() as seq:
            data = fill(seq, 100)
            k, v = data[1]
            p = np.arange(100)
            visible = (p <= np.arange(95, 100)[:, None]) & \
                ((np.arange(95, 100)[:, None] - p < 16) | (p < 2))
            self.close_to(seq.attend(1, self.q), attention(self.q, k, v, visible=visible)[0])
            self.close_to(seq.attend(0, self.q), attention(self.q, *data[0])[0])


if __name__ == "__main__":
    unittest.main()
