"""workshop/transformers.py against transformers itself and against model.Llama."""

import copy
import json
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import assert_close, randomise
from gguf import TokenType
from test_tokenizer import write_vocabulary

import fast
import fast.loops
import fast.selector
import selection
from bench import Probe
from butler import Butler, ButlerConfig, fingerprint
from cli import UserError, plug_in
from kernel import sparse_attention
from model import Llama, apply_rope, rope_cos_sin
from selection import Oracle, Recency, make_selector, prefill
from tokenizer import load as load_tokenizer
from train import record
from workshop.transformers import (
    CACHE,
    Engine,
    attached,
    butler_for,
    load,
    read_model,
    read_tokenizer,
)

SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
HEADS = {"head_dim": 16}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"sliding_window": 12,
           "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2}
FAMILIES = {
    "Llama": {},
    "Qwen3": HEADS,
    "Mistral": {"sliding_window": None} | HEADS,
    "Ministral": WINDOWS | HEADS,
    "Gemma3": WINDOWS | HEADS | {"query_pre_attn_scalar": 8},  # scores are not over sqrt(D)
    "SmolLM3": {"no_rope_layers": [1, 1, 0, 1, 1]},  # layer 2 has no rotary embedding
    "Qwen3Moe": EXPERTS | HEADS}


def built(family, **more):
    """A small random model of a family, as transformers makes it."""
    config = getattr(hf, f"{family}{'Text' * (family == 'Gemma3')}Config")
    return randomise(getattr(hf, f"{family}ForCausalLM")(
        config(**SMALL | FAMILIES.get(family, {}) | more)))


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, built(family))


