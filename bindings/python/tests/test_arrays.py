"""Arrays in and out: nothing is copied, and what does not fit is refused by name."""

import array
import ctypes
import gc
import sys
import unittest

import numpy as np

import kvtile
from kvtile import _attend, _lib, _sequence, _tensor
from support import fill, group, needs_torch, random, torch


class Spy:
    """Stands for the library's append and attend, and notes the addresses that they get."""

    def __enter__(self):
        self.saved = _sequence._append, _attend._attend
        self.seen = []

        def append(seq, layer, k, v):
            self.seen.append(_lib.Tensor.from_address(k).data)
            self.seen.append(_lib.Tensor.from_address(v).data)
            return self.saved[0](seq, layer, k, v)

        def attend(cache, args):
            a = _lib.AttendArgs.from_address(args)
            self.seen += [a.q.data, a.out.data]
            return self.saved[1](cache, args)

        _sequence._append, _attend._attend = append, attend
        return self.seen

    def __exit__(self, *_):
        _sequence._append, _attend._attend = self.saved


class DLPackOnly:
    """A tensor of another library: nothing but DLPack."""

    def __init__(self, tensor, device=(1, 0)):
        self.tensor, self.device = tensor, device

    def __dlpack__(self, stream=None):
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return self.device


class Versioned:
    """A tensor of another library, which says whether it may be written."""

    def __init__(self, array, flags=0, major=1):
        self.array = array  # kept
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.head = _tensor._DLVersioned(major=major, flags=flags, tensor=_tensor._DLTensor(
            data=array.ctypes.data, device_type=1, ndim=array.ndim, code=2, bits=32, lanes=1,
            shape=self.shape))

    def __dlpack__(self, stream=None, max_version=None):
        if max_version is None:
            raise BufferError("only with versions")
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.head), b"dltensor_versioned", None)

    def __dlpack_device__(self):
        return (1, 0)


class ReadOnly(bytes):
    """Of a library whose arrays never change: the buffer tells, DLPack does not."""

    def __dlpack__(self, stream=None):
        return np.zeros((1, 8, 64), np.float32).__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)


class Interface:
    """An array of another library: nothing but __array_interface__."""

    def __init__(self, array, **changed):
        self.array = array  # kept
        self.__array_interface__ = {"shape": array.shape, "typestr": "<f4", "version": 3, **changed}


class Base(unittest.TestCase):
    def setUp(self):
        self.cache = kvtile.Cache(group(n_layers=1), 4096)
        self.seq = self.cache.sequence()
        self.k, self.v = random((2, 10, 2, 64))
        self.q = random((10, 8, 64), 1)
        self.expected = self.through(self.k, self.v, self.q)

    def tearDown(self):
        self.cache.close()

    def through(self, k, v, q, out=None):
        self.seq.clear()
        with self.seq.step(len(self.k)) as step:
            step.append(0, k, v)
            return step.attend(0, q, out)


