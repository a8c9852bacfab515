"""beyond/offload.py - a KV cache whose keys and values live elsewhere, behind the same interface.

    none      all of it where the model computes: model.Cache
    disk      a file mapped into memory; the operating system holds as much of it as there is room
    pinned    host memory that a GPU reads itself, over the bus; not measured on one yet

    layer 0              resident: it is dense, whatever the selector
    layers 1 ... L-1     [L-1, B, G, capacity, 2, D]: key and value of a token are one row

A selection names the few rows that a step needs, and most of them were needed by the steps before:
those are held, as are sinks and the recent window, which every step uses. Each of the others is a
page of 4 kB to read, and many such reads at once take far less time than one by one. As soon as a
layer's choice is made, threads, or a stream beside, begin to fetch its rows (`read_ahead`), while
its producer chooses for other layers and while these are being computed. Importance keys stay with
the selector, in memory. Where the operating system has room for the whole file, steps do not read
from the disk at all; rows are then attended to where they are, as in model.Cache.

A file without a name holds the rows: nobody else can open, shorten or remove it, and it is gone
with its process, however that ends. Its room is allocated when it is made: a full disk shows then.

    python sample.py --offload disk --prompt-file book.txt
    python -m beyond.offload        how much of a cache a step touches
"""

import mmap
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from types import SimpleNamespace

import torch

from common.errors import ModelError
from kernel import fetch_rows
from model import Cache

STORES = "none", "pinned", "disk"
READERS = 64  # threads, which wait for the disk nearly all the time
ROWS = 48  # that a reader fetches at a time
CALM = 2  # steps without a read, after which all rows are taken to be in memory
PIECE = 2**20  # bytes of whole layers that are asked for at once


def cache_kind(store: str, folder=None, device="cpu"):
    """What `Llama.new_cache` makes: `store` is one of STORES, `folder` where a file goes (default:
    /var/tmp, as /tmp may lie in memory). Raises ModelError, one line, for what cannot be had."""
    if store not in STORES:
        raise ModelError(f"--offload is one of {', '.join(STORES)}, not {store!r}")
    if store == "none":
        return Cache
    if (store == "pinned") != str(device).startswith("cuda"):
        raise ModelError(f"--offload {store} is for --device "
                         f"{'cuda' if store == 'pinned' else 'cpu'}, not {device}")
    if store == "pinned":
        return PinnedCache
    if sys.platform == "win32":
        raise ModelError("--offload disk needs a system that maps files as Linux or macOS do")
    folder = folder or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise ModelError(f"--offload-dir {folder}: no folder, or one that may not be written to")
    return partial(DiskCache, folder=folder)


class Elsewhere(Cache):
    """All layers but the first in `store`, which a subclass's `room` makes, in `folder`; its
    `rows_of` is `at_hand` for a step of one token a row."""

    def allocate(self, layers, shape, dtype, device):
        rows = torch.Size((layers - 1, *shape[:-1], 2, shape[-1]))
        try:
            self.store = self.room(rows, dtype, device)
        except (OSError, ValueError, OverflowError, RuntimeError) as e:
            reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
            raise ModelError(f"no room for {rows.numel() * dtype.itemsize / 1e9:.3g} GB of keys "
                             f"and values in {self.folder} ({reason})") from None
        k, v = super().allocate(1, shape, dtype, device)
        self.tables, self.held, self.coming = None, {}, {}  # by layer: rows held, on their way
        return k + list(self.store[..., 0, :]), v + list(self.store[..., 1, :])

    def at_hand(self, layer, keys, values, index):
        if index.shape[2] > 1:  # a block of tokens needs most rows
            return *self.whole(layer, keys, values), index
        self.asked += index.numel()
        return self.rows_of(layer, keys, values, index)