def prompt(length, seed=0, batch=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(2, 256, (batch, length), generator=rng)


def written(model, ids, count=12, **rules):
    """Greedy tokens [B, count] and their logits."""
    out = model.generate(ids, **{"do_sample": False, "max_new_tokens": count,
                                 "output_logits": True, "return_dict_in_generate": True} | rules)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def random_butler(engine):
    torch.manual_seed(0)
    config = ButlerConfig.for_model(engine, layers_per_producer=2, hidden=16, size=8)
    return Butler(config).requires_grad_(False)


# ---------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_are_those_of_transformers(family, models):
    """In one block, in a prompt with single tokens behind it, rewound, and with gaps."""
    model, tokens = models(family), prompt(40, batch=2)
    engine = Engine(model)
    with torch.no_grad():
        expected = model(tokens).logits
        gaps = torch.arange(40) * 3
        spread = model(tokens, position_ids=gaps[None], attention_mask=torch.ones(2, 40)).logits
    assert_close("block", engine(tokens), expected, 1e-4)
    assert_close("gaps", engine(tokens, positions=gaps, last=True), spread[:, -1:], 1e-4)
    cache = engine.new_cache(2, 40)
    assert_close("prompt", engine.prefill(tokens[:, :30], cache), expected[:, 29:30], 1e-4)
    for _ in range(2):
        chunk = engine(tokens[:, 30:37], cache, Oracle(1.0))
        assert_close("chunk", chunk, expected[:, 30:37], 1e-4)
        for t in 37, 38, 39:
            step = engine.decode(tokens[:, t : t + 1], cache, Oracle(1.0))
            assert_close("step", step, expected[:, t : t + 1], 1e-4)
        assert cache.size == cache.k[0].shape[2] == cache.v[4].shape[2] == cache.capacity
        with pytest.raises(UserError, match="41 tokens do not fit"):
            engine.decode(tokens[:, :1], cache)
        cache.truncate(30)
        assert cache.size == 30


def oracle_attention(module, q, k, v, mask, scaling, **rules):
    """Written for transformers: the best 20 tokens of each query by their mean attention, 4 sinks
    and a window of 8 among them, in every layer but the first and those with a sliding window."""
    kinds = getattr(module.config, "layer_types", None) or ["full_attention"] * 5
    here, past = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = past <= here
    if kinds[module.layer_idx] == "sliding_attention":
        seen = seen & (past > here - module.config.sliding_window)
    scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT * scaling  # [B, G, H/G, T, S]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    if module.layer_idx > 0 and kinds[module.layer_idx] == "full_attention":
        worth = weights.mean(2).masked_fill((past < 4) | (past > here - 8), 2).masked_fill(~seen, 0)
        best = worth >= worth.topk(20).values[..., -1:]
        weights = scores.masked_fill(~(seen & best)[:, :, None], -torch.inf).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2).transpose(1, 2), None


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_selection_is_masked_attention(family, models):
    model, tokens = copy.deepcopy(models(family)), prompt(60, batch=2)
    engine = Engine(model)
    together = engine(tokens, None, Oracle(20))
    dense = engine(tokens)
    cache = engine.new_cache(2, 60)
    single = [engine.decode(tokens[:, t : t + 1], cache, Oracle(20)) for t in range(60)]
    hf.AttentionInterface.register("oracle", oracle_attention)
    model.set_attn_implementation("oracle")
    with torch.no_grad():
        expected = model(tokens).logits
    assert_close("together", together, expected, 1e-3)
    assert_close("one by one", torch.cat(single, dim=1), expected, 1e-3)
    assert (dense - expected).abs().max() > 0.1  # the selection matters


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_rotated_back_are_what_the_projection_made(family, models):
    """Which is what a butler learns from."""
    model, tokens = copy.deepcopy(models(family)), prompt(40)
    engine, made = Engine(model), {}
    for i, layer in enumerate(model.model.layers):
        last = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)
        last.register_forward_hook(lambda module, args, out, i=i: made.update({i: out}))
    recorder = record(engine, tokens, torch.arange(40))
    butler = random_butler(engine)
    windows = "layer_types" in FAMILIES[family]
    assert engine.asked_layers == ((0, 3, 4) if windows else (0, 1, 2, 3, 4))
    assert engine.config.layers == len(recorder.keys) == len(engine.asked_layers)
    still = [i for i, row in butler.rows.items() if not butler.rope[row].any()]
    assert still == [2] * (family == "SmolLM3")
    for i, row in butler.rows.items():
        cos, sin = rope_cos_sin(recorder.positions, butler.rope[row])
        expected = made[i]
        if expected.shape[1] == 40:  # Gemma 3 swaps heads and tokens before its norm
            expected = expected.view(1, 40, 2, 16).transpose(1, 2)
        assert_close(f"layer {i}", apply_rope(recorder.keys[i], cos, -sin), expected, 1e-4)
        assert recorder.x[i].shape == (1, 40, 64)


@pytest.mark.parametrize("cls", [Butler, fast.Butler])
def test_a_producer_reads_a_layer_with_a_window(cls, models):
    """The same input in training, in single steps, in a block and in `generate`."""
    model, tokens = models("Gemma3"), prompt(40)
    engine = Engine(model)
    butler = cls(random_butler(engine).config)
    assert butler.served == {1: [3], 3: [4]} and list(butler.producers) == ["1", "3"]
    inputs = {}
    hooks = [layer.register_forward_pre_hook(lambda _, x, i=i: inputs.update({i: x[0]}))
             for i, layer in enumerate(model.model.layers)]
    recorder = record(engine, tokens, torch.arange(40))
    for i in range(5):
        assert torch.equal(recorder.x[i], inputs[i])
    for hook in hooks:
        hook.remove()
    expected = butler.importance_queries(1, inputs[1], torch.arange(40))[3]
    steps, cache, selector = [], engine.new_cache(1, 40), butler.selector(1.0)  # selects all
    engine.prefill(tokens[:, :30], cache, selector.watch)
    for t in range(30, 40):
        engine.decode(tokens[:, t : t + 1], cache, selector)
        assert sorted(selector.index) == sorted(selector.queries) == [3, 4]
        steps.append(selector.queries[3])
    assert_close("steps", torch.cat(steps, dim=2), expected[:, :, 30:], 1e-4)
    probe = Probe(butler.selector(1.0))
    engine(tokens, None, probe)
    assert_close("block", probe.selector.queries[3], expected, 1e-4)
    assert list(probe.kept) == [3, 4]
    with attached(model, lambda: butler.selector(1.0)) as attachment:
        cache = hf.DynamicCache()
        for part in tokens[:, :39], tokens[:, 39:]:
            model(part, **{CACHE: cache})
    assert_close("attached", attachment.selector.queries[3], expected[:, :, 39:], 1e-4)


