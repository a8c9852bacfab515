"""model.py - a Llama from scratch: weights in, logits out, one explicit KV cache.

    tokens [B, T] -> embed [B, T, C] -> L x ( attention, MLP ) -> norm -> logits [B, T, V]
                                              |
                     k, v [B, G, T, D] -> Cache -> keys, values [B, G, S, D]
                                              |
                         selector(layer, x, q, keys, positions) -> which keys to attend to

One forward serves prefill, chunked prefill, decoding and scoring a text; they differ in T and in
the cache. A *selector* is any callable: given the layer's input x [B, T, C], the rotated queries
q [B, H, T, D], all cached keys [B, G, S, D] and the positions [B, T] of the new tokens, it returns
the indices [B, G, T, K] (int32, -1 = empty) of the tokens that each query may attend to, or None
for all of them. The model knows no selector by name; dense attention is `selector=None`. One that
can choose `early` may be asked before the layer computes q and k: q is None then, and the last row
of the keys is still unwritten.

    o = softmax(q . k[idx] / sqrt(D)) . v[idx]        rotary position embedding: arXiv 2104.09864

Weights come from a Hugging Face folder or a GGUF file, found by name and read in loading/.

Dimensions, one letter each (in cpu/, N and R also count rows): B batch, T new tokens, S cached
tokens, C width, H query heads, G KV heads, D head size, L layers, E butler size, K tokens kept, R
layers served by one producer.

    python model.py        prints a short trace of shapes
"""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ModelError
from cpu import loops
from cpu.packed import PackedBlock, PackedHead, PackedLayers, few
from kernel import on_gpu, sparse_attention, triton_decode
from loading.fetch import resolve
from loading.weights import Config, read


