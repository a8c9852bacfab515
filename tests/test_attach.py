"""beyond/attach.py and beyond/engine.py against transformers itself: families, contracts."""

import copy
import gc
import inspect
import json
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from conftest import assert_close, randomise

import train
from baselines import make_selector
from beyond.attach import HELD, Anatomy, attached, butler_for
from beyond.engine import Engine, found
from butler import Butler, ButlerConfig, ButlerError, ButlerSelector, fingerprint, turned_back
from common.errors import ModelError
from loading import tokenizer
from model import Llama
from tasks.coreference import coreference_documents

CACHE = ("cache" if "cache" in inspect.signature(hf.LlamaForCausalLM.forward).parameters
         else "past_key_values")  # before 5.24
SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2
           + ["full_attention"]}
FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": HEADS, "Mistral": {"sliding_window": None} | HEADS,
    "SmolLM3": {"no_rope_layers": [1, 1, 0, 1, 1]}, "Olmo2": {}, "Phi3": {"sliding_window": None},
    "Gemma2": WINDOWS | HEADS | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "Gemma3": WINDOWS | HEADS | {"query_pre_attn_scalar": 8},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None} | HEADS,
    "Qwen3Moe": EXPERTS | HEADS}


def built(family, **more):
    """A small random model of a family, as transformers makes it."""
    name = "Gemma3" if family == "Gemma3" else family
    text = "Text" if family == "Gemma3" else ""
    config = getattr(hf, f"{name}{text}Config")(**SMALL | FAMILIES.get(family, {}) | more)
    return randomise(getattr(hf, f"{name}ForCausalLM")(config))


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, built(family))


def held(model):
    return any(module in HELD for module in model.modules())


