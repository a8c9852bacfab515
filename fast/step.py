"""fast/step.py - a whole decode step of one text in one compiled call.

    x [C], the token's embedding
      -> for each layer: at a producer, predict and choose for the next R layers
                         norm, q k v, rope, append to the cache, attend, o
                         norm, MLP
      -> norm, lm_head -> logits [V]

At a single token most operations take microseconds, and so does every call from Python. Here `step`
calls the compiled loops of packed.py and loops.py directly. It computes what model.Llama.forward
computes with the selector of fast/selector.py.

The loops over the rows of a matrix, the tokens attended to and the KV heads that choose run on all
cores: five times per layer, three times per producer, once for the logits. All else is too short to
be shared.
"""

from typing import NamedTuple

import numpy as np

from fast.loops import (
    LOG2E,
    attend,
    choose,
    compiled,
    cos_sin,
    exp2_in_place,
    mark_due,
    predict,
    project_token,
)
from fast.packed import TILE, Packed, as_float32, multiply, of_layer, pack


class Weights(NamedTuple):
    """The model's weights, but for the embedding. Matrices of all L layers lie in one table."""

    frequencies: np.ndarray  # of the rotary embedding, [D/2]
    eps: float  # of all norms
    first_norm: np.ndarray  # [L, C]
    qkv: Packed
    o: Packed
    second_norm: np.ndarray  # [L, C]
    gate_up: Packed
    down: Packed
    last_norm: np.ndarray  # [C]
    lm_head: Packed

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads."""
        return sum(getattr(weights, "nbytes", 0) for weights in self[1:])

    @classmethod
    def of(cls, llama, tensors) -> "Weights | None":
        """The weights of a model.Llama; None if a matrix has no packed form. tensors: of its GGUF
        file, see packed.pack."""
        attentions = [block.self_attn for block in llama.layers]
        mlps = [block.mlp for block in llama.layers]
        qkv = pack([[a.q_proj, a.k_proj, a.v_proj] for a in attentions], tensors,
                   llama.config.head_dim)
        if qkv is None:  # most models without packed forms end here, soon
            return None
        o = pack([[a.o_proj] for a in attentions], tensors)
        gate_up = pack([[m.gate_proj, m.up_proj] for m in mlps], tensors)
        down = pack([[m.down_proj] for m in mlps], tensors)
        lm_head = pack([[llama.lm_head]], tensors)
        if None in (o, gate_up, down, lm_head):
            return None
        first_norm = np.stack([as_float32(b.input_layernorm.weight) for b in llama.layers])
        second_norm = np.stack([as_float32(b.post_attention_layernorm.weight)
                                for b in llama.layers])
        return cls(as_float32(llama.frequencies), llama.norm.eps, first_norm, qkv, o, second_norm,
                   gate_up, down, as_float32(llama.norm.weight), of_layer(lm_head, 0))


class ButlerWeights(NamedTuple):
    """The butler's weights. P producers; a table of L-1 layers begins with layer 1."""

    layers_per_producer: int
    eps: float
    norm_weight: np.ndarray  # [P, C]
    norm_bias: np.ndarray  # [P, C]
    up: np.ndarray  # [P, hidden, C]
    out: np.ndarray  # [L-1, G, E, hidden]
    key_projection: np.ndarray  # [L-1, G, D, E]
    rope: np.ndarray  # of the base model's keys, [L-1, D/2]
    importance_rope: np.ndarray  # [E/2]


class Selection(NamedTuple):
    """What a step reads and writes of a selector, and of layers 1 ... L-1."""

    int8_codes: np.ndarray  # importance keys, [L-1, G, capacity/64, E, 64]
    scales: np.ndarray  # [L-1, G, capacity]
    sinks: int
    window: int
    drift: float
    asked: np.ndarray  # see selector.Refresh, [L-1, G, E]
    age: np.ndarray  # [L-1, G]
    due: np.ndarray  # [L-1, G], written
    queries: np.ndarray  # [L-1, G, E], written
    index: np.ndarray  # the tokens attended to: sinks, window, chosen ones, [L-1, G, K], written


def no_butler() -> tuple[ButlerWeights, Selection]:
    """A butler of no layers, for dense steps: the same compiled code serves both."""

    def empty(ndim, dtype=np.float32):
        return np.empty((0,) * ndim, dtype)

    weights = ButlerWeights(1, 1e-5, empty(2), empty(2), empty(3), empty(4), empty(4), empty(2),
                            empty(1))
    selection = Selection(empty(5, np.int8), empty(3), 0, 0, 0.0, empty(3), empty(2, np.int64),
                          empty(2, np.bool_), empty(3), empty(3, np.int32))
    return weights, selection


# ---------------------------------------------------------------------------- parts of a step


