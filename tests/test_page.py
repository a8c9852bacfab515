"""The page of `sample.py --html`: what it holds, and what a browser draws from it."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise

from butler import Butler, ButlerConfig
from kernel import true_attention
from selection import make_selector
from workshop.page import Page

PROMPT = ("</script><b>&amp;</b> & <!-- \u2028 \tA tab,\n\n newlines, an \u00e9 and \U0001f9a9. "
          + "The harbour was quiet that morning, and the boats lay still. " * 3)
GENERATED = " \U0001f9a9\n\n\t</script>&lt;\u4f60'\""
SINKS, WINDOW, BUDGET = 4, 8, 0.3
CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")


class Spy:
    """Passes everything on, and records each step's queries, keys and answers."""

    def __init__(self, inner):
        self.inner = inner
        self.watch = inner.watch
        self.steps = []

    def __call__(self, layer, x, q, keys, positions):
        index = self.inner(layer, x, q, keys, positions)
        if layer == 0:
            self.steps.append([])
        else:
            self.steps[-1].append((q.clone(), keys.clone(), index))
        return index


def forced(llama, ids, generated, selector):
    """Reads `ids`, then decodes as if the model had generated `generated` -> (logits, token)."""
    cache = llama.new_cache(1, len(ids) + len(generated))
    llama.prefill(torch.tensor([ids[:-1]]), cache, selector.watch if selector else None)
    for token, new in pairwise([ids[-1], *generated]):
        yield llama.decode(torch.tensor([[token]]), cache, selector), new


def expected(step) -> np.ndarray:
    """The masks [2, L-1, G, S] of a spied step, computed one KV head at a time."""
    masks = np.zeros((2, len(step), *step[0][1].shape[1:3]), bool)
    for layer, (q, keys, index) in enumerate(step):
        S = keys.shape[2]
        attention = true_attention(q, keys).mean(2)[0, :, 0]  # [G, S]
        for head, row in enumerate(index[0, :, 0].tolist()):
            masks[0, layer, head, [token for token in row if token >= 0]] = True
            masks[1, layer, head, :SINKS] = masks[1, layer, head, S - WINDOW :] = True
            ranked = sorted(range(SINKS, S - WINDOW), key=lambda t, a=attention[head]: -a[t])
            masks[1, layer, head, ranked[: int(BUDGET * S) - SINKS - WINDOW]] = True
    return masks


def read(path) -> tuple[dict, list]:
    """-> the page's data, and the masks [2, L-1, G, S] of each step"""
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])
    masks = []
    for step, text in enumerate(data["steps"]):
        shape = (2, data["layers"], data["heads"], data["prompt"] + step)
        bits = np.frombuffer(base64.b64decode(text), np.uint8)
        masks.append(np.unpackbits(bits, count=np.prod(shape), bitorder="little").reshape(shape))
    return data, masks


@pytest.fixture(scope="module")
def drawn(llama, tok, butler, tmp_path_factory):
    """A page of the default model -> its path, the masks that each step should have"""
    ids, generated = tok.encode(PROMPT), tok.encode(GENERATED)
    page = Page(butler.selector(BUDGET), BUDGET)
    spy = Spy(page)
    for _, new in forced(llama, ids, generated, spy):
        page.add(new)
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(path, tok, ids, "butler", {"text": "</script>", "argument": "\udc80"})
    return path, [expected(step) for step in spy.steps]


def test_the_page_holds_both_selections_of_every_step(drawn):
    path, masks = drawn
    data, held = read(path)
    for step, (mask, other) in enumerate(zip(masks, held, strict=True)):
        assert np.array_equal(mask, other), step
    assert "".join(data["texts"]) == PROMPT + GENERATED
    assert "" in data["texts"][data["prompt"] :]  # the bird takes several tokens
    assert data["facts"] == {"text": "</script>", "argument": "\udc80"}


