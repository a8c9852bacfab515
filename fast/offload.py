"""fast/offload.py - a KV cache in a file (`disk`), or in host memory beside a GPU (`pinned`).

    new_cache(llama, capacity, store, selector) -> a model.Cache for this selector

    layer 0            where the model computes: it is dense under every selector
    layers 1 .. L-1    in the store, as rows [L-1, B, G, capacity, 2, D]: the key and the value of a
                       token are neighbours, so one read brings both

A sparse step reads few rows, and every row is at most two pages of the file. The butler names the
rows of several layers before these layers are reached:

    producer at layer p chooses -> prefetch(layers, chosen) -> posix_fadvise: read these pages
    layers p+1 .. p+R           -> attention finds its rows in memory, or waits for the last of them

The operating system keeps as much of the file in memory as there is room for. The file has no name:
nobody else can open it, and it is gone when the process ends, however it ends.

    python sample.py --engine fast --offload disk
    python -m fast.offload        which pages a prefetch brings into memory
"""

import ctypes
import mmap
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from cli import UserError, known
from model import Cache

PAGE = mmap.PAGESIZE
STORES = ("disk", "pinned")
QUIET = 24  # choices (about 4 steps of the default model) without a read: all is in memory


def new_cache(llama, capacity: int, store: str, selector=None, folder=None, batch=1) -> Cache:
    """An empty cache for `batch` texts of up to `capacity` tokens. store: disk or pinned; selector:
    the one that will read from it; folder: where the file lies (default: /var/tmp, because /tmp may
    itself be memory). Raises UserError."""
    known("store", store, STORES)
    device = "cuda" if store == "pinned" else "cpu"
    if llama.device.type != device:
        raise UserError(f"--offload {store} is for --device {device}, not {llama.device.type}")
    if store == "pinned":
        return PinnedCache(llama, batch, capacity, dense=selector is None)
    if sys.platform != "linux":
        raise UserError("--offload disk needs Linux")
    cache = DiskCache(llama, batch, capacity, folder)
    if hasattr(selector, "prefetch_with"):
        selector.prefetch_with(cache.prefetch)
    return cache


class OffloadedCache(Cache):
    """Layer 0 as in model.Cache; k[layer] and v[layer] of all others are views of the store.

    rows    the store, [L-1, B, G, capacity, 2, D]
    """

    def __init__(self, llama, batch: int, capacity: int, where: str):
        """where: what an error message calls the place of the rows"""
        dtype = llama.new_cache(1, 1).k[0].dtype  # of this engine's own cache
        super().__init__(replace(llama.config, layers=1), batch, capacity, dtype, llama.device)
        c = llama.config
        shape = torch.Size([c.layers - 1, batch, c.kv_heads, capacity, 2, c.head_dim])
        try:
            self.rows = self.make_room(shape, dtype)
        except (OSError, ValueError, OverflowError, RuntimeError) as e:
            reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
            raise UserError(f"no room for {shape.numel() * dtype.itemsize / 1e9:.3g} GB of keys "
                            f"and values in {where} ({reason})") from None
        self.k += self.rows[..., 0, :]
        self.v += self.rows[..., 1, :]

    def make_room(self, shape, dtype):
        """-> zeros of this shape, in the store"""
        raise NotImplementedError


# ---------------------------------------------------------------------------- a file