def rope_frequencies(config: Config) -> torch.Tensor:
    """Radians per position of each pair of channels, [D/2] float32, context extension included."""
    channels = torch.arange(0, config.head_dim, 2, device="cpu").float()
    inv = config.rope_theta ** -(channels / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return inv
    if s["type"] == "linear":
        return inv / s["factor"]
    # llama3: long wavelengths are stretched by `factor`, short ones kept, a ramp between the two
    rounds = s["original_max_position_embeddings"] * inv / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((rounds - low) / (high - low)).clamp(0, 1)
    return inv * (keep + (1 - keep) / s["factor"])


# ---------------------------------------------------------------------------- the KV cache


class Cache:
    """Keys (already rotated) and values of every layer, preallocated for `capacity` tokens a row.

    `k[layer]` and `v[layer]` [B, G, capacity, D] are apart: with a token's value next to its key,
    gathering a few tokens is no faster, and reading all of them much slower.

    Rows may have different lengths: new tokens of row b are written after its own `lengths[b]`.
    Layers write; only `Llama.forward` advances, once, when all of them have.
    """

    def __init__(self, config: Config, batch, capacity, dtype=torch.float32, device="cpu"):
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        self.capacity, self.size = capacity, 0  # size: tokens in the longest row
        self.k, self.v = self.allocate(config.layers, shape, dtype, device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.ragged = False

    def allocate(self, layers: int, shape, dtype, device):
        """-> keys, values: two lists of tensors [B, G, capacity, D], views of `tables` [2, layers,
        B, G, capacity, D]. A cache that keeps them elsewhere has no tables (beyond/offload.py)"""
        self.tables = torch.zeros(2, layers, *shape, dtype=dtype, device=device)
        return map(list, self.tables)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.k + self.v)

    def append(self, layer: int, k, v):
        """k, v [B, G, T, D] -> all keys and values [B, G, S, D], the new ones included."""
        T = k.shape[2]
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.ragged:
                rows = torch.arange(k.shape[0], device=k.device)[:, None]
                at = self.lengths[:, None] + torch.arange(T, device=k.device)
                buffer[rows, :, at] = new.transpose(1, 2).to(buffer.dtype)
            else:
                buffer.narrow(2, self.size, T).copy_(new)
        end = self.size + T
        return self.k[layer].narrow(2, 0, end), self.v[layer].narrow(2, 0, end)

    def positions(self, T: int, lengths, context: int, given=None):
        """Of T new tokens a row, of which the first lengths[b] are real (None: all) -> [B, T].
        Raises ModelError when the cache or the model's context is too short, or if the caller's
        own positions are `given` but not for a text that is read at once."""
        if given is not None and (T == 1 or self.size):
            raise ModelError("positions with gaps are for a text that is read at once")
        end = real = self.size + T
        if lengths is not None:  # padding may lie beyond the context
            real = int((self.lengths + lengths).max())
        if end > self.capacity or real > context:
            raise ModelError(f"{end} tokens do not fit: the cache holds {self.capacity}, "
                             f"the model's context is {context}")
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def advance(self, T: int, lengths=None) -> None:
        """After a forward of T tokens a row, of which the first lengths[b] were real."""
        if lengths is None:
            self.lengths += T
            self.size += T
        else:
            self.lengths += lengths
            self.size = int(self.lengths.max())
            self.ragged = bool((self.lengths != self.size).any())

    def truncate(self, length) -> None:
        """Forget what comes after the first `length` tokens (a number, or one per row [B])."""
        self.lengths.clamp_(max=length)
        self.size = int(self.lengths.max())
        self.ragged = bool((self.lengths != self.size).any())

    # What follows is for caches that lie elsewhere, or whose steps are recorded: beyond/

    capturable = True  # may a decode step be a CUDA graph?
    asked, missed = 0, 0  # rows that steps asked for, and those that were not here

    def read_ahead(self, layers: list, tokens) -> None:
        """Is told what layers to come will ask for; here there is nothing to fetch."""

    def at_hand(self, layer: int, keys, values, index):
        """Keys, values and a selection [B, G, T, K] of them -> the same three, or other keys and
        values that hold what was selected, with its indices there."""
        return keys, values, index

    def whole(self, layer: int, keys, values):
        """All keys and values of a layer -> the same, or copies faster to read."""
        return keys, values

    @property
    def traffic(self) -> tuple[int, int]:
        return self.asked, int(self.missed)


# ---------------------------------------------------------------------------- the network


def turns(angles):
    """Angles [..., D/2] -> cos, sin [..., D] for `rotate`."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotary embedding -> float32: channel i turns with i + D/2, which is Hugging Face's layout."""
    x = x.float()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def dense_attention(q, k, v, positions, ragged: bool, dtype=None):
    """Causal attention of q [B, H, T, D] over all of k, v [B, G, S, D] -> [B, H, T, D]. dtype: of
    the numbers that a block's products may be made of."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    if T == 1 and ragged and on_gpu(q):
        return triton_decode(q[:, :, 0], k, v, None, positions[:, 0])[:, :, None]
    if T == 1 and loops.serves(q, k, v):
        return loops.attend(q, k, v, positions=positions)
    if dtype == fast_dtype() == torch.bfloat16 and T >= 32 and not ragged and loops.serves(q, k, v):
        return loops.attend_block(q, k, v)
    if T == 1 and not ragged:  # one query sees everything: fold the group into the query axis
        return F.scaled_dot_product_attention(q.view(B, G, H // G, D), k, v).reshape(q.shape)
    if T == S and not ragged:  # is_causal aligns top-left: right when nothing is cached yet
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if not ragged and q.device.type == "cpu":
        return attention_behind(q, k, v)
    mask = torch.arange(S, device=q.device) <= positions[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attention_behind(q, k, v):
    """Causal attention of a block that comes after others, without a mask, which would halve the
    speed: past tokens and the block's own are attended to apart, and merged by their shares of the
    softmax's denominator. (PyTorch's own kernel; only its private name gives the denominator.)"""
    B, H, T, D = q.shape
    G, past = k.shape[1], k.shape[2] - T
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    old, old_sum = flash(q.reshape(B, G, H // G * T, D), k[:, :, :past], v[:, :, :past])
    own = (x[:, :, past:].repeat_interleave(H // G, dim=1) for x in (k, v))
    new, new_sum = flash(q, *own, is_causal=True)
    share = torch.sigmoid(old_sum.reshape(B, H, T, 1) - new_sum.reshape(B, H, T, 1))
    return new.lerp(old.view(B, H, T, D), share.to(new.dtype))


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        self.qkv_proj = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim,
                                  bias=c.attention_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=c.attention_bias)

    def qkv(self, x, cos, sin):
        """Normed x [B, T, C] -> q [B, H, T, D], k [B, G, T, D], rotated float32; v [B, G, T, D]"""
        H, G = self.heads, self.kv_heads
        heads = self.qkv_proj(x).unflatten(-1, (H + 2 * G, -1)).transpose(1, 2)
        turned = rotate(heads[:, : H + G], cos, sin)
        return turned[:, :H], turned[:, H:], heads[:, H + G :]


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.width, 2 * c.mlp_width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=c.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c)

    @cached_property
    def packed(self):
        """The same block for a few tokens (cpu/packed.py), or None."""
        return PackedBlock.of(self)

    def before(self, x, cos, sin):
        """-> q [B, H, T, D], k, v [B, G, T, D]"""
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

    def after(self, x, attended):
        """Input x [B, T, C] and attended [B, H, T, D] -> output [B, T, C]"""
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2).to(x.dtype))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, rope, positions, cache, selector):
        form = self.packed if few(x) and self.packed and few(x, self.packed.limit) else self
        if form is self:
            x = x.to(self.input_layernorm.weight.dtype)  # a packed block's are float32
        q, k, v = form.before(x, *rope)
        keys, values = cache.append(self.layer, k, v)
        q = q.to(keys.dtype)
        index = selector(self.layer, x, q, keys, positions) if selector else None
        if index is None:
            whole = cache.whole(self.layer, keys, values)
            out = dense_attention(q, *whole, positions, cache.ragged, x.dtype)
        else:
            out = sparse_attention(q, *cache.at_hand(self.layer, keys, values, index))
        return form.after(x, out)


class Llama(nn.Module):
    """The whole model. Parameters are named as in Hugging Face's files, less the `model.`; those
    that multiply the same input are the rows of one matrix, `qkv_proj` and `gate_up_proj`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.width)
        if not embedding.is_meta:  # else PyTorch would import its compiler, which takes seconds
            embedding.normal_()
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        self.frequencies = rope_frequencies(config)

    def tie(self) -> None:
        """One matrix for embedding and logits, where the model has but one."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def places(self) -> dict:
        """{name in Hugging Face's files: (name of the parameter here, rows of it, their shape)}"""
        c = self.config
        stacked = {"qkv_proj": {"q_proj": c.heads * c.head_dim, "k_proj": c.kv_heads * c.head_dim,
                                "v_proj": c.kv_heads * c.head_dim},
                   "gate_up_proj": {"gate_proj": c.mlp_width, "up_proj": c.mlp_width}}
        places = {}
        for name, p in self.named_parameters():
            module, start = name.split(".")[-2], 0
            for part, rows in stacked.get(module, {module: len(p)}).items():
                shape = torch.Size([rows, *p.shape[1:]])
                places[name.replace(module, part)] = name, slice(start, start + rows), shape
                start += rows
        return places

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def new_cache(self, batch: int, capacity: int, dtype=None, kind=Cache) -> Cache:
        """Room for `capacity` tokens a row, where `kind` says (beyond/offload.py); by default as
        the weights on a GPU, float32 on a CPU, where few rows of bfloat16 take longer to read."""
        default = torch.float32 if self.device.type == "cpu" else self.embed_tokens.weight.dtype
        return kind(self.config, batch, capacity, dtype or default, self.device)

    def forward(self, tokens, cache=None, selector=None, lengths=None, last=False, positions=None):
        """tokens [B, T] -> logits [B, T, V]; [B, 1, V] of each row's last real token if `last`.

        cache: continues after what it holds, and is advanced; None starts from nothing.
        lengths: real tokens per row (ints) where rows are padded on the right; None: all T.
        positions: [B, T], rising, if there are gaps in a text that is read at once; None: no gaps.
        On a CPU one token goes through cpu/packed.py's compiled form of all layers, which computes
        what the loop over `Block.forward` does, and is tested against it.
        Raises ModelError when the cache or the model's context is too short.
        """
        B, T = tokens.shape
        cache = cache or self.new_cache(B, T)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=tokens.device)
        here = cache.positions(T, lengths, self.config.context, positions)
        positions, x = here if positions is None else positions, self.embed_tokens(tokens)
        self.frequencies = self.frequencies.to(x.device)  # moves once
        rope = turns(positions[:, None, :, None] * self.frequencies)  # [B, 1, T, D]
        if few(x) and self.packed and self.packed.serve(x, cache, selector):
            x = self.packed(x, rope, positions, cache, selector)
        else:
            for block in self.layers:
                x = block(x, rope, positions, cache, selector)
        cache.advance(T, lengths)
        if last:
            x = x[torch.arange(B, device=x.device), T - 1 if lengths is None else lengths - 1]
            x = x[:, None]
        if few(x) and self.packed_head and few(x, self.packed_head.limit):
            return self.packed_head(x)
        return self.lm_head(self.norm(x.to(self.norm.weight.dtype)))

    @cached_property
    def packed(self):
        """All layers, for a step of one token a row, or None."""
        return PackedLayers.of(self.layers)

    @cached_property
    def packed_head(self):
        return PackedHead.of(self.norm, self.lm_head)

    @torch.inference_mode()
    def prefill(self, tokens, cache, selector=None, lengths=None, chunk=512):
        """Reads tokens [B, T] in chunks (bounded memory) -> logits [B, 1, V] of each row's last.
        lengths: as in `forward`, at least 1."""
        if lengths is None:
            for part in tokens.split(chunk, dim=1):
                logits = self(part, cache, selector, last=True)
            return logits
        rest, logits = torch.as_tensor(lengths, device=tokens.device), 0.0
        for part in tokens.split(chunk, dim=1):
            real = rest.clamp(0, part.shape[1])
            new = self(part, cache, selector, real, last=True)
            logits = torch.where(real[:, None, None] > 0, new, logits)
            rest = rest - real
        return logits

    @torch.inference_mode()
    def decode(self, token, cache, selector=None):
        """One step: token [B, 1] -> logits [B, 1, V]."""
        return self(token, cache, selector)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "Llama":
        """A Hugging Face folder or a GGUF file -> a frozen Llama. Raises ModelError in one line."""
        check_device(device)
        config, tensors, factors = read(path)
        with torch.device("meta"):  # shapes only: nothing is allocated before it has been checked
            model = cls(config)
        places, state = model.places(), {}
        missing = set(places)
        for name, tensor in tensors:
            owner, rows, shape = places.get(name, (None, None, ()))
            if owner is None or tensor.shape != shape or not tensor.is_floating_point():
                raise ModelError(f"{path}: tensor {name!r} {tuple(tensor.shape)} {tensor.dtype} "
                                 f"does not belong there, expected {tuple(shape)}")
            if owner not in state:
                like = model.get_parameter(owner)
                state[owner] = torch.empty_like(like, device=device, dtype=dtype)
            state[owner][rows] = tensor
            missing.discard(name)
        if missing:
            raise ModelError(f"{path}: {len(missing)} tensors are missing, first {min(missing)}")
        model.load_state_dict(state, assign=True, strict=False)  # a tied matrix is there once
        model.tie()
        model.frequencies = model.frequencies / factors
        return model.eval().requires_grad_(False)


def check_device(device) -> None:
    """Raises ModelError, one line, if PyTorch cannot compute there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ModelError(f"device {device!r} cannot be used here") from None


def fast_dtype(device="cpu") -> torch.dtype:
    """bfloat16 where this machine multiplies it in hardware, else float32."""
    if str(device).startswith("cuda"):
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


if __name__ == "__main__":
    llama = Llama.from_pretrained(resolve())
    print(llama.config)
    kv = llama.new_cache(batch=1, capacity=8)
    print("prefill [1, 7] ->", list(llama.prefill(torch.arange(7)[None], kv).shape))
    print("decode  [1, 1] ->", list(llama.decode(torch.tensor([[7]]), kv).shape))
    print(f"a cached token costs {kv.bytes // 8:,} bytes; the weights of the model, "
          f"{sum(p.numel() for p in llama.parameters()):,} numbers, are read once for every token")