def prompt(length, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(2, 256, (1, length), generator=rng)


def written(model, ids, count=24, **rules):
    """Greedy tokens and their scores."""
    rules = {"do_sample": False, "max_new_tokens": count, "output_logits": True,
             "return_dict_in_generate": True} | rules
    out = model.generate(ids, **rules)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def random_butler(model, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"stride": 2, "hidden": 16, "size": 8} | sizes
    return Butler(ButlerConfig.for_model(Anatomy(model), **sizes)).requires_grad_(False)


def projected_keys(model, tokens):
    """What every layer's key projection (and the norm behind it) gives, before it turns."""
    seen, hooks, c = {}, [], model.config
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        last = getattr(attention, "k_norm", None) or getattr(
            attention, "k_proj", None) or attention.qkv_proj

        def keep(module, args, out, i=i):
            seen[i] = out

        hooks.append(last.register_forward_hook(keep))
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    G, (B, T) = c.num_key_value_heads, tokens.shape
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()

    def shaped(out):
        if out.shape[-1] > G * D:  # q, k and v in one
            out = out[..., c.num_attention_heads * D :][..., : G * D]
        if out.dim() == 3:
            out = out.view(B, T, G, D)
        return out.transpose(1, 2) if out.shape[1] == T else out

    return {i: shaped(out) for i, out in seen.items()}


# ---------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_turned_back_are_what_the_projection_made(family, models):
    model, tokens = copy.deepcopy(models(family)), prompt(40)
    expected = projected_keys(model, tokens)
    engine = Engine(model)
    butler = Butler(ButlerConfig.for_model(engine))
    record = train.record(engine, tokens)
    numbers = engine.anatomy.numbers
    rows = engine.frequencies if engine.frequencies.dim() > 1 else ()
    still = [n for n, row in enumerate(rows) if not row.any()]
    assert still == [1] * (family == "SmolLM3")  # its layer 2, the second that is selected
    assert len(numbers) >= 4 and list(numbers.values()) == list(range(len(numbers)))
    for i, n in list(numbers.items())[1:]:
        angles = record.positions[:, None] * butler.rope[n - 1]
        assert_close(f"layer {i}", turned_back(record.keys[n], angles), expected[i], 1e-4)


def test_yarn_is_taken_from_the_rotary_module():
    """It changes the frequencies, not with the length, and makes keys longer."""
    model, tokens = built("Llama", rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 128}), prompt(40)
    expected, scaling = projected_keys(model, tokens), model.model.rotary_emb.attention_scaling
    engine = Engine(model)
    record = train.record(engine, tokens)
    plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    assert scaling > 1.1 and not torch.allclose(engine.frequencies, plain, rtol=0.1)
    angles = record.positions[:, None] * engine.frequencies
    for i in range(1, 5):
        assert_close(f"layer {i}", turned_back(record.keys[i], angles), expected[i] * scaling, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_all_is_the_models_own_attention(family, models):
    model, ids = models(family), prompt(40)
    tokens, logits = written(model, ids, 64)
    with attached(model, partial(make_selector, "oracle", 1.0)) as at:
        again, ours = written(model, ids, 64)
        assert len(at.rows[0][2].index) == len(at.anatomy.numbers) - 1
    assert_close("logits", ours, logits, 1e-3)
    assert again.tolist() == tokens.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing_and_static_caches_neither(family, models):
    model = models(family)
    butler = random_butler(model)
    texts = [prompt(n, n) for n in (31, 60, 47)]
    batch = torch.cat([torch.nn.functional.pad(t, (60 - t.shape[1], 0)) for t in texts])
    mask = torch.arange(60) >= torch.tensor([[60 - t.shape[1]] for t in texts])
    with attached(model, lambda: butler.selector(20)) as at:
        single = [written(model, t) for t in texts]
        assert len(at.rows[0][2].index[1][0, 0, 0]) == 20
        for rules in {}, {"cache_implementation": "static"}:
            tokens, logits = written(model, batch, attention_mask=mask.long(), **rules)
            assert tokens.tolist() == [t[0].tolist() for t, _ in single], rules
            assert_close(str(rules), logits, torch.cat([x for _, x in single]), 1e-4)
    dense, _ = written(model, texts[1])
    assert dense.tolist() != single[1][0].tolist()  # the selection did something


@pytest.mark.parametrize("family", FAMILIES)
def test_a_butler_learns_through_the_engine(family, models):
    engine = Engine(copy.deepcopy(models(family)))
    torch.manual_seed(0)
    butler = Butler(ButlerConfig.for_model(engine, stride=2, hidden=32, size=16))
    optimizers = train.make_optimizers(butler, 1e-2)
    record = train.record(engine, torch.cat([prompt(96, s) for s in range(2)]))
    losses = []
    for _ in range(20):
        kl = train.distillation(butler, record).mean()
        train.update(butler, optimizers, kl, 1e-2)
        losses.append(kl.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_computes_what_the_model_does(family, models):
    """Logits in one block, in chunks behind a prompt of several lengths, and with gaps."""
    model = models(family)
    engine, tokens = Engine(copy.deepcopy(model)), torch.cat([prompt(50, 1), prompt(50, 2)])
    with torch.no_grad():
        expected = model(tokens).logits
        assert_close("block", engine(tokens), expected, 1e-3)
        cache = engine.new_cache(2, 64)
        engine.prefill(tokens[:, :40], cache, lengths=[40, 33])
        second = torch.stack([tokens[0, 40:47], tokens[1, 33:40]])
        assert_close("ragged", engine(second, cache),
                     torch.stack([expected[0, 40:47], expected[1, 33:40]]), 1e-3)
        gaps = torch.arange(50)[None] * 3
        assert_close("gaps", engine(tokens, positions=gaps, last=True),
                     model(tokens, position_ids=gaps,
                           attention_mask=torch.ones(2, 50)).logits[:, -1:], 1e-3)
        cache = engine.new_cache(1, 64)
        engine.prefill(tokens[:1, :40], cache)
        step = make_selector("oracle", 1.0)
        assert_close("step", engine.decode(tokens[:1, 40:41], cache, step), expected[:1, 40:41],
                     1e-3)


# ---------------------------------------------------------------------------- one model, attached


def test_detaching_restores_the_model(models):
    model, ids = models("Qwen3"), prompt(40)
    before, state = model(ids).logits, copy.deepcopy(model.config.to_dict())
    implementation = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attached(model, partial(make_selector, "recency", 0.5)):
        model.generate(ids, max_new_tokens=4)
        with pytest.raises(ModelError, match="attached already"), attached(model, None):
            pass
        _ = 1 / 0
    assert torch.equal(model(ids).logits, before) and not held(model)
    assert model.config.to_dict() == state
    assert model.config._attn_implementation == implementation
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_second_text_starts_clean_and_a_cached_prompt_goes_on(models):
    model, ids = models("Qwen3"), prompt(60)
    for name in "butler", "h2o":  # h2o remembers what it saw
        butler = random_butler(model)
        make = partial(make_selector, name, 20, butler)
        with attached(model, make) as at:
            tokens, logits = written(model, ids)
            first = at.rows[0][2]
            written(model, prompt(90, 5))
            again, same = written(model, ids)
            assert at.rows[0][2] is not first and torch.equal(logits, same)
            cache = hf.DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids[:, :33], **{CACHE: cache})
            reader = at.rows[0][2]
            on, close = written(model, ids, **{CACHE: cache})
            assert at.rows[0][2] is reader
        assert again.tolist() == on.tolist() == tokens.tolist(), name
        assert_close(name, close, logits, 1e-4)


def test_a_copy_of_a_cached_prompt_gets_a_selector_of_its_own(models):
    """A prefix read once, two continuations, each from its own copy."""
    model, ids, butler = models("Qwen3"), prompt(60), random_butler(models("Qwen3"))
    texts = [torch.cat([ids, prompt(7, seed)], dim=1) for seed in (1, 2)]
    with attached(model, lambda: butler.selector(20)):
        expected = [written(model, text)[0].tolist() for text in texts]
        prefix = hf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, **{CACHE: prefix})
        assert expected == [written(model, text, **{CACHE: copy.deepcopy(prefix)})[0].tolist()
                            for text in texts]


