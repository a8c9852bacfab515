"""The page of `sample.py --html`: what it holds, and what a real browser makes of it."""

import base64
import os
import re
import zlib
from functools import partial
from itertools import pairwise

import pytest
import torch
from browser import Browser, find

from baselines import NAMES, make_selector
from beyond.offload import DiskCache
from beyond.page import Beside, texts
from butler import Butler, ButlerConfig, load_for
from kernel import true_attention
from sample import Config, generate

PROMPT = ("</script><b>&amp;</b> & <!-- \u2028 \tA tab,\n\n newlines, an \u00e9 and \U0001f9a9. "
          + "The harbour was quiet that morning, and the boats lay still. " * 12)
WRITTEN = " \U0001f9a9\n\n\t</script>&lt;\u4f60'\""
LAYERS, HEADS, SINKS, WINDOW = 29, 3, 4, 8


class Spy:
    """Notes what passes by: of each step and layer the queries, keys and the selector's answer."""

    def __init__(self, inner):
        self.inner, self.steps, self.watch = inner, [], inner.watch

    def __call__(self, layer, x, q, keys, positions):
        index = self.inner(layer, x, q, keys, positions)
        if layer == 0:
            self.steps.append([])
        else:
            self.steps[-1].append((q, keys.clone(), positions, index))
        return index


def follow(llama, ids, written, selector):
    """The model reads `ids` and is made to write `written`."""
    cache = llama.new_cache(1, len(ids) + len(written))
    llama.prefill(torch.tensor([ids[:-1]]), cache, selector and selector.watch)
    for token, new in pairwise([ids[-1], *written]):
        yield llama.decode(torch.tensor([[token]]), cache, selector), new


def unpack(beside, step, layers):
    data = zlib.decompress(base64.b64decode(beside.steps[step]))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(2, layers, -1)


