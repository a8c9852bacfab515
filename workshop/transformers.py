"""workshop/transformers.py - models of the package transformers: their code, our selectors.

    decoder  --hook-->  how many tokens are new, how many are cached
    layer    --hook-->  x [B, T, C], the layer's input
    attention function  q, keys  --selector-->  index  -->  sparse attention, or the selector's own

    load        the engine of `--engine transformers`: what the scripts ask of model.Llama
    attached    a context manager: `generate` of a model that you loaded yourself goes through
                selectors. Single tokens are selected for. A prompt is read densely and watched, or
                with a `prefill_budget` sparsely

Selectors are asked in layer 0, which is always dense, and in the layers with full attention. A
layer with a sliding window stays as it is, but a butler's producer may read its input.

A butler rotates cached keys back, so it must know how each layer rotates them. The model's rotary
module tells, and a measurement checks it: the same tokens at two places must have the same keys
once these are rotated back. What a selector cannot follow is refused.

    python train.py --engine transformers --model DIR --out FILE       another family's own butler
"""

import inspect
import sys
import threading
import warnings
import weakref
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import tokenizer
from butler import Butler, find_butler, load_for
from cli import UserError, check_device, one_line
from kernel import sparse_attention
from model import Config, Llama, apply_rope, check_weights, dense, rope_cos_sin
from selection import Budget, prefill

try:
    import transformers
except ImportError:
    raise UserError("this needs the optional package: pip install transformers") from None

NAME = "tokenbutler"  # of our attention function in transformers
CACHE = "cache"  # how a forward calls its cache; before transformers 5.24:
if CACHE not in inspect.signature(transformers.LlamaForCausalLM.forward).parameters:
    CACHE = "past_key_values"


# ---------------------------------------------------------------------------- attention


def attention(module, q, k, v, attention_mask, attend=None, **rules):
    """What attention modules call: q [B, H, T, D], k and v [B, G, S, D] -> [B, T, H, D], None.
    attend(q, k, v) -> [B, H, T, D], or None for dense attention, comes from `hooked`; a part that
    reads images has none."""
    if attend is not None:
        for name in ("softcap", "s_aux", "position_bias"):
            if rules.get(name) is not None:
                raise UserError(f"its attention has soft caps, sinks or biases of its own ({name})")
        D = q.shape[-1]
        scaled = q * ((rules.get("scaling") or D**-0.5) * D**0.5)  # ours divides by sqrt(D)
        out = attend(scaled, k, v)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    return transformers.AttentionInterface()["sdpa"](module, q, k, v, attention_mask, **rules)


transformers.AttentionInterface.register(NAME, attention)
transformers.AttentionMaskInterface.register(NAME, transformers.AttentionMaskInterface()["sdpa"])