def test_sampling_and_streaming(models):
    model, ids = models("Qwen3"), prompt(40)

    class Heard(hf.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    with attached(model, partial(make_selector, "oracle", 1.0)):
        torch.manual_seed(3)
        ours, streamer = None, Heard()
        ours, _ = written(model, ids, do_sample=True, temperature=0.9, top_p=0.9,
                          streamer=streamer)
    torch.manual_seed(3)
    own, _ = written(model, ids, do_sample=True, temperature=0.9, top_p=0.9)
    assert ours.tolist() == own.tolist()
    assert streamer.tokens == [*ids[0].tolist(), *ours[0].tolist(), None]


def test_nothing_attends_to_padding(models):
    """NaN where the padding is: a number that was read, even times 0, would spread."""
    model, ids = models("Qwen3"), prompt(40)
    cache = hf.DynamicCache(config=model.config)
    batch = torch.cat([ids, ids])
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with attached(model, partial(make_selector, "oracle", 20)) as at, torch.no_grad():
        model(batch, attention_mask=mask, position_ids=places, **{CACHE: cache})
        assert [(pad, len(range(2)[some])) for some, pad, _ in at.rows] == [(0, 1), (13, 1)]
        for layer in cache.layers:
            layer.keys[1, :, :13] = layer.values[1, :, :13] = torch.nan
        out = model(batch[:, :1], attention_mask=torch.ones(2, 41), **{CACHE: cache},
                    position_ids=torch.tensor([[40], [27]]))
    assert out.logits.isfinite().all()


def test_padding_elsewhere_is_refused(models):
    model, ids, mask = models("Qwen3"), prompt(8), torch.ones(1, 8, dtype=torch.long)
    with attached(model, partial(make_selector, "oracle", 20)):
        mask[0, -2:] = 0
        with pytest.raises(ModelError, match="left"):
            model(ids, attention_mask=mask)
        with pytest.raises(ModelError, match="position_ids"):
            model(ids, attention_mask=mask.flip(-1))
        with pytest.raises(ModelError, match="position_ids"):  # gaps
            model(ids, position_ids=torch.arange(ids.shape[1])[None] * 5)


def test_beams_are_refused(models):
    model = models("Llama")
    with attached(model, partial(make_selector, "recency", 0.5)), pytest.raises(
            ModelError, match="num_beams=1"):
        cache = hf.DynamicCache()
        model.generate(prompt(20), num_beams=2, max_new_tokens=8, **{CACHE: cache})
    assert "reorder_cache" not in vars(cache)


def test_a_folder_without_some_weights_is_refused(tmp_path):
    model = built("Qwen3")
    left = {n: t for n, t in model.state_dict().items() if "layers.1.mlp" not in n}
    model.save_pretrained(tmp_path, state_dict=left)
    with pytest.raises(ModelError, match="3 tensors are missing"):
        Engine.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="transformers cannot load it"):
        Engine.from_pretrained(tmp_path)


