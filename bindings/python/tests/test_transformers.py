"""TransformersCache under a small PyTorch model, beside a cache that concatenates."""

import inspect
import sys
import types
import unittest
from unittest import mock

import kvtile
from support import group, needs_torch, torch

if torch:
    from torch import nn
    from kvtile.transformers import TransformersCache, groups_of_config

    torch.set_num_threads(1)

    class Concatenating:
        """What transformers' DynamicCache does: the reference."""

        def __init__(self):
            self.kv = {}

        def update(self, k, v, layer, cache_kwargs=None):
            if layer in self.kv:
                k, v = (torch.cat([a, b], -2) for a, b in zip(self.kv[layer], (k, v)))
            self.kv[layer] = k, v
            return k, v

        def get_seq_length(self, layer=0):
            return self.kv[layer][0].shape[-2] if layer in self.kv else 0

        def map(self, f):
            self.kv = {i: tuple(f(x) for x in kv) for i, kv in self.kv.items()}

    class Attention(nn.Module):
        """GQA with rotary embedding of halves, in the manner of transformers' models."""

        def __init__(self, layer_idx, dim, heads, kv_heads, window=0):
            super().__init__()
            self.layer_idx, self.heads, self.kv_heads = layer_idx, heads, kv_heads
            self.d, self.window = dim // heads, window
            self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.d, bias=False)
            self.out = nn.Linear(dim, dim, bias=False)

        def rope(self, x, first):
            half = self.d // 2
            f = 10000 ** (-torch.arange(half, dtype=torch.float32) / half)
            angle = torch.arange(first, first + x.shape[2], dtype=torch.float32)[:, None] * f
            cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angle.cos(), angle.sin()))
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

        def forward(self, x, cache, mask, attention):
            b, n, _ = x.shape
            first = cache.get_seq_length(self.layer_idx)
            q, k, v = self.qkv(x).view(b, n, -1, self.d).transpose(1, 2).split(
                [self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = self.rope(q, first), self.rope(k, first)
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": torch.arange(n) + first})
            out, _ = attention(self, q, k, v, mask, scaling=self.d ** -0.5, dropout=0.0)
            return self.out(out.reshape(b, n, -1))

    def eager(module, q, k, v, mask, scaling, dropout=0.0, **kwargs):
        """Causal attention over all of K and V; mask: bool [b][1][n][t], replaces the rule."""
        n, t = q.shape[2], k.shape[2]
        if mask is None:
            i, j = torch.arange(n)[:, None] + t - n, torch.arange(t)
            mask = j <= i
            if module.window:
                mask = mask & (i - j < module.window)
        k, v = (x.repeat_interleave(module.heads // module.kv_heads, 1) for x in (k, v))
        w = torch.where(mask, q @ k.transpose(2, 3) * scaling, torch.tensor(-torch.inf))
        return (w.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2), None

    class Model(nn.Module):
        def __init__(self, n_layers=2, dim=128, heads=4, kv_heads=2, windows=(0, 0)):
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.ModuleList(Attention(i, dim, heads, kv_heads, windows[i])
                                        for i in range(n_layers))

        @torch.no_grad()
        def forward(self, x, cache, mask=None, attention=eager):
            for layer in self.layers:
                x = x + layer(torch.nn.functional.layer_norm(x, x.shape[-1:]), cache, mask,
                              attention)
            return x


def small(**options):
    return group(n_q_heads=4, n_kv_heads=2, k_dim=32, **options)


@needs_torch
class Transformers(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(2)
        self.model = Model()
        self.made = []

    def tearDown(self):
        for c in self.made:
            c.close()

    def make(self, *args, **kwargs):
        cache = TransformersCache(*args, **kwargs)
        self.made.append(cache)
        return cache

    def run_both(self, cache, steps, attention=None, reference=None, tolerance=2e-5):
        reference = reference or Concatenating()
        for x in steps:
            expected = self.model(x, reference)
            out = self.model(x, cache, attention=attention or eager)
            self.assertLess((out - expected).abs().max().item(), tolerance)
        return reference

    def steps(self, batch=2, sizes=(70, 1, 1, 5, 1)):
        return [torch.randn(batch, n, 128) for n in sizes]

    def test_update(self):
        """update() returns all keys and values: as the concatenating cache, at f32 bit for bit."""
        cache, reference = self.make(small(), 200), Concatenating()
        self.run_both(cache, self.steps(), reference=reference)
        for layer in range(2):
            for ours, theirs in zip(cache[layer], reference.kv[layer]):
                self.assertTrue(torch.equal(ours, theirs))
        self.assertEqual((cache.get_seq_length(), len(cache), cache.max_batch_size), (78, 2, 2))
        self.assertEqual(cache.get_mask_sizes(torch.arange(3), 0), (81, 0))
        self.assertEqual((cache.get_max_cache_shape(), cache.is_sliding), (200, [False, False]))
        self.assertEqual(len(cache.to_legacy_cache()), 2)

    def test_in_place(self):
        """attention() in the cache: the same numbers, and update() passes its arguments on."""
        cache = self.make(small(), 200, in_place=True)
        self.run_both(cache, self.steps(), cache.attention)
        k = torch.randn(2, 2, 1, 32)
        self.assertEqual(cache.update(k, k, 0)[0].data_ptr(), k.data_ptr())
        cache.abort()

    def test_quantized(self):
        """i8: close to f32, in a third of the memory; in place and dequantized agree."""
        memory = {}
        for kind in ("f32", "i8"):
            for in_place in (False, True):
                cache = self.make(small(k_type=kind, v_type=kind), 3000, in_place=in_place)
                torch.manual_seed(2)
                self.run_both(cache, self.steps(1, (1200, 1, 1)),
                              cache.attention if in_place else None, tolerance=0.05)
            memory[kind] = cache.sequences[0].memory_bytes
        self.assertLess(memory["i8"], memory["f32"] / 3)

    def test_half_types(self):
        for dtype in (torch.bfloat16, torch.float16):
            cache = self.make(small(), 100, in_place=True)
            k, v = torch.randn(2, 1, 2, 9, 32).to(dtype)
            q = torch.randn(1, 4, 9, 32).to(dtype)
            for layer in range(2):
                cache.update(k, v, layer)
            out = cache.attend(q, 0)
            self.assertEqual((out.dtype, out.shape), (dtype, (1, 9, 4, 32)))
            module = types.SimpleNamespace(heads=4, kv_heads=2, window=0)
            expected, _ = eager(module, *(x.float() for x in (q, k, v)), None, 32 ** -0.5)
            self.assertLess((out.float() - expected).abs().max().item(), 0.02)
            self.assertTrue(torch.equal(cache[1][0], k.float()))

    def test_beams(self):
        """reorder, repeat, select: the rows' contents, with shared blocks."""
        for in_place in (False, True):
            cache = self.make(small(), 400, in_place=in_place)
            attention = cache.attention if in_place else None
            reference = self.run_both(cache, self.steps(2, (130, 1)), attention)
            for ours, theirs, rows in (
                (lambda: cache.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0), 4),
                (lambda: cache.reorder_cache(torch.tensor([3, 3, 0, 1])),
                 lambda x: x[[3, 3, 0, 1]], 4),
                (lambda: cache.batch_select_indices(torch.tensor([True, False, True, True])),
                 lambda x: x[[0, 2, 3]], 3),
            ):
                ours()
                reference.map(theirs)
                self.run_both(cache, self.steps(rows, (1, 1)), attention, reference=reference)
            self.assertGreater(cache.cache.stats().blocks_shared, 0)

    def test_crop(self):
        for length in (50, -20, 0, 1000):
            cache = self.make(small(), 200)
            reference = self.run_both(cache, self.steps(2, (70, 1)))
            cache.crop(length)
            end = {50: 50, -20: 51, 0: 0, 1000: 71}[length]
            self.assertEqual(cache.get_seq_length(), end)
            reference.map(lambda x: x[..., :end, :])
            self.run_both(cache, self.steps(2, (3, 1)), reference=reference)
        cache.reset()
        self.assertEqual((cache.get_seq_length(), cache.cache.stats().blocks_used), (0, 0))
        self.run_both(cache, self.steps(3, (3, 1)))

    def test_masks(self):
        """Left padding, as bool and as an additive mask; another bias is refused."""
        padding = [0, 5]

        def mask(t):
            j = torch.arange(t)
            rows = []
            for p in padding:
                i = torch.arange(t)[:, None]
                rows.append((j <= i) & ((j >= p) | (i < p)))
            return torch.stack(rows)[:, None]

        def last_rows(n):
            return lambda t: mask(t)[:, :, -n:]

        for additive in (False, True):
            cache, reference = self.make(small(), 200, in_place=True), Concatenating()
            for x in self.steps(2, (20, 1, 3)):
                make = last_rows(x.shape[1])

                def attend(module, q, k, v, m, **kw):
                    if additive:
                        m = torch.where(m, 0.0, torch.finfo(torch.float32).min)
                    return cache.attention(module, q, k, v, m, **kw)

                expected = self.model(x, reference, make(reference.get_seq_length() + x.shape[1]))
                out = self.model(x, cache, make(cache.get_seq_length() + x.shape[1]), attend)
                self.assertLess((out - expected).abs().max().item(), 2e-5)
        q = torch.randn(2, 4, 1, 32)
        with self.assertRaisesRegex(ValueError, "a bias other than"):
            cache.attend(q, 0, attention_mask=torch.full((2, 1, 1, 24), 0.5))
        with self.assertRaisesRegex(ValueError, "tokens, the layer has 24"):
            cache.attend(q, 0, attention_mask=torch.ones((2, 1, 1, 20), dtype=torch.bool))
        with self.assertRaisesRegex(ValueError, "dropout"):
            cache.attention(None, q, None, None, dropout=0.1)

    def test_sliding(self):
        """A sliding layer returns what its window needs, or attends to it."""
        config = types.SimpleNamespace(
            num_attention_heads=4, num_key_value_heads=2, hidden_size=128, num_hidden_layers=2,
            sliding_window=16, layer_types=["sliding_attention", "full_attention"])
        groups = groups_of_config(config, "f32", "f32")
        self.assertEqual([(g.layers, g.window_tokens, g.k_dim) for g in groups],
                         [((1,), 0, 32), ((0,), 16, 32)])
        self.model = Model(windows=(16, 0))
        for in_place in (False, True):
            cache = TransformersCache.of_config(config, 1000, "f32", "f32", in_place=in_place)
            self.made.append(cache)
            self.run_both(cache, self.steps(2, (300, 1, 7, 1)),
                          cache.attention if in_place else None)
            self.assertEqual(cache.is_sliding, [True, False])
            self.assertEqual(cache.get_max_cache_shape(0), 16)
            self.assertEqual(cache.get_mask_sizes(torch.arange(2), 0), (17, 294))
            self.assertEqual(cache.get_mask_sizes(torch.arange(2), 1), (311, 0))
            self.assertEqual(cache[0][0].shape[2], 15)
            with self.assertRaises(kvtile.StateError):
                cache.crop(20)
            self.assertEqual(cache.get_seq_length(), 309)

    def test_sliding_masks(self):
        """Masks of the sizes that get_mask_sizes tells before a pass, as transformers makes them."""
        self.model = Model(windows=(16, 0))
        groups = [small(n_layers=1, layers=(0,), window_tokens=16), small(n_layers=1, layers=(1,))]
        for in_place in (False, True):
            cache, reference = self.make(groups, 1000, in_place=in_place), Concatenating()
            for x in self.steps(2, (100, 1, 7, 1)):
                n, first, masks = x.shape[1], cache.get_seq_length(), []
                for layer, window in enumerate((16, 1000)):
                    length, offset = cache.get_mask_sizes(torch.arange(n), layer)
                    i, j = torch.arange(first, first + n)[:, None], torch.arange(length) + offset
                    masks.append(((j <= i) & (i - j < window))[None, None].expand(2, 1, -1, -1))

                def attend(module, q, k, v, mask, **kwargs):
                    function = cache.attention if in_place else eager
                    return function(module, q, k, v, masks[module.layer_idx], **kwargs)

                expected = self.model(x, reference)
                out = self.model(x, cache, attention=attend)
                self.assertLess((out - expected).abs().max().item(), 2e-5)

    def test_failed_pass(self):
        """A pass that ends early, or whose numbers cannot be stored, loses nothing."""
        cache = self.make(small(), 100)
        reference = self.run_both(cache, self.steps(2, (10,)))
        k = torch.randn(2, 2, 1, 32)
        bad = k.clone()
        bad[1, 0, 0, 0] = torch.nan
        cache.update(k, k, 0)
        with self.assertRaisesRegex(kvtile.StateError, "1 of 2 layers"):
            cache.crop(5)
        cache.abort()
        with self.assertRaises(kvtile.NumberError):
            cache.update(bad, bad, 0)
        with self.assertRaisesRegex(ValueError, "a batch of 3"):
            cache.update(torch.randn(3, 2, 1, 32), torch.randn(3, 2, 1, 32), 0)
        with self.assertRaises(kvtile.FullError):
            cache.update(torch.randn(2, 2, 91, 32), torch.randn(2, 2, 91, 32), 0)
        self.run_both(cache, self.steps(2, (1, 2)), reference=reference)
        empty = self.make(small(), 100)
        with self.assertRaises(kvtile.FullError):
            empty.update(torch.randn(2, 2, 101, 32), torch.randn(2, 2, 101, 32), 0)
        with self.assertRaises(kvtile.NumberError):
            empty.update(bad, bad, 0)
        self.assertEqual(empty.max_batch_size, 0)
        self.run_both(empty, self.steps(3, (1, 2)))

    def test_a_row_that_fails(self):
        """A commit that fails in one row is taken up again, or dropped in all of them."""
        true_commit, true_truncate = kvtile.Sequence.commit, kvtile.Sequence.truncate

        def fails_in(cache, row, call):
            def made(s, *arguments):
                if s is cache.sequences[row]:
                    raise kvtile.BusyError("in use")
                return call(s, *arguments)
            return made

        for again in (True, False):
            cache = self.make(small(), 100)
            self.run_both(cache, self.steps(2, (5, 1)))
            k = torch.randn(2, 2, 3, 32)
            for layer in range(2):
                cache.update(k, k, layer)
            with mock.patch.object(kvtile.Sequence, "commit", fails_in(cache, 1, true_commit)), \
                    self.assertRaises(kvtile.BusyError):
                cache.settle()
            if again:
                cache.settle()
            else:
                cache.abort()
            self.assertEqual([s.length for s in cache.sequences], [9, 9] if again else [6, 6])
            with mock.patch.object(kvtile.Sequence, "truncate",
                                   fails_in(cache, 1, true_truncate)), \
                    self.assertRaises(kvtile.BusyError):
                cache.crop(4)
            with self.assertRaisesRegex(kvtile.StateError, "rows of different lengths"):
                cache.update(k, k, 0)
            cache.crop(4)
            self.assertEqual([s.length for s in cache.sequences], [4, 4])

    def test_options_of_attend(self):
        """The same for one query and for several; what has no place in the result is refused."""
        cache = self.make(small(window_tokens=8), 100, in_place=True)
        self.run_steps(cache, 2, 20)
        q = torch.randn(2, 4, 3, 32)
        positions = [[17, 18, 30], [19, 18, 17]]
        many = cache.attend(q, 0, query_positions=positions, softcap=5.0)
        for i in range(3):
            one = cache.attend(q[:, :, i:i + 1], 0, query_positions=[[p[i]] for p in positions],
                               causal=False, softcap=5.0)
            row = cache.attend(q[:, :, i:i + 1], 0, query_positions=[None, [positions[1][i]]],
                               causal=False, softcap=5.0)
            self.assertTrue(torch.equal(one[1], row[1]))
            if i == 2:  # the last query sees what a query alone sees
                self.assertTrue(torch.equal(one[:, 0], many[:, 2]))
        with self.assertRaisesRegex(ValueError, "query_positions: 1 for 2 rows"):
            cache.attend(q, 0, query_positions=[[1, 2, 3]])
        for n in (1, 3):
            with self.assertRaisesRegex(TypeError, "attend: lse"):
                cache.attend(q[:, :, :n], 0, lse=True)

    def run_steps(self, cache, n_rows, n):
        k = torch.randn(n_rows, 2, n, 32)
        for layer in range(cache.cache.n_layers):
            cache.update(k, k, layer)
        cache.settle()

    def test_sinks_and_windows_of_models(self):
        """The heads' sinks (s_aux) are applied; a window that the group lacks is refused."""
        cache = self.make(small(), 100, in_place=True)
        self.run_steps(cache, 1, 20)
        q, module = torch.randn(1, 4, 3, 32), types.SimpleNamespace(layer_idx=1)
        plain = cache.attention(module, q, None, None)[0]
        sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.bfloat16))
        out = cache.attention(module, q, None, None, s_aux=sinks, sliding_window=None)[0]
        logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
        self.assertTrue(torch.equal(out, cache.attend(q, 1, sink_logits=logits)))
        self.assertGreater((out - plain).abs().max().item(), 1e-3)
        with self.assertRaisesRegex(ValueError, "layer 1 has a window of 8 tokens, its group in "
                                                "the cache none"):
            cache.attention(module, q, None, None, sliding_window=8)
        windowed = self.make(small(window_tokens=8), 100, in_place=True)
        self.run_steps(windowed, 1, 20)
        windowed.attention(module, q, None, None, sliding_window=8)
        with self.assertRaisesRegex(ValueError, "of 16 tokens, its group in the cache 8"):
            windowed.attention(module, q, None, None, sliding_window=16)

    def test_register(self):
        """Attention and masks under one name, and no masks where they say nothing."""
        made, registered = [], {}

        class Interface:
            def __init__(self, kind):
                self.kind = kind

            def register(self, name, function):
                registered[self.kind, name] = function

        def sdpa_mask(**arguments):
            made.append(arguments)
            return "a mask"

        masking = types.ModuleType("transformers.masking_utils")
        masking.AttentionMaskInterface, masking.sdpa_mask = Interface("mask"), sdpa_mask
        package = types.ModuleType("transformers")
        package.AttentionInterface, package.masking_utils = Interface("attention"), masking
        cache = self.make(small(), 100, in_place=True)
        with mock.patch.dict(sys.modules, {"transformers": package,
                                           "transformers.masking_utils": masking}):
            self.assertEqual(cache.register(), "kvtile")
            self.assertEqual(registered["attention", "kvtile"], cache.attention)
            mask = registered["mask", "kvtile"]
            sound, padded = torch.ones(2, 5), torch.tensor([[0, 1, 1], [1, 1, 1]])
            self.assertIsNone(mask(batch_size=2, attention_mask=None))
            self.assertIsNone(mask(batch_size=2, attention_mask=sound))
            self.assertEqual(made, [])
            self.assertEqual(mask(batch_size=2, attention_mask=padded, dtype=1), "a mask")
            self.assertEqual(mask(batch_size=2, allow_is_causal_skip=False), "a mask")
        self.assertEqual([m["allow_is_causal_skip"] for m in made], [False, False])
        self.assertIs(made[0]["attention_mask"], padded)
        self.assertEqual((made[0]["batch_size"], made[0]["dtype"]), (2, 1))

    def test_interface(self):
        """The names and first parameters that transformers' Cache documents."""
        expected = {
            "update": ["key_states", "value_states", "layer_idx", "cache_kwargs"],
            "get_seq_length": ["layer_idx"], "get_max_cache_shape": ["layer_idx"],
            "get_mask_sizes": ["cache_position", "layer_idx"], "crop": ["max_length"],
            "reorder_cache": ["beam_idx"], "batch_repeat_interleave": ["repeats"],
            "batch_select_indices": ["indices"], "reset": [],
        }
        for name, parameters in expected.items():
            found = list(inspect.signature(getattr(TransformersCache, name)).parameters)[1:]
            self.assertEqual(found, parameters, name)
        cache = self.make(small(), 100)
        self.assertEqual((cache.max_cache_len, cache.is_compileable, cache.is_initialized,
                          cache.max_batch_size, cache.layers), (100, False, False, 0, []))
        self.assertTrue(cache)


if __name__ == "__main__":
    unittest.main()