class Arrays(Base):
    def test_written_by_dlpack(self):
        """What is written must say that it may be: by its flags, or by its buffer."""
        fill(self.seq, 5)
        q = random((1, 8, 64))
        expected = self.seq.attend(0, q)
        out = np.zeros((1, 8, 64), np.float32)
        self.seq.attend(0, q, Versioned(out))
        self.assertTrue((out == expected).all())
        self.assertTrue((self.seq.attend(0, Versioned(q, 1)) == expected).all())  # it is read
        for flags in (1, 2):  # read-only; a copy
            with self.assertRaisesRegex(ValueError, "out: read-only"):
                self.seq.attend(0, q, Versioned(out, flags))
        with self.assertRaisesRegex(TypeError, "DLPack 2"):
            self.seq.attend(0, q, Versioned(out, 0, 2))
        with self.assertRaisesRegex(ValueError, "out: read-only"):
            self.seq.attend(0, q, ReadOnly())
        lse = np.zeros((1, 8), np.float32)
        self.seq.attend(0, q, lse=Versioned(lse))
        self.assertTrue((lse == self.seq.attend(0, q, lse=True)[1]).all() and lse.any())

    def test_numpy_addresses(self):
        out = np.empty_like(self.q)
        with Spy() as seen:
            result = self.through(self.k, self.v, self.q, out)
        self.assertIs(result, out)
        self.assertEqual(seen, [x.ctypes.data for x in (self.k, self.v, self.q, out)])
        self.assertEqual(out.tobytes(), self.expected.tobytes())

    def test_array_head_is_used(self):
        """NumPy's structs are read directly on the interpreter that CI has."""
        if sys.implementation.name == "cpython" and sys.version_info < (3, 13):
            self.assertIsNot(_tensor._from_array, _tensor._from_numpy)
        for a in (self.k, self.k[2:, 1:], self.k[::2]):
            self.assertEqual(_tensor._from_array(a, "a", False)[:4],
                             _tensor._from_numpy(a, "a", False)[:4])

    def test_strides(self):
        """Head-major, views into a fused buffer, every second token, one head or token of many."""
        fused = np.zeros((10, 12, 64), np.float32)
        fused[:, :8], fused[:, 8:10], fused[:, 10:] = self.q, self.k, self.v
        head_major = [np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2)
                      for x in (self.k, self.v, self.q)]
        wide = np.zeros((20, 8, 128), np.float32)
        out = wide[::2, :, :64]
        for k, v, q in ((fused[:, 8:10], fused[:, 10:], fused[:, :8]), head_major):
            with Spy() as seen:
                self.through(k, v, q, out)
            self.assertEqual(out.tobytes(), self.expected.tobytes())
            self.assertEqual(seen, [x.ctypes.data for x in (k, v, q, out)])
        self.assertEqual(abs(wide[1::2]).max(), 0)
        self.assertEqual(abs(wide[..., 64:]).max(), 0)
        single = self.seq.attend(0, self.q[9])
        self.assertEqual(single.shape, (8, 64))
        self.assertEqual(single.tobytes(), self.expected[9].tobytes())

    def test_out_beside_q(self):
        """q and out in one buffer, in turns; a single common element is refused."""
        buffer = np.zeros((10, 16, 64), np.float32)
        buffer[:, ::2] = self.q
        q, out = buffer[:, ::2], buffer[:, 1::2]
        self.through(self.k, self.v, q, out)
        self.assertEqual(out.tobytes(), self.expected.tobytes())
        self.assertEqual(q.tobytes(), self.q.tobytes())
        flat = np.zeros(2 * self.q.size - 1, np.float32)
        q, out = flat[:self.q.size].reshape(q.shape), flat[self.q.size - 1:].reshape(q.shape)
        with self.assertRaisesRegex(ValueError, "overlaps"):
            self.seq.attend(0, q, out)

    def test_lse(self):
        """Written in place; beside q in one buffer; of one row, whose stride means nothing."""
        expected = self.seq.attend(0, self.q, lse=True)[1]
        wide = np.zeros((10, 8, 64), np.float32)
        lse = wide.ravel()[:80].reshape(10, 8)
        out, same = self.seq.attend(0, self.q, lse=lse)
        self.assertIs(same, lse)
        self.assertEqual((out.tobytes(), lse.tobytes()),
                         (self.expected.tobytes(), expected.tobytes()))
        self.assertEqual(abs(wide.ravel()[80:]).max(), 0)
        flat = np.zeros(self.q.size + 80, np.float32)
        q, lse = flat[80:].reshape(self.q.shape), flat[:80].reshape(10, 8)
        q[:] = self.q
        self.assertEqual(self.seq.attend(0, q, lse=lse)[0].tobytes(), self.expected.tobytes())
        self.assertEqual(lse.tobytes(), expected.tobytes())
        self.assertEqual(q.tobytes(), self.q.tobytes())
        wide = np.zeros((10, 8, 256), np.float32)
        q, lse = wide[..., :64], wide.ravel()[64:144].reshape(10, 8)  # between two heads
        q[:] = self.q
        self.assertEqual(self.seq.attend(0, q, lse=lse)[0].tobytes(), self.expected.tobytes())
        self.assertEqual(lse.tobytes(), expected.tobytes())
        for lse in (np.zeros((20, 16), np.float32)[::20, :8], np.zeros((1, 8), np.float32)[::-1]):
            self.seq.attend(0, self.q[9:], lse=lse)
            self.assertEqual(lse.tobytes(), expected[9:].tobytes())
        interface = Interface(self.q, data=(self.q.ctypes.data, False))
        self.assertEqual(self.seq.attend(0, interface).tobytes(), self.expected.tobytes())

    def test_half(self):
        k, v, q = (x.astype(np.float16) for x in (self.k, self.v, self.q))
        out = self.through(k, v, q)
        self.assertEqual(out.dtype, np.float16)
        wide = self.through(*(x.astype(np.float32) for x in (k, v, q)))
        self.assertEqual(out.tobytes(), wide.astype(np.float16).tobytes())
        bits = [kvtile.BFloat16((x.view(np.uint32) >> 16).astype(np.uint16))
                for x in (self.k, self.v, self.q)]
        out = self.through(*bits)
        exact = [(x.array.astype(np.uint32) << 16).view(np.float32) for x in bits]
        self.assertEqual(out.tobytes(), self.through(*exact).tobytes())
        keys = kvtile.BFloat16(np.empty((10, 2, 64), np.uint16))
        self.assertEqual(self.seq.keys(0, out=keys).array.tobytes(), bits[0].array.tobytes())

    def test_buffers(self):
        """array.array, bytearray, memoryview: with a shape by memoryview.cast."""
        def view(x):
            return memoryview(array.array("f", x.ravel())).cast("B").cast("f", x.shape)

        out = memoryview(bytearray(self.q.nbytes)).cast("f", self.q.shape)
        self.assertIs(self.through(view(self.k), view(self.v), view(self.q), out), out)
        self.assertEqual(out.tobytes(), self.expected.tobytes())

    def test_refused(self):
        """Every refusal names the array, and changes nothing."""
        k, v, q, seq = self.k, self.v, self.q, self.seq
        room = np.empty_like(q)
        read_only = np.empty_like(q)
        read_only.flags.writeable = False
        cases = [
            (TypeError, "k: float64", lambda: seq.append(0, k.astype(np.float64), v)),
            (TypeError, "k: int32", lambda: seq.append(0, k.astype(np.int32), v)),
            (TypeError, "k: >f4", lambda: seq.append(0, k.astype(">f4"), v)),
            (TypeError, "k: list is no array", lambda: seq.append(0, k.tolist(), v)),
            (TypeError, "k: NoneType is no array", lambda: seq.append(0, None, v)),
            (TypeError, "k: a masked array", lambda: seq.append(0, np.ma.masked_array(k), v)),
            (TypeError, "v: needed", lambda: seq.append(0, k)),
            (ValueError, r"k: shape \(10, 2, 32\), needs", lambda: seq.append(0, k[..., :32], v)),
            (ValueError, r"k: shape \(10, 1, 64\)", lambda: seq.append(0, k[:, :1], v)),
            (ValueError, r"k: shape \(1280,\)", lambda: seq.append(0, k.ravel(), v)),
            (ValueError, r"v: shape \(9, 2, 64\)", lambda: seq.append(0, k, v[:9])),
            (ValueError, "k: 9 tokens, the step has 10", lambda: seq.append(0, k[:9], v[:9])),
            (ValueError, "k: the last dimension", lambda: seq.append(
                0, np.zeros((10, 2, 128), np.float32)[..., ::2], v)),
            (ValueError, "k: tokens at a stride of 0", lambda: seq.append(
                0, np.broadcast_to(k[:1], k.shape), v)),
            (ValueError, "k: heads at a stride of -", lambda: seq.append(0, k[:, ::-1], v)),
            (ValueError, "layer 1: the cache has 1", lambda: seq.append(1, k, v)),
            (ValueError, "layer -1", lambda: seq.append(-1, k, v)),
            (ValueError, r"q: shape \(10, 2, 64\)", lambda: seq.attend(0, k)),
            (ValueError, r"out: shape \(9, 8, 64\), needs \(10, 8, 64\)",
             lambda: seq.attend(0, q, np.empty((9, 8, 64), np.float32))),
            (ValueError, "out: read-only", lambda: seq.attend(0, q, read_only)),
            (ValueError, "out: read-only", lambda: seq.attend(
                0, q, memoryview(bytes(q.nbytes)).cast("f", q.shape))),
            (ValueError, "out: overlaps q", lambda: seq.attend(0, q, q)),
            (TypeError, "out: float64", lambda: seq.attend(0, q, np.empty(q.shape))),
            (ValueError, "lse: shape", lambda: seq.attend(0, q, lse=np.empty((9, 8), "f4"))),
            (TypeError, "lse: needs float32",
             lambda: seq.attend(0, q, lse=np.empty((10, 8), "f2"))),
            (ValueError, "lse: shape .*strides", lambda: seq.attend(
                0, q, lse=np.empty((10, 16), "f4")[:, ::2])),
            (ValueError, "lse: shape .*strides", lambda: seq.attend(
                0, q, lse=np.empty((10, 16), "f4")[:, :8])),
            (ValueError, "lse: overlaps q", lambda: seq.attend(
                0, q, lse=q.ravel()[:80].reshape(10, 8))),
            (ValueError, "lse: overlaps q", lambda: seq.attend(
                0, q, np.empty_like(q), lse=q.ravel()[-80:].reshape(10, 8))),
            (ValueError, "lse: overlaps out", lambda: seq.attend(
                0, q, room, lse=room.ravel()[600:680].reshape(10, 8))),
            (TypeError, "q: .*__array_interface__", lambda: seq.attend(0, np.ndarray)),
            (TypeError, "q: .*__array_interface__", lambda: seq.attend(0, Interface(q))),
            (TypeError, "q: .*__array_interface__", lambda: seq.attend(0, Interface(
                q, data=None))),
            (TypeError, "q: .*__array_interface__", lambda: seq.attend(0, Interface(
                q, data=q.tobytes()))),
            (TypeError, "q: .*__array_interface__", lambda: seq.attend(0, Interface(
                q, data=b"ab"))),
            (TypeError, "q: .*__array_interface__", lambda: seq.attend(0, Interface(
                q, data=(None, False)))),
            (TypeError, "q: .*__array_interface__", lambda: seq.attend(0, Interface(
                q, data=q.__array_interface__["data"], shape=None))),
            (ValueError, "sink_logits: shape", lambda: seq.attend(0, q, sink_logits=[1.0])),
            (TypeError, "attend: required argument is not a float",
             lambda: seq.attend(0, q, scale="1")),
            (kvtile.NumberError, "scale", lambda: seq.attend(
                0, q, causal=False, scale=float("nan"))),
            (ValueError, "8 is not a valid Precision", lambda: seq.attend(0, q, precision=8)),
            (ValueError, "level: 20", lambda: seq.save_bytes(level=20)),
            (TypeError, "mask: int64", lambda: seq.attend(0, q, mask=np.ones((10, 5), int))),
            (ValueError, "mask: shape", lambda: seq.attend(0, q, mask=np.ones((9, 5), bool))),
            (ValueError, "query_positions: shape",
             lambda: seq.attend(0, q, query_positions=[1, 2])),
            (TypeError, "token_ids: float64", lambda: seq.commit([0.5] * 10)),
            (ValueError, "token_ids: 9 for a step of 10", lambda: seq.commit(range(9))),
            (ValueError, "token_ids: beyond 32 bits", lambda: seq.commit([2**31] * 10)),
            (ValueError, "n_tokens: -1", lambda: seq.begin(-1)),
            (ValueError, "n_tokens: 1.5", lambda: seq.begin(1.5)),
            (ValueError, "another cache", lambda: self.cache.attend(
                0, [kvtile.Cache(group(), 10).sequence()], q[:1])),
            (ValueError, "sequences: none", lambda: self.cache.attend(0, [], q[:0])),
            (ValueError, "n_queries: 2 numbers", lambda: self.cache.attend(
                0, [seq], q, n_queries=[5, 5])),
            (ValueError, "n_queries: 0", lambda: self.cache.attend(0, [seq], q[:0], n_queries=0)),
            (ValueError, "n_queries: -1", lambda: self.cache.attend(0, [seq], q, n_queries=-1)),
            (TypeError, "sequences: Cache is no", lambda: self.cache.attend(0, [self.cache], q)),
        ]
        seq.clear()
        seq.begin(10)
        for error, text, call in cases:
            with self.subTest(text), self.assertRaisesRegex(error, text):
                call()
        self.assertEqual(seq.pending, 10)
        seq.append(0, k, v)
        seq.commit()

    def test_releases(self):
        """No reference to an array outlives its call, failed calls included."""
        out = np.empty_like(self.q)
        arrays = (self.k, self.v, self.q, out)
        before = [sys.getrefcount(x) for x in arrays]
        for _ in range(10):
            self.through(*arrays)
            with self.assertRaises(ValueError):
                self.seq.attend(0, self.q, self.q)
            with self.assertRaises(kvtile.ArgError):
                self.seq.attend(0, self.q, out, mask=np.ones((10, 99), bool))
            with self.assertRaises(kvtile.StateError):
                self.seq.append(0, self.k, self.v)
        gc.collect()
        self.assertEqual([sys.getrefcount(x) for x in arrays], before)