def test_a_tokenizer_in_another_form_is_translated(folder, tmp_path):
    """vocab.json and merges.txt, which ours does not read: the same ids, whole characters."""
    built("Qwen3", vocab_size=512).save_pretrained(tmp_path)
    both = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(both["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(
        f"{pair if isinstance(pair, str) else ' '.join(pair)}\n" for pair in both["merges"]))
    config = SimpleNamespace(model=str(tmp_path), engine="own")
    with pytest.raises(tokenizer.TokenizerError, match="no tokenizer.json"):
        found(config)
    config.engine = "transformers"
    tok = found(config)[1]
    ids = tok.encode("the harbour")
    assert ids == tokenizer.load(folder).encode("the harbour") and len(ids) > 1
    assert b"".join(tok.decode_bytes([i]) for i in tok.encode("café")).decode() == "café"
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(tokenizer.TokenizerError, match="no tokenizer.json"):
        found(config)


@pytest.mark.parametrize("name", ["quest", "h2o", "snapkv", "keynorm", "recency", "random"])
def test_every_rival_chooses_for_a_transformers_model(name, models):
    model = models("Gemma2")
    with attached(model, partial(make_selector, name, 20)) as at:
        tokens, _ = written(model, prompt(70))
        index = at.rows[0][2].index
    assert tokens.shape == (1, 24) and sorted(index) == [1, 2, 3]
    assert all(len(i[i >= 0].unique()) <= 93 and i.shape[-1] <= 20 for i in index.values())


# ---------------------------------------------------------------------------- refusals


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 128}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
       "num_experts_per_tok": 2, "moe_intermediate_size": 32}