def test_butlers_of_other_layers_are_refused(models):
    engine = Engine(models("Gemma3"))
    old = replace(random_butler(engine).config, selected_layers=())
    with pytest.raises(UserError, match="earlier version: train it anew"):
        Butler(old).check(engine)


@pytest.fixture(scope="module")
def twins(folder):
    """A folder through transformers and through model.py."""
    return Engine(read_model(folder)), Llama.from_pretrained(folder)


def test_both_engines_are_one_model(twins):
    engine, llama = twins
    tokens = prompt(50, batch=2)
    assert_close("logits", engine(tokens), llama(tokens), 1e-4)
    assert fingerprint(engine) == fingerprint(llama)
    assert_close("frequencies", engine.frequencies, llama.frequencies, 1e-8)
    assert engine.weight_bytes() == llama.weight_bytes()
    for name in "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "context":
        assert getattr(engine.config, name) == getattr(llama.config, name), name
    butler = random_butler(llama)
    butler.check(engine)
    logits = [m(tokens, None, butler.selector(20)) for m in twins]
    assert_close("selected", *logits, 1e-4)
    with pytest.raises(UserError, match="exceed the model's context of 8192"):
        engine.new_cache(1, 8193)


# ---------------------------------------------------------------------------- model.generate


def test_generate_does_what_our_llama_does(twins):
    """The same tokens, and the same choices in the last step."""
    engine, llama = twins
    butler, ids = random_butler(llama), prompt(80, batch=2)
    for make in (lambda: butler.selector(0.25), lambda: Oracle(20),
                 lambda: make_selector("snapkv", 20)):  # which must have watched the prompt
        with attached(engine.model, make) as attachment:
            tokens, logits = written(engine.model, ids, 30)
        cache, select = llama.new_cache(2, 110), make()
        steps = [llama.prefill(ids, cache, select.watch)]
        for t in range(29):
            steps.append(llama.decode(tokens[:, t : t + 1], cache, select))
        assert_close("logits", logits, torch.cat(steps, dim=1), 1e-4)
        assert sorted(select.index) == [1, 2]
        for layer, index in select.index.items():
            theirs = attachment.selector.index[layer]
            assert torch.equal(theirs.sort().values, index.sort().values)
        dense, _ = written(engine.model, ids, 30)
        assert not torch.equal(dense, tokens)