@pytest.mark.parametrize("name", ["dense", "butler", "oracle"])
def test_the_run_computes_the_same_beside_the_oracle(tiny, tok, tmp_path, name):
    ids, generated = list(range(60)), [7, 1, 99, 4]
    butler = randomise(Butler(ButlerConfig.for_model(tiny)))
    page = Page(make_selector(name, 24, butler), 24)
    runs = zip(forced(tiny, ids, generated, make_selector(name, 24, butler)),
               forced(tiny, ids, generated, page), strict=True)
    for (alone, _), (logits, new) in runs:
        assert torch.equal(logits, alone)
        page.add(new)
    page.write(tmp_path / "page.html", tok, ids, name, {})
    for step, (run, best) in enumerate(read(tmp_path / "page.html")[1]):
        assert (run.sum(-1) == (60 + step if name == "dense" else 24)).all()
        assert (best.sum(-1) == 24).all()
        assert name != "oracle" or (run == best).all()


def test_an_interrupted_write_leaves_the_older_page(tok, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("older")

    def interrupted(part, text, **rules):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Page(None, 0.5).write(path, tok, [1], "dense", {})
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------- in a browser


def browse(path, fragment="") -> str:
    """The page as a browser has drawn it, in HTML."""
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--dump-dom", path.as_uri() + fragment]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def status(html) -> str:
    return re.search(r'id="status"[^>]*>([^<]*)<', html)[1]


def check_drawn(html, masks, step, layer) -> None:
    """Every token's shade and title on both sides, and the share in the status line."""
    mask = masks[step][:, layer - 1 : layer] if layer else masks[step]
    out_of = mask.shape[1] * mask.shape[2]
    panes = re.findall(r'<div class="text">(.*?)</div>', html, re.S)
    for side, pane in zip(mask, panes, strict=True):
        counts = side.sum((0, 1))
        later = len(masks) - step  # tokens generated at this step and after it
        titles = [f"selected by {count} of {out_of}" for count in counts]
        assert re.findall(r'title="([^"]*)"', pane) == titles + ["not cached yet"] * later
        shades = [float(alpha) for alpha in re.findall(r"--alpha: ([\d.]+)", pane)]
        assert shades == pytest.approx([*(counts / out_of) ** 0.5, *[0] * later], abs=6e-4)
    run, best = mask[..., SINKS:-WINDOW]
    share = int(100 * (run & best).sum() / best.sum() + 0.5)
    name = f"Layer {layer}" if layer else "All layers"
    assert re.match(rf"Token {step + 1} of {len(masks)}, .* {mask.shape[3]} tokens cached. "
                    rf"{name}: {share} % of the", status(html))


@pytest.mark.parametrize("fragment, step, layer", [
    ("", 0, 0), ("#step=4&layer=7", 3, 7), ("#step=999&layer=99", -1, 29)])
def test_a_browser_shades_what_was_selected(drawn, fragment, step, layer):
    path, masks = drawn
    check_drawn(browse(path, fragment), masks, step % len(masks), layer)


def test_clicks_and_keys_change_step_and_layer(drawn, tmp_path):
    script = """<script>
        const press = (key, shiftKey) =>
            document.dispatchEvent(new KeyboardEvent('keydown', {key, shiftKey}))
        document.querySelectorAll('.generated')[4].click()      // step 5
        press('ArrowRight', false)                              // step 6
        document.querySelectorAll('#layers button')[7].click()  // layer 7
        press('ArrowRight', true)                               // layer 8
        press('ArrowRight', true)                               // layer 9
        press('ArrowLeft', false)                               // step 5
        document.getElementById('back').click()                 // step 4
        press('ArrowLeft', true)                                // layer 8
    </script>"""
    path, masks = drawn
    (tmp_path / "page.html").write_text(path.read_text() + script)
    check_drawn(browse(tmp_path / "page.html"), masks, 3, 8)


def test_a_browser_shows_any_text_as_text(drawn, tok, tmp_path):
    html = browse(drawn[0])
    panes = re.findall(r'<div class="text">(.*?)</div>', html, re.S)
    assert [unescape(re.sub("<[^>]*>", "", pane)) for pane in panes] == [PROMPT + GENERATED] * 2
    assert "&lt;/script&gt;" in re.search(r'<pre id="facts">(.*?)</pre>', html, re.S)[1]
    Page(None, 0.5).write(tmp_path / "page.html", tok, [1], "dense", {})
    assert status(browse(tmp_path / "page.html")).strip() == "No token was generated."