REFUSED = {
    "every layer has a window of 64 tokens": ("Mistral", {"sliding_window": 64}),
    r"only 8 of a head's 16 channels turn": ("Phi3", {"sliding_window": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    r"frequencies \(longrope\) change": ("Phi3", {"sliding_window": None,
                                                 "rope_parameters": LONG}),
    r"frequencies \(dynamic\) change": ("Llama", {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "do not turn in pairs of channels": ("Cohere", {}),  # neighbours turn together
    r"compressed form \(MLA\)": ("DeepseekV3", MLA),
    "sinks or biases": ("GptOss", HEADS | {
        "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "no self_attn with keys": ("Bloom", {}),
    "it has layers of linear_attention": ("Mamba", {}),
    "layers of linear_attention, neither full": ("Qwen3Next", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8})}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_work_is_refused_by_name(reason):
    family, more = REFUSED[reason]
    model = built(family, **more)
    with pytest.raises(ModelError, match=reason) as refusal, \
            attached(model, None):
        pass
    assert "\n" not in str(refusal.value) and not held(model)
    assert model.config._attn_implementation != "tokenbutler"


def test_an_encoder_is_refused():
    config = hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration.*encoder"), \
            attached(hf.T5ForConditionalGeneration(config), None):
        pass


# ---------------------------------------------------------------------------- both engines


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A random Llama as a folder, through transformers and through model.py."""
    path = tmp_path_factory.mktemp("twins")
    model = built("Llama")
    model.save_pretrained(path)
    return path, model, Llama.from_pretrained(path)


def test_both_engines_have_one_fingerprint_and_choose_the_same(twins):
    path, model, llama = twins
    engine, ids = Engine.from_pretrained(path), prompt(80)
    assert fingerprint(engine) == fingerprint(llama)
    assert_close("frequencies", engine.frequencies, llama.frequencies, 1e-8)
    butler = Butler(ButlerConfig.for_model(llama, stride=2, size=16)).requires_grad_(False)
    butler.check(engine)
    steps = {}
    for name, made in ("own", llama), ("engine", engine):
        cache, select, token = made.new_cache(1, 140), butler.selector(0.25), ids[:, -1:]
        made.prefill(ids[:, :-1], cache, select.watch)
        steps[name] = []
        for _ in range(50):
            token = made.decode(token, cache, select).argmax(-1)
            steps[name].append((token.item(), {n: i.sort().values.tolist()
                                               for n, i in select.index.items()}))
    assert steps["own"] == steps["engine"] and len(steps["own"][0][1]) == 4


def test_an_engine_that_nobody_has_is_gone():
    engine = Engine(built("Qwen3"))
    engine(prompt(8))
    gone, attention = weakref.ref(engine), weakref.ref(engine.layers[0].self_attn)
    assert attention() in HELD
    del engine
    gc.collect()
    assert gone() is None and attention() is None


@pytest.fixture(scope="module")
def stranger(folder, tmp_path_factory):
    """A folder with a model that model.py does not implement, and a tokenizer."""
    path = tmp_path_factory.mktemp("qwen3")
    built("Qwen3", vocab_size=512, num_hidden_layers=3, max_position_embeddings=1024
          ).save_pretrained(path)
    (path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return path


def test_all_scripts_take_a_model_of_transformers(stranger, main, tmp_path):
    text, data, butler = tmp_path / "t.txt", tmp_path / "q.jsonl", tmp_path / "butler.safetensors"
    text.write_text("One cup of tea, two cups of tea, and a spoon for every cup. " * 200)
    data.write_text('{"context": "Tea is hot. Ice is cold.", "question": " Ice is", '
                    '"answer": "cold"}\n')
    flags = "--model", stranger, "--engine", "transformers"
    report = main("train.py", *flags, "--data", text, "--out", butler, "--steps", 4, "--length",
                  128, "--long", 192, "--rows", 4, "--hidden", 8, "--size", 8, "--documents", 1,
                  "--windows", 1, "--longest", 128)
    assert len(report["loss"]) == 4 and report["table"]["butler"]["kept"]["128"]["n"] == 1
    flags += "--butler", butler
    report = main("sample.py", *flags, "--prompt", "Tea is " * 30, "--max-new-tokens", 6,
                  "--temperature", 0)
    assert report["new_tokens"] and report["attended_per_step"] < report["cached_tokens"]
    report = main("synth_task.py", *flags, "--data", data, "--selectors", "dense,butler,oracle",
                  "--budgets", "0.5")
    assert report["results"]["data"]["butler"]["0.5"]["n"] == 1
    for suite in "perplexity", "recall", "length":
        report = main("bench.py", *flags, "--suite", suite, "--text", text, "--n", 2, "--length",
                      96, "--contexts", "64,128")
        assert report["results"], suite
    model = hf.AutoModelForCausalLM.from_pretrained(stranger)  # what was trained serves generate
    learned = butler_for(model, butler)
    with attached(model, lambda: learned.selector(20)) as at:
        written(model, prompt(60))
    assert at.rows[0][2].index[2].shape == (1, 2, 1, 20)
    with pytest.raises(ButlerError, match="another base model"):
        butler_for(built("Qwen3"), butler)


def test_timed_suites_and_other_engines_are_refused(stranger, main):
    with pytest.raises(SystemExit):
        main("bench.py", "--suite", "speed", "--engine", "transformers")
    with pytest.raises(SystemExit):
        main("sample.py", "--engine", "mlx")


def test_the_engine_refuses_in_one_line(stranger, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelError, match="transformers cannot load it"):
        Engine.from_pretrained(tmp_path)
    engine = Engine.from_pretrained(stranger)
    with pytest.raises(ModelError, match="do not fit"):
        engine(torch.zeros(1, 4, dtype=torch.long), engine.new_cache(1, 3))


@pytest.fixture(scope="module")
def smollm(model_path):
    """The default model as transformers reads it."""
    return hf.AutoModelForCausalLM.from_pretrained(
        model_path.parent, gguf_file=model_path.name, dtype=torch.float32)


@pytest.mark.slow
def test_the_default_model_chooses_the_same_tokens_through_transformers(smollm, llama, tok):
    """float32, 50 steps, all layers, the shipped butler; what `generate` does is what model.py
    does."""
    document = coreference_documents("test", 1, 0)[0]
    ids = torch.tensor([tok.encode(document.context + document.question)])
    butler, chosen = butler_for(smollm), []

    class Noted(ButlerSelector):
        def __call__(self, layer, *seen):
            index = super().__call__(layer, *seen)
            if layer == 29:
                chosen.append({n: i.sort().values for n, i in self.index.items()})
            return index

    with attached(smollm, lambda: Noted(butler, 0.1)):
        smollm.generate(ids[:, :-1], max_new_tokens=1, do_sample=False)  # a text before this one
        tokens, _ = written(smollm, ids, 51, eos_token_id=None)
    cache, select, token = llama.new_cache(1, 500), butler.selector(0.1), tokens[:, :1]
    llama.prefill(ids, cache, select.watch)
    same = []
    for step in range(50):
        logits = llama.decode(token, cache, select)
        assert logits.argmax() == tokens[0, step + 1]
        token = tokens[:, step + 1 : step + 2]
        same.append(all(torch.equal(select.index[n].sort().values, i)
                        for n, i in chosen[step].items()))
    assert len(chosen) == 50 and len(chosen[0]) == 29
    assert all(same), same