@contextmanager
def hooked(model, attend):
    """Within it, layer i of the decoder calls attend(i, x, q, k, v), see `attention`."""
    before = model.config._attn_implementation
    if before == NAME:
        raise UserError("this model is attached already")

    def pass_on(i, layer, args, kwargs):  # layers hand such arguments on to the function above
        x = args[0] if args else kwargs["hidden_states"]
        return args, kwargs | {"attend": partial(attend, i, x)}

    model.set_attn_implementation(NAME)
    hooks = [layer.register_forward_pre_hook(partial(pass_on, i), with_kwargs=True)
             for i, layer in enumerate(model.get_decoder().layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


# ---------------------------------------------------------------------------- what can be selected


def refuse(c, decoder, kinds: list) -> None:
    """Raises UserError for what a model's configuration tells."""
    odd = set(kinds) - {"full_attention", "sliding_attention"}
    for condition, reason in (
            (c.is_encoder_decoder, "it has an encoder, whose keys are not the text's"),
            (hasattr(c, "kv_lora_rank"), "its cache holds compressed keys (MLA)"),
            (getattr(c, "num_kv_shared_layers", 0), "some of its layers share other layers' keys"),
            (odd, f"it has layers of {min(odd, default='')}"),
            (not hasattr(decoder, "layers"), "its decoder has no `layers`"),
            (not hasattr(decoder, "rotary_emb"), "its decoder has no `rotary_emb`"),
            ("full_attention" not in kinds[1:], "every layer has a sliding window")):
        if condition:
            raise UserError(reason)


def refuse_damage(model) -> None:
    """Raises UserError for weights that are not finite. Quantised ones are not looked at."""
    check_weights((name, p) for name, p in model.named_parameters()
                  if p.is_floating_point() and p.element_size() > 1 and not p.is_meta)


def layer_kinds(c) -> list[str]:
    """full_attention or sliding_attention, or something that is refused, of each layer."""
    all_layers = "sliding_attention" if getattr(c, "sliding_window", None) else "full_attention"
    return getattr(c, "layer_types", None) or [all_layers] * c.num_hidden_layers


def keys_of_a_text(model, start: int) -> dict:
    """{layer: keys [1, G, 8, D] of eight tokens at positions `start` and behind}"""
    found = {}

    def keep(i, x, q, k, v):
        found[i] = k.float().cpu()

    tokens = torch.arange(7, 63, 7, device=model.device)[None]
    positions = torch.arange(start, start + 8, device=model.device)[None]
    with hooked(model, keep), torch.no_grad():
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    return found


def rope_of_layer(rotary, kind: str, near, far, far_start: int) -> torch.Tensor:
    """Radians per position of each pair of channels, [D/2], as the model's rotary module has them.
    near, far: the layer's keys [1, G, 8, D] of the same tokens at positions 0 and far_start."""
    pairs = near.shape[-1] // 2
    rope_type = getattr(rotary, "rope_type", None)
    rope_type = rope_type[kind] if isinstance(rope_type, dict) else rope_type
    if rope_type in ("dynamic", "longrope"):
        raise UserError(f"its rotary frequencies ({rope_type}) change with the text's length")
    told = getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", torch.zeros(pairs)))
    for frequencies in (torch.zeros(pairs), told.float().cpu()):  # zeros: as in SmolLM3
        if len(frequencies) != pairs:
            raise UserError(f"only {2 * len(frequencies)} of a head's {2 * pairs} channels rotate")
        back = []
        for keys, start in ((near, 0), (far, far_start)):
            cos, sin = rope_cos_sin(torch.arange(8.0) + start, frequencies)
            back.append(apply_rope(keys, cos, -sin))
        error = (back[0] - back[1]).norm(dim=-1) / back[0].norm(dim=-1)
        if error.median() < 0.1:  # half precision rounds by about 0.01
            return frequencies
    raise UserError(f"its keys do not rotate in pairs of channels j and j + {pairs} at the "
                    "frequencies of its rotary module")


# ---------------------------------------------------------------------------- the engine


class Cache:
    """A DynamicCache of transformers, as scripts know a cache. It counts its tokens itself, and it
    keeps all of them in every layer: masks apply the sliding windows, and truncating is exact."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.theirs = transformers.DynamicCache()  # given a config, it would forget behind windows

    @property
    def size(self) -> int:
        return self.theirs.get_seq_length()

    @property
    def k(self) -> list:
        return [layer.keys for layer in self.theirs.layers]

    @property
    def v(self) -> list:
        return [layer.values for layer in self.theirs.layers]

    def truncate(self, length: int) -> None:
        """Forgets all tokens after the first `length`."""
        if length < self.size:
            self.theirs.crop(length - self.size)  # a negative number: so many tokens go


def ask(selector, layers: tuple, layer: int, x, q, k, positions):
    """-> the selector's index, or None for dense attention. In a layer that is none of `layers` it
    may look ahead; functions, such as its `watch`, do not."""
    if layer in layers:
        return selector(layer, x, q, k, positions)
    if hasattr(selector, "look_ahead"):
        selector.look_ahead(layer, x, positions)
    return None


class Engine(nn.Module):
    """model.Llama's interface around a model of transformers, which is hooked during a forward
    only. Raises UserError, one line, for a model that selectors cannot follow.

    config           a model.Config; it counts the layers that selectors are asked in
    asked_layers     these layers, 0 first
    selected_layers  the same, or () if these are all layers; see butler.ButlerConfig
    layers           the decoder's own
    frequencies      radians per position, [D/2], or [L-1, D/2] where layers differ
    """

    device = Llama.device
    weight_bytes = Llama.weight_bytes
    prefill = Llama.prefill
    decode = Llama.decode

    def __init__(self, model):
        super().__init__()
        with one_line(f"{type(model).__name__} cannot be selected from", Exception):
            c, decoder = model.config.get_text_config(), model.get_decoder()
            refuse_damage(model)
            kinds = layer_kinds(c)
            refuse(c, decoder, kinds)
            full = [i for i, kind in enumerate(kinds) if i > 0 and kind == "full_attention"]
            heads = c.num_attention_heads
            head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
            self.model = model
            self.layers = decoder.layers
            self.embed_tokens = model.get_input_embeddings()
            self.asked_layers = (0, *full)
            self.selected_layers = () if len(self.asked_layers) == len(kinds) else self.asked_layers
            self.config = Config(
                c.vocab_size, c.hidden_size, len(self.asked_layers), heads,
                getattr(c, "num_key_value_heads", None) or heads, head_dim, c.intermediate_size,
                c.max_position_embeddings,
                tied=model.get_output_embeddings().weight is self.embed_tokens.weight)
            far_start = min(1000, self.config.context // 2)
            near, far = keys_of_a_text(model, 0), keys_of_a_text(model, far_start)
            if not set(full) <= near.keys():
                raise UserError("its attention does not go through the AttentionInterface")
            rows = torch.stack([rope_of_layer(decoder.rotary_emb, kinds[i], near[i], far[i],
                                              far_start) for i in full])
            self.frequencies = rows[0] if (rows == rows[0]).all() else rows

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """As model.Llama's. It takes memory when tokens come, so the batch does not matter yet."""
        if capacity > self.config.context:
            raise UserError(f"{capacity} tokens exceed the model's context of "
                            f"{self.config.context}")
        return Cache(capacity)

    def forward(self, tokens, cache=None, selector=None, positions=None, last=False):
        """As model.Llama's: tokens [B, T] -> logits [B, T, V]"""
        B, T = tokens.shape
        cache = cache or self.new_cache(B, T)
        selector = selector or dense
        end = cache.size + T
        if end > cache.capacity:
            raise UserError(f"{end} tokens do not fit into a cache of {cache.capacity}")
        if positions is None:
            positions = torch.arange(cache.size, end, device=tokens.device)

        def attend(i, x, q, k, v):
            index = ask(selector, self.asked_layers, i, x, q, k, positions)
            return None if index is None else sparse_attention(q, k, v, index)

        with hooked(self.model, attend):
            return self.model(input_ids=tokens, position_ids=positions.expand(B, -1),
                              use_cache=True, logits_to_keep=int(last),
                              **{CACHE: cache.theirs}).logits


# ---------------------------------------------------------------------------- model.generate


class Attachment:
    """See `attached`. `selector` serves the text at hand."""

    def __init__(self, engine: Engine, make_selector, prefill_budget: float | None):
        self.asked_layers = engine.asked_layers
        self.make_selector = make_selector
        self.prefill_budget = prefill_budget
        self.decoder = engine.model.get_decoder()
        self.decoder_forward = self.decoder.forward
        self.selector = None
        self.ask = None  # what layers call in this forward: a selector, its `watch` or None
        self.positions = None  # of the new tokens, [T]
        self.cache = None  # weak reference to the cache of the text at hand
        self.end = 0  # how many tokens it holds after this forward
        self.last_key = None  # of the text's last token in the last layer, if the text goes on
        self.thread = None  # that runs this forward
        self.selected = False  # has a token of the text at hand gone through the selector?
        self.warned = False

    def forward(self, input_ids=None, *args, **kwargs):
        """Stands in for the decoder's forward of T tokens. Another cache is another text."""
        if self.decoder.config._attn_implementation != NAME:
            raise UserError("another attention implementation was set within `attached`: set it "
                            "before")
        embeds = kwargs.get("inputs_embeds")
        tokens = input_ids if embeds is None else embeds
        T = tokens.shape[1]
        cache = kwargs.get(CACHE)
        start = 0 if cache is None else int(cache.get_seq_length())
        positions = torch.arange(start, start + T, device=tokens.device)
        self.check(positions, cache, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        same_text = start > 0 and self.cache is not None and self.cache() is cache
        if not same_text:
            self.finish()
            self.selector = self.make_selector()
            self.selected = False
            self.cache = None if cache is None else weakref.ref(cache)
        if not same_text or start != self.end:
            self.last_key = None
        self.end = start + T
        ask = self.selector
        if T == 1:
            self.selected = True
        elif self.selector:
            if self.prefill_budget is not None and cache is not None and start == 0:
                return self.read(tokens, cache, kwargs)
            ask = self.selector.watch
            if start > 0:
                self.warn()
        return self.expect(start, tokens, ask)(input_ids, *args, **kwargs)

    def expect(self, start: int, tokens, ask):
        """-> the decoder's forward, to be called for these tokens behind `start` cached ones. Its
        layers ask `ask`."""
        self.thread = threading.get_ident()
        self.positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        self.ask = ask
        return self.decoder_forward

    def read(self, tokens, cache, kwargs):
        """A prompt, [B, T] or its embeddings [B, T, C], goes through the decoder in the parts that
        selection.prefill gives -> the decoder's output for the whole prompt."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) or (mask is not None and mask.dim() == 4):
            raise UserError("masks of its own, as models that read images make them, need a prompt "
                            "that is read densely: leave prefill_budget out")
        parts = Parts(self, kwargs)
        prefill(parts, tokens, cache, self.selector, self.prefill_budget)
        self.selected = len(parts.outputs) > 1
        whole = parts.outputs[-1]
        if more := whole.keys() - {"last_hidden_state", CACHE}:
            raise UserError(f"a prompt that is read with a prefill_budget has no {min(more)}")
        hidden = [part.last_hidden_state for part in parts.outputs]
        return type(whole)(**whole | {"last_hidden_state": torch.cat(hidden, 1)})

    def finish(self) -> None:
        """The text at hand has ended. Did nothing of it go through its selector?"""
        if self.selector and not self.selected:
            self.warn()

    def warn(self) -> None:
        """Once, as several tokens at a time are either a prompt or what the user wants selected."""
        if not self.warned:
            self.warned = True
            warnings.warn("several tokens at a time attend to all tokens, as in a prompt: only "
                          "single ones are selected for", stacklevel=3)

    def check(self, positions, cache, mask, position_ids) -> None:
        """For a selector, token s of every row stands at position s of the text and the cache.
        positions [T]: of the new tokens."""
        if getattr(cache, "is_compileable", False):
            raise UserError("a static cache has room behind the text: use a DynamicCache")
        if isinstance(mask, dict):  # models that read images have made their masks, [B, 1, T, S]
            mask = mask["full_attention"]
        if mask is not None and mask.dim() == 4:
            mask = mask[:, 0, -1]  # the last token's
        if mask is not None and not mask.all():
            raise UserError("rows of unequal lengths, which padding makes equal, cannot go through "
                            "a selector: give them one by one")
        if position_ids is not None and (position_ids != positions).any():
            raise UserError("position_ids must count the tokens one by one, from 0")

    def attend(self, i, x, q, k, v):
        """See `attention`."""
        if threading.get_ident() != self.thread:
            raise UserError("two threads run the attached model at a time: take turns")
        if self.ask is None:
            return None
        if i == self.asked_layers[-1]:
            # Beam search moves the cache's rows, unseen by a selector. This key tells: it depends
            # on the whole text.
            at = k.shape[2] - len(self.positions) - 1
            if self.last_key is not None and not torch.equal(k[:, :, at], self.last_key):
                raise UserError("the cache's rows have moved, as in beam search: num_beams=1")
            self.last_key = k[:, :, -1].clone()
        index = ask(self.ask, self.asked_layers, i, x, q, k, self.positions)
        if index is None:
            return None
        # The selector of the fast engine brings compiled loops.
        own = getattr(self.selector, "attention", sparse_attention)
        return own(q, k, v, index)


class Parts:
    """The decoder as selection.prefill wants a model. It keeps the output of each part."""

    def __init__(self, attachment: Attachment, kwargs: dict):
        self.attachment = attachment
        # Positions and masks are made by the decoder: the cache tells it where a part begins.
        whole = "input_ids", "inputs_embeds", "position_ids", "cache_position", "attention_mask"
        self.rest = {name: value for name, value in kwargs.items() if name not in whole}
        self.outputs = []

    def prefill(self, tokens, cache, ask) -> None:
        name = "input_ids" if tokens.dim() == 2 else "inputs_embeds"
        forward = self.attachment.expect(cache.get_seq_length(), tokens, ask)
        self.outputs.append(forward(**{name: tokens}, **self.rest))


@contextmanager
def attached(model, make_selector, prefill_budget=None):
    """Within it, a model of transformers decodes through selectors: make_selector() -> a fresh one
    for each text, or None for dense attention. With a prefill_budget the prompt is read through the
    selector too, as selection.prefill does. Yields what is attached: its `selector` is that of
    the latest text. Raises UserError, one line, for a model that selectors cannot follow."""
    if prefill_budget is not None:
        Budget(prefill_budget)  # checks it
    attachment = Attachment(Engine(model), make_selector, prefill_budget)
    decoder = attachment.decoder
    before = vars(decoder).get("forward")  # packages that place layers on devices set one
    decoder.forward = attachment.forward
    try:
        with hooked(model, attachment.attend):
            yield attachment
        attachment.finish()
    finally:
        del decoder.forward
        if before:
            decoder.forward = before


def butler_for(model, path=None, cls=Butler) -> Butler:
    """The butler at `path` (None: the shipped one) for a model of transformers. Raises UserError
    if it was trained for another one. cls: fast.Butler chooses faster on a CPU."""
    return load_for(Engine(model), path, cls)


# ---------------------------------------------------------------------------- files


def read_model(path, dtype=torch.float32, device="cpu"):
    """A Hugging Face folder or a GGUF file -> a frozen model of transformers. Raises UserError."""
    check_device(device)
    with one_line(f"{path}: transformers cannot load it", Exception):
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            **source(path), dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
        if missing := sorted(told["missing_keys"]):
            raise UserError(f"{len(missing)} tensors are missing, {missing[0]} first")
    return model.to(device).eval().requires_grad_(False)


def source(path) -> dict:
    """A Hugging Face folder or a GGUF file, as `from_pretrained` wants it."""
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def read_tokenizer(path, vocab_size: int) -> tokenizer.Tokenizer:
    """As tokenizer.load. What that does not read is converted: a folder without tokenizer.json, and
    a GGUF file whose vocabulary is no byte-level BPE. For the file it takes about a minute, so the
    result is kept in the user's cache folder."""
    if path.is_dir() and not (path / "tokenizer.json").exists():
        with TemporaryDirectory() as folder:
            return convert(path, folder, vocab_size)
    with one_line(f"{path}: unusable tokenizer", Exception):
        ours = path.is_dir() or tokenizer.open_gguf(path).value("tokenizer.ggml.model") == "gpt2"
    if ours:
        return tokenizer.load(path, vocab_size)
    folder = tokenizer.cache_folder() / f"tokenizer-{tokenizer.sha256(path)[:16]}"
    if not folder.exists():
        print(f"converting the tokenizer of {path.name}, once: about a minute", file=sys.stderr)
        with one_line(f"cannot write {folder}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder.parent) as made:
                convert(path, f"{made}/whole", vocab_size)
                with suppress(OSError):  # another process was faster
                    Path(made, "whole").rename(folder)
    return tokenizer.load(folder, vocab_size)


def convert(path, folder, vocab_size: int) -> tokenizer.Tokenizer:
    """transformers reads the tokenizer at `path` and writes it to a folder as tokenizer.json."""
    with one_line(f"{path}: unusable tokenizer", Exception):
        transformers.AutoTokenizer.from_pretrained(
            **source(path), trust_remote_code=False).save_pretrained(folder)
        tok = tokenizer.load(folder, vocab_size)
        if not tok.encode("a"):
            raise UserError("there is no vocabulary")
    return tok


def load(model=None, butler=None, device="cpu"):
    """The transformers engine; see butler.load -> Engine, tokenizer, butler or None. Raises
    UserError."""
    path = tokenizer.resolve(model)
    if butler is not None:
        Butler.load(butler)  # a damaged file is noticed before the model is read
    dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    with one_line(str(path)):
        engine = Engine(read_model(path, dtype, device))
    tok = read_tokenizer(path, engine.config.vocab_size)
    return engine, tok, find_butler(engine, butler)