@needs_torch
class Torch(Base):
    """PyTorch's tensors, by their own attributes and by DLPack alone."""

    def test_addresses(self):
        for wrap in (lambda x: x, DLPackOnly):
            k, v, q = (torch.from_numpy(x.copy()) for x in (self.k, self.v, self.q))
            out = torch.empty_like(q)
            with Spy() as seen:
                self.through(wrap(k), wrap(v), wrap(q), wrap(out))
            self.assertEqual(seen, [x.data_ptr() for x in (k, v, q, out)])
            self.assertEqual(out.numpy().tobytes(), self.expected.tobytes())

    def test_kinds(self):
        """The result is PyTorch's and has q's dtype; strided views are taken as they are."""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for wrap in (lambda x: x, DLPackOnly):
                k, v, q = (torch.from_numpy(x).to(dtype) for x in (self.k, self.v, self.q))
                fused = torch.cat([q, k, v], 1).transpose(0, 1).contiguous().transpose(0, 1)
                q, k, v = fused.split([8, 2, 2], 1)
                self.assertFalse(q.is_contiguous())
                out = torch.empty((10, 8, 64), dtype=dtype)
                with Spy() as seen:
                    self.through(wrap(k), wrap(v), wrap(q), wrap(out))
                self.assertEqual(seen, [x.data_ptr() for x in (k, v, q, out)])
                plain = self.through(k, v, q)
                self.assertEqual(plain.dtype, dtype)
                self.assertTrue(torch.equal(plain, out))
                f32 = self.through(*(x.to(torch.float32) for x in (k, v, q)))
                self.assertTrue(torch.equal(f32.to(dtype), out))
                keys = torch.empty((2, 10, 64), dtype=dtype)
                self.seq.keys(0, out=wrap(keys.transpose(0, 1)))
                self.assertTrue(torch.equal(keys.transpose(0, 1), k))

    def test_torch_refused(self):
        q = torch.from_numpy(self.q)
        seq = self.seq
        for error, text, call in (
            (TypeError, "q: torch.float64", lambda: seq.attend(0, q.double())),
            (TypeError, "q: its dtype is not", lambda: seq.attend(0, DLPackOnly(q.double()))),
            (TypeError, "q: needs a gradient", lambda: seq.attend(0, q.clone().requires_grad_())),
            (TypeError, "q: .*gradient",
             lambda: seq.attend(0, DLPackOnly(q.clone().requires_grad_()))),
            (ValueError, "q: on device meta", lambda: seq.attend(0, q.to("meta"))),
            (ValueError, r"q: on device \(2, 0\)", lambda: seq.attend(0, DLPackOnly(q, (2, 0)))),
            (TypeError, "q: ", lambda: seq.attend(0, q.to_sparse())),
            (TypeError, "q: a view that negates", lambda: seq.attend(
                0, torch.complex(q, q).conj().imag)),
            (ValueError, "q: tokens at a stride of 0",
             lambda: seq.attend(0, q[:1].expand(10, 8, 64))),
            (ValueError, "out: overlaps q", lambda: seq.attend(0, q, self.q)),
        ):
            with self.subTest(text), self.assertRaisesRegex(error, text):
                call()

    def test_capsules_are_released(self):
        storage = DLPackOnly(torch.from_numpy(self.q.copy()))
        out = np.empty_like(self.q)
        self.seq.attend(0, storage, out)
        gc.collect()
        blocks = sys.getallocatedblocks()
        for _ in range(1000):
            self.seq.attend(0, storage, out)
        self.assertLess(sys.getallocatedblocks() - blocks, 200)


if __name__ == "__main__":
    unittest.main()