class DiskCache(Elsewhere):
    """Rows in a nameless file in `folder`. While steps are dense, a thread reads each layer's, one
    large piece after the other, as attention goes through them; from the first choice on, many read
    row by row, and `held[layer]` keeps the latest, three times as many as a step needs."""

    def __init__(self, *shape, folder):
        self.folder = folder
        self.unit, self.waited = mmap.PAGESIZE, 0.0  # bytes of a missed row; seconds waited
        self.reads, self.calm = 0, 0  # reads of this process; layers served since the last one
        self.pieces, self.counting = [], Lock()  # of the layer that is attended to, being read
        super().__init__(*shape)

    def room(self, shape, dtype, device):
        size = (shape.numel() + 1) * dtype.itemsize  # of a single layer too, which leaves no rows
        self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.file.fileno(), 0, size)
        else:  # macOS
            self.file.truncate(size)
        self.map = mmap.mmap(self.file.fileno(), size)
        self.readers, self.fetcher = ThreadPoolExecutor(READERS), ThreadPoolExecutor(1)
        self.streams = True  # whole layers are read, not rows
        return torch.frombuffer(self.map, dtype=dtype)[:-1].view(shape)

    def truncate(self, length):
        super().truncate(length)
        for ahead in self.coming.values():
            ahead.result()
        self.coming.clear()
        for held in self.held.values():
            held.forget(int(self.lengths.min()))

    def advise(self, streams: bool) -> None:
        """Tells the kernel whether to read more than asked for; what is still to be read is late"""
        for piece in self.pieces:
            piece.cancel()
        if streams != self.streams:
            self.map.madvise(mmap.MADV_NORMAL if streams else mmap.MADV_RANDOM)
            self.streams = streams

    def whole(self, layer, keys, values):
        if layer:
            self.advise(streams=True)
            self.pieces = []
            for head in self.store[layer - 1].flatten(0, 1):  # [capacity, 2, D]
                start = head.data_ptr() - self.store.data_ptr()
                end = start + head[: self.size].nbytes
                self.pieces += [self.fetcher.submit(self.touch, min(PIECE, end - at), at)
                                for at in range(start, end, PIECE)]
        return keys, values

    def touch(self, size: int, at: int) -> None:
        os.pread(self.file.fileno(), size, at)  # what it returns is not kept

    def read_ahead(self, layers, tokens):
        """Starts to fetch what these layers will need, in their order: tokens [R, B, G, 1, K]."""
        if self.in_memory:
            return
        self.advise(streams=False)
        for layer, chosen in zip(layers, tokens, strict=True):
            self.coming[layer] = self.fetcher.submit(self.fetch, layer, chosen[:, :, 0])

    def rows_of(self, layer, keys, values, index):
        began, reads = time.perf_counter(), page_reads()
        self.reads, self.calm = reads, self.calm + 1 if reads == self.reads else 0
        self.advise(streams=False)
        if layer in self.coming:  # also where all is in memory: it must not end behind a rewind
            self.coming.pop(layer).result()
        if self.in_memory:
            return keys, values, index
        slots = self.fetch(layer, index[:, :, 0])  # those fetched ahead are held by now
        rows = self.held[layer].rows
        self.waited += time.perf_counter() - began
        return rows[..., 0, :], rows[..., 1, :], slots[:, :, None]

    @torch.inference_mode()
    def fetch(self, layer: int, tokens):
        """tokens [B, G, K], -1 = empty -> the slots of `held[layer].rows` where they are now."""
        B, G, K = tokens.shape
        if layer not in self.held or self.held[layer].rows.shape[2] < 1.5 * K:  # a budget may grow
            self.held[layer] = Held(self.store[layer - 1], 3 * K)
        slots = self.held[layer].fetch(tokens.flatten(0, 1).long(), self.size, self.read)
        return slots.view(B, G, K)

    def read(self, table, rows):
        """table [N, 2 * D] in the file, rows [n] -> [n, 2 * D], many readers at once"""
        with self.counting:  # two threads come here
            self.missed += len(rows)
        return torch.cat(list(self.readers.map(partial(table.index_select, 0), rows.split(ROWS))))

    @property
    def in_memory(self) -> bool:
        return self.calm > CALM * len(self.k)