@pytest.fixture
def soon_sparse(monkeypatch):
    """Of prompts of 250 tokens, three blocks are read sparsely."""
    monkeypatch.setattr(selection, "DENSE_START", 40)
    monkeypatch.setattr(selection, "DENSE_END", 10)
    monkeypatch.setattr(selection, "DENSE_LAYERS", 2)
    monkeypatch.setattr(selection, "PREFILL_CHUNK", 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts_are_read_as_selection_prefill_reads_them(family, models, soon_sparse):
    """The same tokens, and the same choices in the last step."""
    model, ids = models(family), prompt(250, batch=2)
    engine = Engine(model)
    plain = random_butler(engine)
    quick = fast.Butler(plain.config)
    quick.load_state_dict(plain.state_dict())
    whole, _ = written(model, ids)
    for make in lambda: plain.selector(0.2), lambda: quick.selector(0.2), lambda: Oracle(20):
        with attached(model, make, prefill_budget=150) as attachment:
            tokens, logits = written(model, ids)
        cache, select = engine.new_cache(2, 262), make()
        steps = [prefill(engine, ids, cache, select, 150)]
        for t in range(11):
            steps.append(engine.decode(tokens[:, t : t + 1], cache, select))
        assert_close("logits", logits, torch.cat(steps, dim=1), 1e-4)
        for layer, index in select.index.items():
            theirs = attachment.selector.index[layer]
            assert torch.equal(theirs.sort().values, index.sort().values)
        with attached(model, make):
            _, densely = written(model, ids, 2)
        assert (logits[:, :1] - densely[:, :1]).abs().max() > 0.01  # the budget matters
    assert torch.equal(written(model, ids)[0], whole)  # the model is as before


def test_a_prompt_in_parts_has_all_its_logits(models, soon_sparse):
    """Also from embeddings; and with the whole budget they are dense."""
    model, ids = models("Llama"), prompt(250)
    dense = model(ids).logits
    embeds = model.get_input_embeddings()(ids)
    for budget, least, most in (1.0, 0, 1e-4), (150, 0.01, 100):
        with attached(model, lambda: Oracle(20), budget):
            logits = model(ids, **{CACHE: hf.DynamicCache()}).logits
            same = model(inputs_embeds=embeds, **{CACHE: hf.DynamicCache()}).logits
        assert_close("embeddings", same, logits, 1e-5)
        assert least <= (logits - dense).abs().max() <= most
        assert_close("first part", logits[:, :40], dense[:, :40], 1e-5)


@pytest.mark.filterwarnings("ignore:several tokens at a time")
def test_short_prompts_and_no_selector_are_dense_to_the_bit(models, soon_sparse):
    model, ids = models("Qwen3"), prompt(250)
    for text, make in (ids[:, :113], lambda: Oracle(20)), (ids, lambda: None):
        dense = model(text).logits
        with attached(model, make, 150):
            cache = hf.DynamicCache()
            assert torch.equal(model(text, **{CACHE: cache}).logits, dense)
            written(model, text, 2)  # or users are told that nothing was selected for


def test_prompts_that_cannot_be_read_sparsely_are_refused(models, soon_sparse):
    model, ids = models("Llama"), prompt(250)
    mask = torch.ones(250, 250, dtype=torch.bool).tril()[None, None]
    for message, budget, rules in (
            ("budget 1.5", 1.5, {}),
            ("nothing to choose", 132, {}),
            ("has no hidden_states", 150, {"output_hidden_states": True}),
            ("masks of its own", 150, {"attention_mask": mask})):
        with pytest.raises(UserError, match=message), attached(model, lambda: Oracle(9), budget):
            model(ids, **{CACHE: hf.DynamicCache()}, **rules)
    assert "forward" not in vars(model.model)


def test_the_fast_selector_attends_by_compiled_loops(models, monkeypatch):
    """To the tokens of its index: the same logits as with PyTorch's sparse attention."""
    model, ids = models("Gemma3"), prompt(150, batch=2)
    butler = fast.Butler(random_butler(Engine(model)).config)
    with attached(model, lambda: butler.selector(40)):
        tokens, logits = written(model, ids)
    calls = []

    def by_pytorch(self, *seen):
        calls.append(seen)
        return sparse_attention(*seen)

    monkeypatch.setattr(fast.selector.ButlerSelector, "attention", by_pytorch)
    with attached(model, lambda: butler.selector(40)):
        same, expected = written(model, ids)
    assert len(calls) == 11 * 2  # steps, layers with full attention above 0
    assert torch.equal(tokens, same)
    assert_close("logits", logits, expected, 1e-3)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_compiled_attention_of_one_token_is_pytorchs(dtype, atol):
    """With empty slots, for a cropped cache, and with gradients."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 1, 16, generator=rng).to(dtype)
    k, v = torch.randn(2, 2, 2, 140, 16, generator=rng).to(dtype)
    idx = torch.rand(2, 2, 1, 130, generator=rng).topk(75).indices.int()
    idx[..., 70:] = -1
    idx[0, 1, 0, 3] = -1
    idx[1, 1] = -1
    for end in 140, 130:
        seen = q, k[:, :, :end], v[:, :, :end], idx
        out = fast.loops.sparse_attention(*seen)
        assert out.dtype == dtype
        assert_close(f"{end} tokens", out, sparse_attention(*seen), atol)
    assert not out[1, 3:].any()  # a KV head without tokens
    assert fast.loops.sparse_attention(q, k.requires_grad_(), v, idx).requires_grad


def test_the_text_part_of_a_model_that_reads_images(models):
    """Which brings masks of its own."""
    text = models("Gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=text.config.to_dict(), vision_config=vision,
                             mm_tokens_per_image=4, image_token_index=255)
    model, ids = hf.Gemma3ForConditionalGeneration(config).eval(), prompt(40) % 200
    model.get_decoder().load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    written_by = []
    for one in text, model:
        butler = random_butler(Engine(one))
        with attached(one, lambda butler=butler: butler.selector(20)):
            written_by.append(written(one, ids, 20))
    assert torch.equal(written_by[0][0], written_by[1][0])
    assert_close("engine", Engine(model)(ids), Engine(text)(ids), 1e-3)
    with attached(model, lambda: Oracle(20)), pytest.raises(UserError, match="unequal lengths"):
        model.generate(ids, attention_mask=torch.arange(40)[None] > 4, max_new_tokens=2)
    with (attached(model, lambda: Oracle(20), 150),
          pytest.raises(UserError, match="leave prefill_budget out")):
        model.generate(ids, max_new_tokens=2)


def test_detaching_restores_the_model(models):
    model, ids = models("Qwen3"), prompt(40)
    before, config = model(ids).logits, copy.deepcopy(model.config.to_dict())
    implementation = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attached(model, lambda: Recency(20)):
        with pytest.raises(UserError, match="attached already"), attached(model, lambda: None):
            pass
        assert not torch.equal(model(ids[:, :1]).logits, written(model, ids)[1])
        _ = 1 / 0
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == config
    assert not any(m._forward_pre_hooks for m in model.modules())
    with attached(model, lambda: None):
        assert torch.equal(model(ids).logits, before)


def test_each_text_gets_a_selector_and_a_cached_prompt_goes_on(models):
    model, ids = models("Gemma3"), prompt(60)
    butler = random_butler(Engine(model))
    with attached(model, lambda: butler.selector(20)) as attachment:
        expected, _ = written(model, ids)
        first = attachment.selector
        written(model, prompt(30, seed=5))
        assert torch.equal(written(model, ids)[0], expected)
        assert attachment.selector is not first
        cache = hf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :33], **{CACHE: cache})
        reader, branch = attachment.selector, copy.deepcopy(cache)
        with pytest.warns(UserWarning, match="only single ones are selected"):
            tokens, _ = written(model, ids, **{CACHE: cache})
        assert torch.equal(tokens, expected) and attachment.selector is reader
        tokens, _ = written(model, ids, **{CACHE: branch})
        assert torch.equal(tokens, expected) and attachment.selector is not reader


def test_several_tokens_at_a_time_are_dense_and_said_so_once(models):
    """In assisted decoding, without a cache, and in log-likelihoods of a given text."""
    model, ids = models("Llama"), prompt(60)
    ids[:, 30:] = ids[:, :30]  # for prompt_lookup_num_tokens
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    dense = model(expected).logits

    def behind_a_cache():
        cache = hf.DynamicCache()
        model(expected[:, :60], **{CACHE: cache})
        return model(expected[:, 60:], **{CACHE: cache}).logits

    for write in (
            lambda: model.generate(ids, assistant_model=built("Llama"), **GREEDY),
            lambda: model.generate(ids, use_cache=False, **GREEDY)):
        tokens, told = once(model, write)
        assert told and torch.equal(tokens, expected)
    for likelihood in (lambda: model(expected).logits, behind_a_cache,
                       lambda: model(expected, use_cache=False).logits,
                       lambda: model(expected, labels=expected).logits):
        logits, told = once(model, likelihood)
        assert told
        assert_close("dense", logits, dense[:, -logits.shape[1] :], 1e-4)
    for write in (
            lambda: model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY),
            lambda: model.generate(ids, max_new_tokens=1, do_sample=False)):
        assert once(model, write)[1]


def test_single_tokens_are_selected_without_a_word(models):
    """In whatever way `generate` is called."""
    model, ids = models("Llama"), prompt(60)
    expected, _ = once(model, lambda: model.generate(ids, **GREEDY))
    assert not torch.equal(expected, model.generate(ids, **GREEDY))

    def in_a_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(model.generate, ids, **GREEDY).result()

    for write in (
            lambda: model.generate(ids, **GREEDY),
            lambda: [model.generate(ids, **GREEDY) for _ in range(2)][1],
            lambda: model.generate(ids.expand(2, -1), **GREEDY)[:1],
            lambda: model.generate(ids, **{CACHE: hf.DynamicCache()}, **GREEDY),
            lambda: model.generate(ids, output_attentions=True, return_dict_in_generate=True,
                                   **GREEDY).sequences,
            in_a_thread):
        tokens, told = once(model, write)
        assert not told and torch.equal(tokens, expected)


def once(model, function):
    """function() while a selector is attached -> its result, and whether users were told once that
    something is dense"""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with attached(model, lambda: Recency(12)):
            result = function()
    count = sum("only single ones are selected" in str(w.message) for w in told)
    assert count <= 1
    return result, count == 1


@pytest.mark.filterwarnings("ignore:several tokens at a time")
def test_two_threads_at_a_time_and_another_attention_are_refused(models):
    model, ids = models("Llama"), prompt(60)
    inside, other = threading.Event(), threading.Event()

    class Waits(Recency):
        """The first thread stops in the midst of its prompt, until the other one has begun."""

        def watch(self, *seen):
            if not inside.is_set():
                inside.set()
                other.wait(20)

    with attached(model, lambda: Waits(12)), ThreadPoolExecutor(1) as pool:
        first = pool.submit(model, ids)
        assert inside.wait(20)
        model(ids[:, :1])
        other.set()
        with pytest.raises(UserError, match="two threads"):
            first.result()
    before = model.config._attn_implementation
    with attached(model, lambda: Recency(12)):
        model.set_attn_implementation("eager")
        with pytest.raises(UserError, match="another attention implementation"):
            model.generate(ids, **GREEDY)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("weight, number", [
    ("model.norm.weight", float("nan")), ("lm_head.weight", float("inf")),
    ("model.layers.1.mlp.up_proj.weight", -float("inf"))])
def test_damaged_weights_are_named(folder, tmp_path, weight, number):
    """Of a folder, and of a model in half precision that is attached."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    model.get_parameter(weight).data.view(-1)[7] = number
    model.save_pretrained(tmp_path)
    damage = f"{weight} has NaN, infinite or huge numbers"
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{damage}"):
        load(tmp_path)
    with (pytest.raises(UserError, match=damage),
          attached(model.bfloat16(), lambda: Recency(12))):
        pass


def test_what_a_selector_cannot_follow_is_refused(models):
    model, ids = models("Llama"), prompt(20, batch=2)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    with attached(model, lambda: Recency(16)):
        with pytest.raises(UserError, match="unequal lengths"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2)
        with pytest.raises(UserError, match="one by one"):
            model(ids, position_ids=torch.arange(20)[None] * 2)
        with pytest.raises(UserError, match="static cache"):
            model.generate(ids, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(UserError, match="num_beams=1"):
            model.generate(ids, num_beams=3, max_new_tokens=12)
        # rows of one text each, several drawn from each: no row moves
        assert model.generate(ids, num_return_sequences=2, do_sample=True,
                              max_new_tokens=4).shape == (4, 24)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 128}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
       "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
REFUSED = {
    "soft caps": ("Gemma2", WINDOWS | HEADS),
    "sinks": ("GptOss", HEADS | {
        "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "every layer has a sliding window": ("Mistral", {"sliding_window": 64}),
    "only 8 of a head's 16 channels": ("Phi3", {"sliding_window": None,
                                               "rope_parameters": PARTIAL}),
    r"\(longrope\) change": ("Phi3", {"sliding_window": None, "rope_parameters": LONG}),
    r"\(dynamic\) change": ("Llama", {"rope_parameters": DYNAMIC}),
    "do not rotate in pairs": ("Cohere", {}),  # neighbouring channels are pairs
    "MLA": ("DeepseekV3", MLA),
    "no `layers`": ("Bloom", {}),
    "layers of linear_attention": ("Mamba", {})}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_no_selector_can_follow_are_refused(reason):
    family, more = REFUSED[reason]
    model = built(family, **more)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=f"{family}ForCausalLM cannot be selected from.*{reason}"):
        Engine(model)
    assert model.config._attn_implementation == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_encoders_and_shared_keys_are_refused(models):
    config = hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="it has an encoder"):
        Engine(hf.T5ForConditionalGeneration(config))
    model = copy.deepcopy(models("Llama"))
    model.config.num_kv_shared_layers = 2  # as in Gemma 3n
    with pytest.raises(UserError, match="share other layers' keys"):
        Engine(model)


# ---------------------------------------------------------------------------- files and scripts


def test_damaged_folders_and_pickles_are_refused(folder, tmp_path):
    model = built("Qwen3")
    left = {n: t for n, t in model.state_dict().items() if "layers.1.mlp" not in n}
    model.save_pretrained(tmp_path, state_dict=left)
    with pytest.raises(UserError, match="3 tensors are missing"):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="transformers cannot load it"):
        load(tmp_path)
    file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="transformers cannot load it.*safetensors"):
        load(tmp_path)