class DiskCache(OffloadedCache):
    """Rows in an unnamed file that is mapped into memory."""

    def __init__(self, llama, batch: int, capacity: int, folder=None):
        self.folder = folder or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
        self.advisor = ThreadPoolExecutor(1)  # it waits when the disk's queue is full
        self.access = mmap.MADV_NORMAL  # how the kernel was told the file will be read
        self.chosen_ahead = False  # did `prefetch` name rows of this step?
        self.reads = 0  # of this process, from any disk
        self.quiet = 0  # choices since the last one
        super().__init__(llama, batch, capacity, self.folder)

    def make_room(self, shape, dtype):
        size = max(shape.numel() * dtype.itemsize, PAGE)
        self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        os.posix_fallocate(self.file.fileno(), 0, size)  # a full disk shows here, not later
        self.map = mmap.mmap(self.file.fileno(), size)
        return torch.frombuffer(self.map, dtype=dtype)[: shape.numel()].view(shape)

    def append(self, layer, k, v):
        """See model.Cache. The kernel reads more than it is asked for while steps are dense, and no
        more than that while they are sparse."""
        access = mmap.MADV_RANDOM if self.chosen_ahead else mmap.MADV_NORMAL
        if layer > 0 and access != self.access:
            self.map.madvise(access)
            self.access = access
        return super().append(layer, k, v)

    def advance(self, T):
        super().advance(T)
        self.chosen_ahead = False

    def prefetch(self, layers, chosen) -> None:
        """Starts to read what these layers will need: chosen [R, B, G, K], -1 = empty."""
        self.chosen_ahead = True
        if self.reads_happen():
            self.advisor.submit(self.ask_for, *self.pages_of(layers, chosen))

    def reads_happen(self) -> bool:
        """Has this process read from a disk during the latest choices? If not, all rows are in
        memory, and asking for them takes longer than reading them. A page that is missing again
        makes a read, and the answer changes."""
        import resource  # not on Windows

        usage = resource.getrusage(resource.RUSAGE_SELF)
        reads = usage.ru_inblock + usage.ru_majflt
        self.quiet = self.quiet + 1 if reads == self.reads else 0
        self.reads = reads
        return self.quiet < QUIET

    def pages_of(self, layers, chosen):
        """-> starts and sizes, in bytes of the file, of the pages that hold these rows, in the
        order of the layers; adjacent ones are merged."""
        L, B, G, capacity = self.rows.shape[:4]
        tokens = chosen.reshape(len(layers), B * G, -1).numpy().astype(np.int64)
        heads = (np.array(layers)[:, None] - 1) * B * G + np.arange(B * G)
        row = np.unique((heads[:, :, None] * capacity + tokens)[tokens >= 0])
        row_bytes = 2 * self.rows.shape[-1] * self.rows.itemsize
        starts = row * row_bytes // PAGE * PAGE
        ends = -((row + 1) * row_bytes // -PAGE) * PAGE
        first = np.ones(len(row), dtype=bool)  # of a run of adjacent pages
        first[1:] = starts[1:] > ends[:-1]
        last = np.roll(first, -1)
        return starts[first], ends[last] - starts[first]

    def ask_for(self, starts, sizes) -> None:
        """The kernel begins to read these pages, many at a time, and does not wait for them."""
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            os.posix_fadvise(self.file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def drop_pages(self) -> None:
        """Writes the file out and removes it from memory, for measurements and tests."""
        self.map.flush()
        self.map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.quiet = 0

    def pages_in_memory(self) -> np.ndarray:
        """Which pages of the file are in memory: booleans, one a page."""
        mapped = len(self.map)
        flags = np.zeros(-(mapped // -PAGE), dtype=np.uint8)
        start = ctypes.c_void_p(self.rows.data_ptr())
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(start, ctypes.c_size_t(mapped), flags.ctypes.data_as(ctypes.c_void_p)):
            raise OSError(ctypes.get_errno(), "mincore")
        return (flags & 1).astype(bool)


# ---------------------------------------------------------------------------- beside a GPU


class PinnedCache(OffloadedCache):
    """Rows in page-locked host memory, which the kernels of a GPU read and write over the bus.

    For PyTorch k[layer] and v[layer] are tensors on the GPU. The Triton kernel of sparse attention
    loads each selected row once, so a sparse step moves just these rows over the bus. Dense
    attention reads a row several times; it gets a copy of the layer on the GPU. Nothing is
    prefetched. Not measured yet: no GPU was at hand.
    """

    def __init__(self, llama, batch: int, capacity: int, dense: bool):
        self.dense = dense  # every step reads whole layers, not only the prompt
        self.device = llama.device
        super().__init__(llama, batch, capacity, "page-locked memory")

    def make_room(self, shape, dtype):
        return pinned_rows(shape, dtype, self.device)

    def append(self, layer, k, v):
        """See model.Cache."""
        keys, values = super().append(layer, k, v)
        if layer > 0 and (self.dense or k.shape[2] > 1):
            return keys.contiguous(), values.contiguous()
        return keys, values


def pinned_rows(shape, dtype, device):
    """Zeros in page-locked host memory, as a tensor of the device (itself, if that is the CPU)."""
    if device.type != "cuda":
        return torch.zeros(shape, dtype=dtype)
    host = torch.zeros(shape, dtype=dtype, pin_memory=True)
    there = {"shape": (host.nbytes,), "typestr": "|u1", "data": (host.data_ptr(), False),
             "version": 3}
    memory = SimpleNamespace(__cuda_array_interface__=there, host=host)  # keeps `host` alive
    return torch.as_tensor(memory, device=device).view(dtype).view(shape)


if __name__ == "__main__":
    from butler import load
    from tokenizer import resolve

    llama, _, _ = load(resolve())
    cache = new_cache(llama, 2000, "disk")
    cache.rows.normal_()
    cache.advance(2000)
    cache.drop_pages()
    layers = [1, 2, 3, 4, 5]
    chosen = torch.rand(len(layers), 1, llama.config.kv_heads, 2000).topk(100).indices
    print(f"{len(cache.map) / 1e6:.0f} MB in {cache.folder}: {cache.pages_in_memory().sum()} of "
          f"{len(cache.map) // PAGE:,} pages are in memory")
    cache.prefetch(layers, chosen)
    cache.advisor.shutdown()
    print(f"layers {layers} choose {chosen.numel():,} rows of {cache.rows[0, 0, 0, 0].nbytes} "
          f"bytes: {cache.pages_in_memory().sum():,} pages are in memory")