@compiled
def rms_norm(x, weight, eps):
    out = np.empty_like(x)
    total = np.float32(0)
    for c in range(len(x)):
        total += x[c] * x[c]
    scale = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for c in range(len(x)):
        out[c] = x[c] * scale * weight[c]
    return out


@compiled
def add(x, out):
    """x += out, both [C]"""
    for c in range(len(x)):
        x[c] += out[c]


@compiled
def append(k, v, keys, values, position):
    """Writes a token's k, v [G, D] to the cache of a layer, [G, capacity, D]."""
    for g in range(len(k)):
        for d in range(k.shape[1]):
            keys[g, position, d] = k[g, d]
            values[g, position, d] = v[g, d]


@compiled
def rotate(head, cos, sin):
    """model.apply_rope of one head [D], in place; cos, sin [D/2]."""
    half = len(head) // 2
    for i in range(half):
        a = head[i]
        b = head[i + half]
        head[i] = a * cos[i] - b * sin[i]
        head[i + half] = b * cos[i] + a * sin[i]


@compiled
def silu_product(gate, up, out):
    """out = silu(gate) * up, all [M]"""
    decay = np.empty_like(gate)
    for m in range(len(gate)):
        decay[m] = -abs(gate[m]) * np.float32(LOG2E)
    exp2_in_place(decay, np.float32(0))
    for m in range(len(gate)):  # gate / (1 + exp(-gate)), where decay is exp(-|gate|)
        share = decay[m] if gate[m] < 0 else np.float32(1)
        out[m] = gate[m] * up[m] * share / (1 + decay[m])


@compiled
def choose_ahead(producer, x, position, b, s):
    """Predict from x [C], the input of a producer's layer, and choose for the layers it serves."""
    start = producer * b.layers_per_producer
    stop = start + b.layers_per_producer  # the last producer serves fewer layers
    queries = s.queries[start:stop]
    due = s.due[start:stop]
    predict(x, b.norm_weight[producer], b.norm_bias[producer], b.eps, b.up[producer],
            b.out[start:stop], position, b.importance_rope, queries)
    mark_due(queries, s.asked[start:stop], s.age[start:stop], s.drift, due)
    choose(queries, s.int8_codes[start:stop], s.scales[start:stop], s.sinks,
           max(position + 1 - s.window, s.sinks), s.index[start:stop], s.sinks + s.window, due)


# ---------------------------------------------------------------------------- the step


@compiled
def step(x, position, keys, values, w, b, s, logits):
    """x [C]: the embedding of the token, overwritten; keys, values [L, G, capacity, D]: the cache
    of `position` tokens; w: Weights; b, s: ButlerWeights and Selection. Writes logits [V]."""
    L, G, _, D = keys.shape
    qkv = np.empty(w.qkv.codes.shape[1] * TILE, np.float32)
    H = len(qkv) // D - 2 * G
    q = qkv[: H * D].reshape(G, H // G, D)  # views: `multiply` fills all three at once
    k = qkv[H * D : (H + G) * D].reshape(G, D)
    v = qkv[(H + G) * D :].reshape(G, D)
    attended = np.empty((G, H // G, D), np.float32)
    gate_up = np.empty(w.gate_up.codes.shape[1] * TILE, np.float32)
    gate = gate_up[: len(gate_up) // 2]
    up = gate_up[len(gate_up) // 2 :]
    hidden = np.empty_like(gate)
    out = np.empty_like(x)
    all_tokens = np.empty((G, 0), np.int32)  # an index of no slots
    cos, sin = cos_sin(position, w.frequencies)

    for layer in range(L):
        if layer < len(s.index) and layer % b.layers_per_producer == 0:
            choose_ahead(layer // b.layers_per_producer, x, position, b, s)
        index = s.index[layer - 1] if 0 < layer <= len(s.index) else all_tokens

        multiply(rms_norm(x, w.first_norm[layer], w.eps), of_layer(w.qkv, layer), qkv)
        for h in range(H + G):
            rotate(qkv[h * D : (h + 1) * D], cos, sin)
        append(k, v, keys[layer], values[layer], position)
        if 0 < layer <= len(s.index):
            project_token(k, b.key_projection[layer - 1], position, b.rope[layer - 1],
                          b.importance_rope, s.int8_codes[layer - 1], s.scales[layer - 1])
        attend(q, keys[layer], values[layer], index, position + 1, attended)
        multiply(attended.reshape(H * D), of_layer(w.o, layer), out)
        add(x, out)

        multiply(rms_norm(x, w.second_norm[layer], w.eps), of_layer(w.gate_up, layer), gate_up)
        silu_product(gate, up, hidden)
        multiply(hidden, of_layer(w.down, layer), out)
        add(x, out)

    multiply(rms_norm(x, w.last_norm, w.eps), w.lm_head, logits)
