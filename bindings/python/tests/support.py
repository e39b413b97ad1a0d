"""Shared by the tests: random steps, and attention in f64."""

import os
import unittest

import numpy as np

import kvtile

try:
    import torch
except ImportError:
    torch = None

needs_torch = unittest.skipUnless(torch, "PyTorch is not installed")
REFERENCE = os.environ.get("KVTILE_REFERENCE")  # tests/reference.c, built


def group(**options):
    kw = dict(n_layers=2, n_q_heads=8, n_kv_heads=2, k_dim=64, k_type="f32", v_type="f32")
    kw.update(options)
    return kvtile.Group(**kw)


def random(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


def fill(seq, n, seed=0, ids=True):
    """Append n random tokens to all layers in one step; returns K and V, [layer][2][n][h][d]."""
    g = seq.cache.groups[0]
    data = random((seq.cache.n_layers, 2, n, g.n_kv_heads, g.k_dim), seed)
    first = seq.length
    with seq.step(n, range(first, first + n) if ids else None) as step:
        for layer in range(seq.cache.n_layers):
            step.append(layer, *data[layer])
    return data


def has_keys():
    """Whether the library has the keys of stores, SHA-256: libsodium."""
    with kvtile.Cache(group(), 100) as cache, cache.sequence() as seq:
        try:
            seq.prefix_put(kvtile.Store.mapping({}))
        except kvtile.UnsupportedError:
            return False
    return True


def attention(q, k, v, scale=None, visible=None):
    """[n][h][d] over [t][kv][d] in f64; visible: bool [n][t]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    size = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, size, 1), np.repeat(v, size, 1)
    logits = np.einsum("nhd,thd->nht", q, k) * (scale or q.shape[2] ** -0.5)
    if visible is None:
        n, t = q.shape[0], k.shape[0]
        visible = np.arange(t) <= np.arange(n)[:, None] + t - n
    logits = np.where(visible[:, None, :], logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    e = np.exp(logits - top)
    total = e.sum(-1, keepdims=True)
    return np.einsum("nht,thd->nhd", e / total, v), (np.log(total) + top)[..., 0]
