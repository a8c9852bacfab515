"""fast/offload.py - a KV cache in a file (`disk`), or in host memory beside a GPU (`pinned`).

    new_cache(llama, capacity, store, selector) -> a model.Cache for this selector

    layer 0            where the model computes: it is dense under every selector
    layers 1 .. L-1    in the store, as rows [L-1, B, G, capacity, 2, D]: the key and the value of a
                       token are neighbours, so one read brings both

A sparse step selects few rows, and the step before selected about half of them. The fast engine
keeps recently used rows in memory, and reads a row from the file only if it is not held there. The
butler names the rows of several layers before these layers are reached:

    producer at layer p chooses -> prefetch(layers, chosen) -> posix_fadvise: read the missing rows
    layers p+1 .. p+R           -> HeldRows copies them; attention reads the held rows

The operating system reads whole pages, at most two for a row. It keeps as much of the file in
memory as there is room for, but pages that contain one useful row fill this room quickly. The file
has no name: nobody else can open it, and it is gone when the process ends, however it ends.

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
HELD = 3  # rows in memory for each row that a step may select
QUIET = 24  # choices (about 4 steps of the default model) without a read: all is in memory


def check_store(store: str, device) -> None:
    """Raises UserError if a model on this device cannot use this store."""
    known("store", store, STORES)
    needed = "cuda" if store == "pinned" else "cpu"
    kind = torch.device(device).type
    if kind != needed:
        raise UserError(f"--offload {store} is for --device {needed}, not {kind}")
    if store == "disk" and sys.platform != "linux":
        raise UserError("--offload disk needs Linux")


def new_cache(llama, capacity: int, store: str, selector=None, folder=None, batch=1) -> Cache:
    """An empty cache for `batch` texts of up to `capacity` tokens. store: disk or pinned; selector:
    the one that will read from it; folder: where the file lies (default: /var/tmp, because /tmp may
    itself be memory). Raises UserError."""
    check_store(store, llama.device)
    if store == "pinned":
        return PinnedCache(llama, batch, capacity, dense=selector is None)
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


class HeldRows:
    """Recently used rows of one layer, in memory. A new row replaces the least recently used one.

    rows    C rows for each KV head, [B, G, C, 2, D]
    token   the token that a row belongs to, [B*G, C], -1 = none
    used    the number of the row's latest use, [B*G, C], -1 = never
    slot    where a token's row is, [B*G, capacity], -1 = not in memory
    """

    @torch.inference_mode()
    def __init__(self, store, slots: int):
        """store [B, G, capacity, 2, D]: all rows; slots: C, at least as many as a step selects"""
        B, G, capacity = store.shape[:3]
        self.store = store.flatten(0, 2).flatten(1)  # [B*G*capacity, 2*D], a view
        self.rows = store.new_zeros(B, G, slots, *store.shape[3:])
        self.token = torch.full((B * G, slots), -1)
        self.used = torch.full((B * G, slots), -1)
        self.slot = torch.full((B * G, capacity), -1, dtype=torch.int32)
        self.uses = 0  # calls of `fetch`
        self.end = 0  # tokens from here on are not held

    @torch.inference_mode()
    def find(self, tokens):
        """tokens [B, G, K], -1 = empty -> their slots [B*G, K] int64, -1 = empty or not held"""
        tokens = tokens.flatten(0, 1)
        slots = self.slot.gather(1, tokens.clamp(min=0).long()).long()
        return slots.masked_fill_(tokens < 0, -1)

    @torch.inference_mode()
    def fetch(self, tokens):
        """Holds the rows of tokens [B, G, K], -1 = empty -> their slots, [B, G, K] int32."""
        slots = self.find(tokens)
        missing = (tokens.flatten(0, 1) >= 0) & (slots < 0)
        self.uses += 1
        head, at = (slots >= 0).nonzero(as_tuple=True)
        self.used[head, slots[head, at]] = self.uses
        head, at = missing.nonzero(as_tuple=True)
        new = tokens.flatten(0, 1)[head, at].long()
        # Copying waits for pages that are not in memory yet.
        rows = self.store.index_select(0, head * self.slot.shape[1] + new)
        # The n-th missing row of a KV head replaces the head's n-th least recently used row.
        oldest = self.used.topk(int(missing.sum(1).max()), largest=False).indices
        free = oldest[head, missing.cumsum(1)[head, at] - 1]
        gone = self.token[head, free]
        self.slot[head[gone >= 0], gone[gone >= 0]] = -1
        self.slot[head, new] = free.int()
        self.token[head, free] = new
        self.used[head, free] = self.uses
        self.end = max(self.end, int(tokens.max()) + 1)
        places = head * self.token.shape[1] + free
        self.rows.flatten(0, 2).flatten(1).index_copy_(0, places, rows)
        slots[head, at] = free
        return slots.view(tokens.shape).int()

    @torch.inference_mode()
    def forget(self, length: int) -> None:
        """Gives up the rows of all tokens from `length` on."""
        if self.end <= length:
            return
        gone = self.token >= length
        self.token[gone] = -1
        self.used[gone] = -1
        self.slot[:, length:] = -1
        self.end = length


class DiskCache(OffloadedCache):
    """Rows in an unnamed file that is mapped into memory.

    held    HeldRows of layers 1 .. L-1; empty until the first step through held rows
    """

    def __init__(self, llama, batch: int, capacity: int, folder=None):
        self.folder = folder or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
        self.advisor = ThreadPoolExecutor(1)  # it waits when the disk's queue is full
        self.held = []
        self.through_held = False  # does `append` return held rows in this step?
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
        """See model.Cache. In a step through held rows the result is all held keys and values,
        [B, G, C, D], in layers above 0. The kernel reads more than it is asked for while steps are
        dense, and no more than that while they are sparse."""
        access = mmap.MADV_RANDOM if self.chosen_ahead else mmap.MADV_NORMAL
        if layer > 0 and access != self.access:
            self.map.madvise(access)
            self.access = access
        keys, values = super().append(layer, k, v)
        if layer == 0:
            self.through_held = False  # its selector comes after this call
        elif self.held:
            # A truncated or interrupted step may have left other rows of these tokens.
            self.held[layer - 1].forget(self.size)
            if self.through_held:
                keys, values = self.held[layer - 1].rows.unbind(3)
        return keys, values

    def advance(self, T):
        super().advance(T)
        self.chosen_ahead = False

    def through_held_rows(self, selector):
        """-> a selector for one decode step, in which layers above 0 attend to held rows. It gives
        `selector` the keys of the file, fetches the rows that are not held, and returns an index
        into the keys and values that `append` returns."""
        allowance = int(selector.budget.allowance(torch.tensor([self.capacity])))
        slots = min(HELD * allowance, self.capacity)
        if not self.held or self.held[0].token.shape[1] < slots:
            self.held = [HeldRows(rows, slots) for rows in self.rows]

        def select(layer, x, q, keys, positions):
            if layer == 0:
                self.through_held = True
                return selector(layer, x, q, keys, positions)
            keys = self.k[layer][:, :, : self.size + 1]
            index = selector(layer, x, q, keys, positions)  # [B, G, 1, K]
            return self.held[layer - 1].fetch(index[:, :, 0])[:, :, None]

        return select

    def prefetch(self, layers, chosen) -> None:
        """Starts to read what these layers will need: chosen [R, B, G, K], -1 = empty."""
        self.chosen_ahead = True
        if self.reads_happen():
            if self.through_held:
                chosen = torch.stack([self.not_held(layer, tokens)
                                      for layer, tokens in zip(layers, chosen, strict=True)])
            self.advisor.submit(self.ask_for, *self.pages_of(layers, chosen))

    def not_held(self, layer: int, tokens):
        """tokens [B, G, K] -> the same, with -1 in place of those whose rows are held"""
        slots = self.held[layer - 1].find(tokens).view(tokens.shape)
        return tokens.masked_fill(slots >= 0, -1)

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