def page_reads() -> int:
    """How often this process has waited for a page to be read from a disk."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class Held:
    """Rows of one layer that were read lately, C for each KV head; the one used least lately goes.

    rows [B, G, C, 2, D]; token [B * G, C] whose they are, -1 = nobody's; used [B * G, C] when they
    were asked for last; slot [B * G, capacity] where a token's row is, -1 = not here.
    """

    def __init__(self, store, slots: int):
        B, G, capacity = store.shape[:3]
        self.store = store.flatten(0, 2).flatten(1)
        self.rows = store.new_zeros(B, G, slots, *store.shape[3:])
        self.token, self.used = torch.full((2, B * G, slots), -1)
        kind = torch.int16 if slots < 2**15 else torch.int32
        self.slot = torch.full((B * G, capacity), -1, dtype=kind)

    @torch.inference_mode()
    def forget(self, length: int) -> None:
        """Gives up the rows of all tokens from `length` on; the others were used before now."""
        self.slot[:, length:] = -1
        self.used.clamp_(max=length - 1)
        for entries in self.used, self.token:
            entries[self.token >= length] = -1

    def fetch(self, tokens, now: int, read):
        """tokens [B * G, K] -> slots [B * G, K] int32, -1 where there is no token."""
        real = tokens >= 0
        slots = self.slot.gather(1, tokens.clamp(min=0)).long().masked_fill_(~real, -1)
        missing = real & (slots < 0)
        heads, at = (slots >= 0).nonzero(as_tuple=True)
        self.used[heads, slots[heads, at]] = now
        heads, at = missing.nonzero(as_tuple=True)
        if len(heads):
            rank = missing.cumsum(1)[heads, at] - 1
            oldest = self.used.topk(int(rank.max()) + 1, largest=False).indices
            free, new = oldest[heads, rank], tokens[heads, at]
            gone = self.token[heads, free]
            self.slot[heads[gone >= 0], gone[gone >= 0]] = -1
            self.slot[heads, new] = free.to(self.slot.dtype)
            self.token[heads, free], self.used[heads, free] = new, now
            slots[heads, at] = free
            rows = read(self.store, heads * self.slot.shape[1] + new)
            self.rows.flatten(0, 2).flatten(1)[heads * self.token.shape[1] + free] = rows
        return slots.int()


class PinnedCache(Elsewhere):
    """Rows in the host's memory, where the GPU's kernels read and write them over the bus, in the
    order in which they are launched: for everybody else they are tensors of the GPU.

    Dense attention reads copies of a layer; the next one's is made meanwhile, on a stream beside.
    A sparse step fetches rows: on that stream too, and ahead, those that a producer has chosen.
    `held[layer]`, the tokens and rows of the latest fetch, saves the next one what both have.
    """

    capturable, folder = False, "this machine's memory"

    def room(self, shape, dtype, device):
        self.host, store = host_rows(shape, dtype, device)
        self.copies, self.copied = None, {}  # room for two layers, while steps are dense
        self.places = torch.zeros(shape[:-2], dtype=torch.int32, device=device)
        self.missed = torch.zeros((), dtype=torch.long, device=device)  # counted by a GPU alone
        self.unit = 2 * shape[-1] * dtype.itemsize
        self.streams, self.device = torch.get_device_module(device), device
        self.beside = self.streams.Stream(device)
        return store

    @property
    def main(self):
        return self.streams.current_stream(self.device)

    def whole(self, layer, keys, values):
        if layer == 0:
            return keys, values
        old, end = (0 if self.ragged else self.size), keys.shape[2]
        if self.copies is None:
            self.copies = self.store.new_empty(2, *self.store.shape[1:])
        if layer not in self.copied:
            self.copy(layer, old)
        if layer < len(self.store):
            self.copy(layer + 1, old)
        self.main.wait_event(self.copied.pop(layer))
        rows = self.copies[layer % 2]
        rows[:, :, old:end] = self.store[layer - 1, :, :, old:end]
        return rows[:, :, :end, 0], rows[:, :, :end, 1]

    def copy(self, layer: int, end: int) -> None:
        """Starts to copy the rows of a layer's first `end` tokens."""
        heads = (rows.flatten(0, 1) for rows in (self.copies[layer % 2], self.host[layer - 1]))
        self.beside.wait_stream(self.main)
        with self.streams.stream(self.beside):
            for copy, head in zip(*heads, strict=True):  # [capacity, 2, D], each of one piece
                copy[:end].copy_(head[:end], non_blocking=True)
            self.copied[layer] = self.beside.record_event()

    def read_ahead(self, layers, tokens):
        self.settle()
        self.beside.wait_stream(self.main)
        with self.streams.stream(self.beside):
            for layer, chosen in zip(layers, tokens, strict=True):
                before = self.fetch(layer, chosen[:, :, 0])
                self.coming[layer] = self.beside.record_event(), before

    def settle(self) -> None:
        """Later launches wait for the fetches ahead. Rows held before, which these read, were kept
        in `coming` till now, or PyTorch would have given their memory to others too early."""
        self.main.wait_stream(self.beside)
        self.coming.clear()

    def rows_of(self, layer, keys, values, index):
        if layer in self.coming:
            self.main.wait_event(self.coming.pop(layer)[0])
        self.copies, self.copied = None, {}
        self.fetch(layer, index[:, :, 0])
        slots = torch.arange(index.shape[-1], dtype=torch.int32, device=index.device)
        return *self.held[layer][1].unbind(3), torch.where(index < 0, -1, slots)

    def fetch(self, layer: int, tokens):
        """Holds the rows of tokens [B, G, K], -1 = empty -> what was held before."""
        before, at = self.held.get(layer), layer - 1
        rows = fetch_rows(self.store[at], tokens, before, self.places[at], self.missed)
        self.held[layer] = tokens, rows
        return before

    def truncate(self, length):
        super().truncate(length)
        self.settle()
        for told in self.held, self.copied:
            told.clear()


def host_rows(shape, dtype, device):
    """Zeros in the host's memory, as a tensor of the host and the same as one of the device, whose
    kernels reach page-locked memory over the bus."""
    host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
    if device.type != "cuda":
        return host, host
    there = {"shape": (host.nbytes,), "typestr": "|u1", "data": (host.data_ptr(), False),
             "version": 3}
    memory = SimpleNamespace(__cuda_array_interface__=there, host=host)  # which the tensor keeps
    return host, torch.as_tensor(memory, device=device).view(dtype).view(shape)


if __name__ == "__main__":
    from butler import load_for
    from model import Llama, resolve

    llama = Llama.from_pretrained(resolve())
    ids = torch.arange(1000, 1600)[None]
    cache = llama.new_cache(1, 700, kind=cache_kind("disk"))
    selector = load_for(llama).selector(budget=0.1)
    selector.read_ahead = cache.read_ahead
    llama.prefill(ids, cache, selector.watch)
    print(f"store {list(cache.store.shape)}, {cache.store.nbytes / 1e6:.0f} MB in {cache.folder}")
    for step in range(1, 3):  # later ones find all of the file in memory
        before, stored = cache.traffic, len(cache.store) * 3 * cache.size
        llama.decode(ids[:, step : step + 1], cache, selector)
        asked, missed = (a - b for a, b in zip(cache.traffic, before, strict=True))
        print(f"step {step}: {asked:,} of {stored:,} rows asked for, {missed:,} of them read")
