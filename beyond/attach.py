"""beyond/attach.py - any transformers decoder behind the selectors of this repository.

    model.generate -> decoder --hook--> begin: how many tokens are cached, how many are padding
                      layer   --hook--> x, what a producer reads
                      attention function "tokenbutler": q, all keys -> selector -> idx -> attention

Only what transformers offers for it is used: a function registered with its AttentionInterface,
forward pre-hooks, `set_attn_implementation`, and whatever cache the model is given. A prompt (more
than one token at a time) is read densely, by transformers' own `sdpa`, and watched; a single token
goes through the selector. A text that begins at position 0, or another cache, gets a fresh one.

Layers with full attention are selected. Those with a sliding window stay as they are: they read
few tokens anyway. So a selector's layer 0 is the decoder's, dense as always, and its layers 1, 2
and so on are those with full attention behind it; a butler's strides count these. Soft caps
(Gemma 2) are applied to what was selected; the oracle and the butler's teacher rank without them,
which is the same order for each query head.

Which channels turn with the position, and how fast, is asked of the model's own rotary module and
then measured: the same tokens at two places must have the same keys once these are turned back. A
layer whose keys are the same unturned has no positions (SmolLM3). What is neither is refused.

On a GPU, `generate` compiles its steps when it is given a static cache: disable_compile=True. Beam
search moves rows of the cache that a selector knows nothing of, and is refused.

    with attached(model, lambda: butler.selector(0.05)):     butler = butler_for(model, FILE)
        model.generate(**inputs)

    python -m beyond.attach        a tiny random Qwen3 behind the oracle
"""

import weakref
from contextlib import closing
from functools import partial

import torch

from butler import Butler, load_for, turned_back
from common.errors import ModelError
from kernel import fetch, mark, raw_scores, sparse_attention
from loading.weights import Config
from model import dense_attention

NAME = "tokenbutler"
HELD = weakref.WeakKeyDictionary()  # attention module -> weak (who attends instead), its layer
CHANGING = "dynamic", "longrope"  # rotary frequencies that depend on the text's length


def transformers():
    """The optional package, our attention function registered with it."""
    try:
        import transformers as package
    except ImportError:
        raise ModelError("this needs the optional package: pip install transformers") from None
    package.AttentionInterface.register(NAME, attention)
    package.AttentionMaskInterface.register(NAME, package.AttentionMaskInterface()["sdpa"])
    return package


def attention(module, query, key, value, attention_mask, **rules):
    """What transformers calls: q [B, H, T, D], k and v [B, G, S, D] -> [B, T, H, D], None"""
    if rules.get("s_aux") is not None or rules.get("position_bias") is not None:
        raise ModelError("attention with sinks or biases of its own cannot be selected from")
    attend = own  # in another model of the same configuration, or in a part that reads images
    if module in HELD:
        holder, layer = HELD[module]
        attend = partial(holder().attend, layer)
    out = attend(module, query, key, value, attention_mask, rules)
    return out.transpose(1, 2).contiguous(), None


def own(module, q, k, v, mask, rules):
    """transformers' own attention -> [B, H, T, D]; with a soft cap, which its sdpa lacks, ours."""
    if rules.get("softcap") is None:
        return transformers().AttentionInterface()["sdpa"](
            module, q, k, v, mask, **rules)[0].transpose(1, 2)
    if mask is None:
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask.dtype != torch.bool:  # numbers to add
        mask = mask > -1
    return masked(scaled(q, rules), k, v, mask, rules)


def scaled(q, rules):
    """Queries such that q . k / sqrt(D) is the model's own score."""
    factor = (rules.get("scaling") or q.shape[-1] ** -0.5) * q.shape[-1] ** 0.5
    return q if abs(factor - 1) < 1e-6 else q * factor