def test_a_vocabulary_in_another_form_is_translated(folder, tmp_path):
    built("Qwen3", vocab_size=512).save_pretrained(tmp_path)
    both = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(both["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(
        f"{pair if isinstance(pair, str) else ' '.join(pair)}\n" for pair in both["merges"]))
    ids = load(tmp_path)[1].encode("the harbour")
    assert ids == load_tokenizer(folder).encode("the harbour") and len(ids) > 1
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match="unusable tokenizer"):
        load(tmp_path)


def test_a_vocabulary_of_sentencepiece_is_converted_once(tmp_path, monkeypatch, capsys):
    """As Gemma's GGUF files have it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581t", "he",
              "\u2581the", *"\u2581thedog"]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256,
             *[TokenType.NORMAL] * 10]
    path = write_vocabulary(
        tmp_path / "x.gguf", kind="default", model="llama", tokens=pieces, merges=None,
        token_type=types, scores=[-float(i) for i in range(len(pieces))], bos_token_id=1,
        eos_token_id=2, add_bos_token=True)
    with pytest.raises(UserError, match="'llama', not byte-level BPE"):
        load_tokenizer(path)
    for told in "converting the tokenizer of x.gguf, once", "":
        tok = read_tokenizer(path, len(pieces))
        ids = tok.encode("the dog</s> \u00e9")
        assert tok.decode(ids).strip() == "the dog</s> \u00e9" and 2 not in ids
        assert pieces.index("\u2581the") in ids and tok.bos == [1] and 2 in tok.ends
        assert capsys.readouterr().err.startswith(told)
        monkeypatch.setattr(hf, "AutoTokenizer", None)
    assert len(list((tmp_path / "cache" / "tokenbutler").iterdir())) == 1
    with pytest.raises(UserError, match="beyond the model's 8 rows"):
        read_tokenizer(path, 8)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "workshop.transformers")
    with pytest.raises(UserError, match="pip install transformers"):
        plug_in("workshop.transformers")
    monkeypatch.undo()
    assert import_module("workshop.transformers").load is load


def test_scripts_run_a_model_that_ours_does_not_read(folder, main, tmp_path, monkeypatch):
    own = tmp_path / "qwen3"
    built("Qwen3", vocab_size=512, num_hidden_layers=3,
          max_position_embeddings=2048).save_pretrained(own)
    (own / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    text, file = tmp_path / "t.txt", tmp_path / "butler.safetensors"
    text.write_text("One cup of tea, two cups of tea, and a spoon for every cup. " * 400)
    flags = "--model", own, "--engine", "transformers"
    report = main("train.py", *flags, "--data", text, "--out", file, "--steps", 2, "--length", 64,
                  "--long", 96, "--rows", 4, "--hidden", 8, "--size", 8, "--documents", 1,
                  "--windows", 1, "--longest", 64)
    assert len(json.loads(Path(f"{file}.json").read_text())["loss"]) == 2
    assert report["table"]["butler"]["kept"]["64"]["n"] == 1
    flags += "--butler", file
    report = main("bench.py", *flags, "--suite", "length", "--text", text, "--n", 1,
                  "--contexts", "64,128")
    kept = {name: by["0.1"]["mean"] for name, by in report["results"]["kept @128"].items()
            if name != "dense"}
    assert 0 < kept["butler"] <= kept["oracle"] <= 1
    report = main("sample.py", *flags, "--prompt", "Tea is " * 30, "--max-new-tokens", 4,
                  "--temperature", 0)
    assert report["attended_per_step"] < report["cached_tokens"]
    # a long prompt, read through the selector
    monkeypatch.setattr(selection, "DENSE_START", 128)
    flags += "--prefill", "sparse", "--prefill-budget", 150
    report = main("sample.py", *flags, "--prompt", "Tea is " * 130, "--max-new-tokens", 4)
    assert report["new_tokens"] == 4 and report["prompt_tokens"] > 128 + 256 + 64
    report = main("synth_task.py", *flags, "--context", 500, "--n", 1)
    assert report["results"]["coreference"]["butler"]["0.1"]["n"] == 1
    # what was trained serves generate, also in half precision
    model = hf.AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16)
    for cls in Butler, fast.Butler:
        learned = butler_for(model, file, cls)
        with attached(model, partial(learned.selector, 20)) as attachment:
            written(model, prompt(60))
        assert isinstance(learned, cls)
        assert attachment.selector.index[2].shape == (1, 2, 1, 20)
    with pytest.raises(UserError, match="another base model"):
        butler_for(built("Qwen3"), file)


@pytest.mark.slow
def test_the_default_model_writes_the_same(llama, tok, butler, model_path):
    """A GGUF file through transformers, 30 steps with the shipped butler."""
    engine, _, shipped = load(model_path)
    shipped.check(llama)
    ids = torch.tensor([tok.encode("An old house stood at the end of the road. " * 20)])
    with attached(engine.model, lambda: shipped.selector(0.1)):
        tokens, logits = written(engine.model, ids, 30, eos_token_id=None)
    cache, select = llama.new_cache(1, 400), butler.selector(0.1)
    steps = [llama.prefill(ids, cache, select.watch)]
    for t in range(29):
        steps.append(llama.decode(tokens[:, t : t + 1], cache, select))
    assert_close("logits", logits, torch.cat(steps, dim=1), 1e-3)