@pytest.fixture(scope="module")
def shown(llama, tok, tmp_path_factory):
    """-> page, its spy, its texts, tokens in the prompt"""
    ids, written = tok.encode(PROMPT), tok.encode(WRITTEN)
    beside = Beside(load_for(llama).selector(0.2), 0.2)
    spy = Spy(beside)
    for _, new in follow(llama, ids, written, spy):
        beside.add(new)
    path = tmp_path_factory.mktemp("page") / "page.html"
    size = beside.write(path, tok, ids, "butler", {"text": "</script>", "argument": "\udc80"})
    assert size == path.stat().st_size
    return path, spy, texts(tok, ids + written), len(ids)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = find()
    if command is None:
        missing = "no Chromium on PATH or in CHROMIUM: apt-get install chromium-headless-shell"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    browser = Browser(command, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def kept(spy, step, layer) -> tuple[list, list]:
    """Sets of tokens, one a KV head: the run's, and the best by the true attention."""
    q, keys, positions, index = spy.steps[step][layer - 1]
    S = keys.shape[2]
    always = {*range(SINKS), *range(S - WINDOW, S)}
    free = torch.arange(SINKS, S - WINDOW)
    attention = true_attention(q, keys, positions).mean(2)[0, :, 0]
    top = attention[:, free].topk(int(0.2 * S) - SINKS - WINDOW).indices
    return ([set(row.tolist()) - {-1} for row in index[0, :, 0]],
            [always | set(free[row].tolist()) for row in top])


def expected(spy, step, layers) -> tuple[list, float]:
    """Per side how many of the layers and heads kept each token; the share of the oracle's choice
    that was kept, in percent."""
    counts, shares = [[], []], []
    S = spy.steps[step][0][1].shape[2]
    for layer in layers:
        run, best = kept(spy, step, layer)
        free = set(range(SINKS, S - WINDOW))
        shares.append(round(100 * sum(len(a & b & free) for a, b in zip(run, best, strict=True))
                            / sum(len(b & free) for b in best)))
        for side, sets in zip(counts, (run, best), strict=True):
            side += sets
    return ([[sum(s in kept for kept in side) for s in range(S)] for side in counts],
            sum(shares) / len(shares))


SHADES = """[...document.querySelectorAll('.text')].map(pane => [...pane.children].map(span => [
    span.title, +(getComputedStyle(span).backgroundColor.match(/[\\d.]+/g)[3] ?? 1)]))"""


def check_shades(browser, shown, step, layer):
    """Every token's shade and title on both sides, and the share in the line above."""
    _, spy, pieces, prompt = shown
    line = "document.getElementById('now').textContent"
    name = f"Layer {layer}" if layer else "All layers"
    browser.wait(f"{line}.startsWith('Token {step + 1} of') && {line}.includes('{name}:')")
    layers = [layer] if layer else range(1, LAYERS + 1)
    counts, share = expected(spy, step, layers)
    out_of = len(layers) * HEADS
    for side, spans in zip(counts, browser.run(SHADES), strict=True):
        assert len(spans) == len(pieces) and len(side) == prompt + step
        assert [title for title, _ in spans[: len(side)]] == [
            f"kept by {count} of {out_of}" for count in side]
        assert {title for title, _ in spans[len(side):]} == {"not yet there"}
        for (_, alpha), count in zip(spans, side + [0] * (len(spans) - len(side)), strict=True):
            assert alpha == pytest.approx((count / out_of) ** 0.5, abs=0.005)
    stated = re.search(r"(\d+) % of the oracle", browser.run(line))[1]
    assert int(stated) == pytest.approx(share, abs=0.51)


def token(step, side=0) -> str:
    return f"document.querySelectorAll('.text')[{side}].querySelectorAll('[role=button]')[{step}]"


def layer_button(layer) -> str:
    return f"document.querySelectorAll('#layers button')[{layer}]"


def test_clicks_show_what_was_kept(browser, shown):
    browser.open(shown[0])
    check_shades(browser, shown, 0, 0)  # at once, the first step and all layers
    last = len(shown[2]) - shown[3] - 1
    browser.click(token(4))
    check_shades(browser, shown, 4, 0)
    browser.click(layer_button(7))
    check_shades(browser, shown, 4, 7)
    browser.click(token(last, side=1))
    check_shades(browser, shown, last, 7)
    browser.click(layer_button(0))
    check_shades(browser, shown, last, 0)
    pressed = browser.run("[...document.querySelectorAll('[aria-pressed=true]')]"
                          ".map(e => e.getAttribute('aria-label').split(':')[0])")
    assert pressed == ["all layers", f"token {last + 1}", f"token {last + 1}"]


def test_keys_step_through_tokens_and_layers(browser, shown):
    browser.open(shown[0])
    check_shades(browser, shown, 0, 0)
    browser.press("ArrowRight")  # with nothing in focus
    check_shades(browser, shown, 1, 0)
    browser.click(layer_button(1))
    browser.press("ArrowRight")
    check_shades(browser, shown, 1, 2)
    browser.press("ArrowLeft")
    check_shades(browser, shown, 1, 1)
    for _ in range(40):  # stops at the end
        browser.press("ArrowRight")
    check_shades(browser, shown, 1, LAYERS)
    browser.run(f"{token(1, side=1)}.focus()")
    browser.press("ArrowRight")
    check_shades(browser, shown, 2, LAYERS)
    assert browser.run(f"document.activeElement === {token(2, side=1)}")
    browser.run(f"{token(5)}.focus()")
    browser.press("Enter")
    check_shades(browser, shown, 5, LAYERS)
    browser.click("document.getElementById('back')")
    check_shades(browser, shown, 4, LAYERS)


def test_the_last_choice_wins(browser, shown):
    """A step that takes longer to unpack does not overwrite what was asked for after it."""
    browser.open(shown[0])
    browser.run("""(() => {
        const at_once = unpack
        unpack = async step => {
            await new Promise(done => setTimeout(done, step === 5 ? 300 : 0))
            return at_once(step)
        }
        return Promise.all([go({step: 5}), go({step: 1})])
    })()""")
    check_shades(browser, shown, 1, 0)


def test_the_text_is_whole_and_nothing_is_loaded(browser, shown, tok):
    """What looks like markup is text; half characters wait for their other half."""
    path, _, pieces, prompt = shown
    assert "".join(pieces) == PROMPT + WRITTEN and "" in pieces[prompt:]
    assert texts(tok, tok.encode(" \U0001f9a9")[:-1])[-1] == "\ufffd"  # cut off by the end
    browser.open(path)
    check_shades(browser, shown, 0, 0)
    assert browser.run("[...document.querySelectorAll('.text')].map(pane => pane.textContent)") == [
        PROMPT + WRITTEN] * 2
    boxes = browser.run("[...document.querySelectorAll('[role=button]')].map(e => "
                        "[e.getClientRects()[0].width, e.getAttribute('aria-label').length])")
    assert all(width > 0 and label for width, label in boxes)  # a newline can be clicked too
    assert '"text": "</script>"' in browser.run("document.getElementById('facts').textContent")
    requests = [e["request"]["url"] for e in browser.reported("Network.requestWillBeSent")]
    assert requests == [path.as_uri()]
    assert browser.reported("Runtime.exceptionThrown", "Runtime.consoleAPICalled",
                            "Log.entryAdded") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_every_shade(browser, shown, scheme):
    """Contrast of at least 4.5 : 1 (WCAG 2, level AA)."""
    browser.open(shown[0], scheme)
    check_shades(browser, shown, 0, 0)
    ink, paper, kept = browser.run("""[getComputedStyle(document.body).color,
        getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('.text span')).backgroundColor]""")

    def light(colour):
        parts = [float(c) / 255 for c in re.findall(r"[\d.]+", colour)[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    assert kept.startswith("rgb(")  # a sink: kept by all, without transparency
    assert (light(paper) > 0.5) == (scheme == "light")
    for ground in (paper, kept):
        low, high = sorted((light(ink), light(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, ink, ground)


def test_a_page_of_nothing_says_so(browser, tok, tmp_path):
    path = tmp_path / "page.html"
    Beside(None, 0.5).write(path, tok, tok.encode("Nothing follows."), "dense", {})
    browser.open(path)
    assert browser.run("document.getElementById('about').textContent") == "Nothing was generated."
    browser.press("ArrowRight")
    assert browser.reported("Runtime.exceptionThrown") == []


@pytest.mark.parametrize("name", NAMES)
def test_the_model_attends_to_the_selectors_choice_alone(tiny, name):
    """Beside the oracle a run computes exactly what it computes without, whatever chooses."""
    ids, written = torch.arange(60).tolist(), [7, 1, 99, 4]
    butler = Butler(ButlerConfig.for_model(tiny))
    beside = Beside(make_selector(name, 24, butler), 24)
    runs = zip(follow(tiny, ids, written, make_selector(name, 24, butler)),
               follow(tiny, ids, written, beside), strict=True)
    for step, ((expected, _), (logits, new)) in enumerate(runs):
        assert torch.equal(logits, expected)
        beside.add(new)
        counts = unpack(beside, step, 4)
        assert counts.shape[-1] == 60 + step
        attended = 60 + step if name == "dense" else 24
        assert (counts.sum(-1) == torch.tensor([2 * attended, 2 * 24])[:, None]).all()
        if name in ("dense", "oracle"):
            assert beside.same[step] == [100] * 4


def test_rows_are_fetched_ahead_beside_the_oracle_too(tiny, tmp_path):
    told = []

    class Told(DiskCache):
        def read_ahead(self, layers, tokens):
            told.append(layers)
            super().read_ahead(layers, tokens)

    beside = Beside(Butler(ButlerConfig.for_model(tiny)).selector(24), 24)
    assert len(list(generate(tiny, list(range(60)), beside, Config(max_new_tokens=3), (),
                             partial(Told, folder=tmp_path)))) == 3
    assert told == [[1, 2, 3, 4]] * 3