def masked(q, k, v, keep, rules):
    """q [B, H, T, D], k, v [B, G, S, D], keep [T, S] or [B, 1 or G, T, S] -> [B, H, T, D], soft cap
    included. A query that may see nothing sees everything: it is padding, and must not become
    NaN."""
    scores, cap = raw_scores(q, k), rules.get("softcap")  # [B, G, H/G, T, S]
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores.masked_fill(~keep.unsqueeze(-3), torch.finfo(torch.float32).min)
    return (scores.softmax(dim=-1).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def selected(q, k, v, idx, rules):
    """Attention to the tokens that idx [B, G, T, K] names -> [B, H, T, D]; q as `scaled` made it"""
    idx = idx.to(k.device)
    if rules.get("softcap") is None:
        return sparse_attention(q, k, v, idx)
    if q.shape[2] > 1:
        return masked(q, k, v, mark(idx, k.shape[2]), rules)
    return masked(q, *fetch(k, v, idx[:, :, 0].clamp(min=0)), idx >= 0, rules)


# ---------------------------------------------------------------------------- what a decoder is


class Hold:
    """Attends in place of all layers of a decoder until `close`: subclasses say how, `attend`.
    `x` holds the input of the layer that runs."""

    def __init__(self, model):
        self.model, self.decoder, self.x = model, model.get_decoder(), None
        attentions = [layer.self_attn for layer in self.decoder.layers]
        if any(module in HELD for module in attentions):
            raise ModelError("this model is attached already")
        self.before = model.config._attn_implementation
        transformers()
        HELD.update((module, (weakref.ref(self), i)) for i, module in enumerate(attentions))
        self.hooks = [layer.register_forward_pre_hook(self.see, with_kwargs=True)
                      for layer in self.decoder.layers]
        model.set_attn_implementation(NAME)

    def see(self, layer, args, kwargs):
        self.x = args[0] if args else kwargs["hidden_states"]

    def close(self) -> None:
        self.model.set_attn_implementation(self.before)
        for hook in self.hooks:
            hook.remove()
        for layer in self.decoder.layers:
            HELD.pop(layer.self_attn, None)


class Listener(Hold):
    """Dense attention; keeps the keys of every layer, in float32 on the CPU."""

    def attend(self, i, module, q, k, v, mask, rules):
        self.keys[i] = k.float().cpu()
        return own(module, q, k, v, mask, rules)

    @torch.no_grad()
    def hear(self, start: int) -> dict:
        """The keys of some tokens that stand at `start` and behind."""
        self.keys, table = {}, self.model.get_input_embeddings().weight
        device = "cpu" if table.is_meta else table.device  # it is offloaded: accelerate's hooks
        tokens = torch.arange(1, 9, device=device)[None] * 7 % len(table)
        places = torch.arange(start, start + 8, device=device)[None]
        self.model(input_ids=tokens, position_ids=places, use_cache=False)
        return self.keys


class Anatomy:
    """What a butler asks of a model: `config`, `layers`, `frequencies` [D/2], or [L - 1, D/2] where
    layers differ, and `device`. `numbers` {layer: its number for a selector}; `windows` [of each
    layer: tokens, or None]. Raises ModelError, one line, for what cannot be selected from."""

    def __init__(self, model):
        self.model, self.c = model, model.config.get_text_config()
        try:
            self.understand()
        except ModelError:
            raise
        except Exception as e:  # families differ in whatever they can
            self.no(f"{type(e).__name__}: {e}")

    def understand(self) -> None:
        self.refuse()
        model, c = self.model, self.c
        self.layers = model.get_decoder().layers
        self.device = model.get_input_embeddings().weight.device
        window = getattr(c, "sliding_window", 0) or 1
        windows = [None if kind == "full_attention" or window >= c.max_position_embeddings
                   else window for kind in self.kinds]
        full = [i for i, window in enumerate(windows) if i and window is None]
        if not full:
            self.no(f"every layer has a window of {window} tokens, none attends to all")
        self.windows, self.numbers = windows, {i: n for n, i in enumerate([0, *full])}
        heads = c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        self.config = Config(c.vocab_size, c.hidden_size, len(self.numbers), heads,
                             getattr(c, "num_key_value_heads", None) or heads, head_dim,
                             getattr(c, "intermediate_size", 1), c.max_position_embeddings)
        self.frequencies = self.measured(full)

    def no(self, reason: str):
        raise ModelError(f"{type(self.model).__name__} cannot be selected from: {reason}")

    def refuse(self) -> None:
        c, layers = self.c, getattr(self.model.get_decoder(), "layers", ())
        self.kinds = list(getattr(c, "layer_types", None) or [
            "sliding_attention" if getattr(c, "sliding_window", None) else "full_attention"
        ] * len(layers))
        odd = set(self.kinds) - {"full_attention", "sliding_attention"}
        for holds, reason in (
                (c.is_encoder_decoder, "it has an encoder, whose keys are not the text's"),
                (hasattr(c, "kv_lora_rank"),
                 "its cache holds keys of all heads in one compressed form (MLA)"),
                (odd, f"it has layers of {min(odd, default='')}, neither full nor windowed "
                      "attention"),
                (c.model_type == "doge", "each of its layers masks tokens by a rule of its own"),
                (not layers or not all(hasattr(layer, "self_attn") for layer in layers),
                 "its layers have no self_attn with keys and values"),
                (getattr(c, "num_kv_shared_layers", 0),
                 "some of its layers read other layers' keys")):
            if holds:
                self.no(reason)

    def measured(self, full: list):
        """Radians a token of each pair of channels, as the model's rotary module has them, or zeros
        for a layer whose keys do not turn; checked by the keys of the same tokens at two places."""
        D, rotary = self.config.head_dim, getattr(self.model.get_decoder(), "rotary_emb", None)
        if rotary is None:
            self.no("it has no rotary module to ask for its frequencies")
        there, found = min(1000, self.config.context // 2), []
        with closing(Listener(self.model)) as listener:
            near, far = listener.hear(0), listener.hear(there)
        if not set(full) <= near.keys():
            self.no("its attention does not go through the AttentionInterface")
        for i in full:
            rope, kind = getattr(rotary, "rope_type", None), self.kinds[i]
            rope = rope[kind] if isinstance(rope, dict) else rope
            if rope in CHANGING:
                self.no(f"its rotary frequencies ({rope}) change with the length of the text")
            turning = getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None))
            turning = torch.zeros(0) if turning is None else turning.float().cpu()
            at, fits = torch.arange(8.0)[:, None], 2 * len(turning) == D
            if fits and agree(turned_back(near[i], at * turning),
                              turned_back(far[i], (at + there) * turning)):
                found.append(turning)
            elif agree(near[i], far[i]):
                found.append(torch.zeros(D // 2))
            elif not fits:
                self.no(f"only {2 * len(turning)} of a head's {D} channels turn")
            else:
                self.no(f"the keys of layer {i} do not turn in pairs of channels i and i + {D // 2}"
                        " at the frequencies of its rotary module")
        rows = torch.stack(found)
        return rows[0] if (rows == rows[0]).all() else rows


def agree(a, b) -> bool:
    """Are these keys [..., D] the same, but for rounding?"""
    return bool(((a - b).norm(dim=-1) / a.norm(dim=-1)).median() < 0.1)


def butler_for(model, path=None) -> Butler:
    """The butler at `path` (None: the shipped one), if it was trained for this model's weights."""
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError("a butler's model is known by its weights: some are not in memory here")
    return load_for(Anatomy(model), path)


# ---------------------------------------------------------------------------- attached


class Attachment(Hold):
    """See `attached`. `rows` of the text at hand: (slice of the batch, its padding, its selector);
    one for all where all have as much padding."""

    def __init__(self, model, make):
        self.make, self.anatomy = make, Anatomy(model)
        self.rows, self.pads, self.cache, self.end = [], [], None, 0
        super().__init__(model)
        self.hooks.append(self.decoder.register_forward_pre_hook(self.begin, with_kwargs=True))

    def see(self, layer, args, kwargs):
        super().see(layer, args, kwargs)
        known = kwargs.get("cache", kwargs.get("past_key_values"))
        self.cache = known if known is None else weakref.ref(known)
        if known is not None:
            known.reorder_cache = one_beam

    def close(self) -> None:
        super().close()
        if self.cache and (known := self.cache()):
            vars(known).pop("reorder_cache", None)

    def begin(self, decoder, args, kwargs) -> None:
        """A forward of T tokens begins."""
        tokens = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
                      if x is not None)
        known = kwargs.get("cache", kwargs.get("past_key_values"))
        (batch, T), start = tokens.shape[:2], 0 if known is None else int(known.get_seq_length())
        goes_on = start and self.cache and self.cache() is known and batch == len(self.pads)
        self.end = start + T
        if goes_on and T == 1:
            return
        pads = padding(kwargs.get("attention_mask"), batch, self.end)
        places = kwargs.get("position_ids")
        if places is not None and places.dim() > 2:  # of height and width too: as the text's
            places = places[-1]
        ends = torch.tensor([max(self.end - 1 - pad, 0) for pad in pads])
        if any(pads) if places is None else (places[:, -1].cpu() != ends).any():
            raise ModelError("position_ids must count from each row's first real token, one "
                             "by one, as those of `generate` do for text")
        if not goes_on or pads != self.pads:
            self.pads = pads
            self.rows = [(slice(None), pads[0], self.make())] if len(set(pads)) == 1 else [
                (slice(b, b + 1), pad, self.make()) for b, pad in enumerate(pads)]

    def attend(self, i, module, q, k, v, mask, rules):
        number, T, S = self.anatomy.numbers.get(i), q.shape[2], self.end
        if number is None:
            return own(module, q, k, v, mask, rules)
        asked, windowed = scaled(q, rules), self.anatomy.windows[i]
        if not windowed:  # a static cache has room behind
            k, v = k[:, :, :S], v[:, :, :S]
            mask = mask if mask is None else mask[..., :S]
        # a window is layer 0's: a selector hears of it, and reads no keys there
        keys = k[:, :, :1].expand(-1, -1, S, -1) if windowed else k
        outs = []
        for some, pad, selector in self.rows:
            first = max(pad - (S - T), 0)  # of the new tokens, that is none of the padding
            here = torch.arange(S - T + first - pad, S - pad, device=q.device)
            near = keys[some, :, pad:], v[some, :, pad:]
            seen = (number, self.x[some, first:], asked[some, :, first:], near[0],
                    here.expand(len(near[0]), -1))
            if T > 1:
                if selector and len(here):
                    selector.watch(*seen)
                continue
            idx = selector(*seen) if selector else None
            if windowed:
                continue
            if idx is not None:
                out = selected(asked[some], *near, idx, rules)
            elif rules.get("softcap") is None:  # sdpa takes five times as long in bfloat16
                out = dense_attention(asked[some], *near, seen[-1], False)
            else:
                out = own(module, q[some], *near, None, rules)
            outs.append(out.to(q.dtype))
        return torch.cat(outs) if outs else own(module, q, k, v, mask, rules)


def padding(mask, batch: int, end: int) -> list[int]:
    """How many of the first tokens of each row are padding, from any mask that transformers has
    [B, S], or [B, 1, T, S] of booleans or numbers to add, or one for each kind of layer."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return [0] * batch
    if mask.dim() == 4:
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] > -1
    real = mask[:, :end].bool().expand(batch, -1)
    if (real.int().diff(dim=-1) < 0).any():
        raise ModelError("padding stands on the left of a text, nowhere else: padding_side='left'")
    return (~real).sum(-1).tolist()


def one_beam(order):
    raise ModelError("beam search cannot go through a selector: num_beams=1")


def attached(model, make):
    """Within it, `model`, a decoder of transformers, decodes through selectors of this repository:
    make() -> a fresh one (baselines.make_selector), or None for dense attention. Yields what is
    attached: its `rows` hold the selectors of the latest text. Raises ModelError, one line."""
    return closing(Attachment(model, make))


if __name__ == "__main__":
    from baselines import make_selector

    torch.manual_seed(0)
    model = transformers().Qwen3ForCausalLM(transformers().Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2)).eval()
    prompt = torch.randint(512, (1, 200))
    with attached(model, partial(make_selector, "oracle", 20)) as held:
        written = model.generate(prompt, max_new_tokens=8, do_sample=False)
        print("prompt [1, 200] ->", written[0, 200:].tolist())
        print("kept by the last step:", held.rows[0][2].index[1][0, 0, 0].tolist())
