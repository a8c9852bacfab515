"""beyond/page.py - an HTML page: what every step kept, beside what the oracle would have.

    q, keys of a layer --selector--> kept tokens --how many KV heads--> [2, L-1, S] bytes a step
                       --oracle----> kept tokens -^                     --zlib, base64--> page

The page needs no network and no other file. A generated token is a button: it shades every token
that was cached when it was written by how many layers and KV heads kept it, on the left as the run
had it, on the right as the oracle (baselines.py) would have chosen from the very same queries and
keys. Layer 0 attends to everything and is not shown. `python sample.py --html FILE` writes it.

One byte holds the KV heads of a layer that kept a token; a step is packed by itself and unpacked by
the browser when it is looked at. A token generated over 4,000 cached ones takes some 40 kB; several
counts in a byte would save a fifth of that.

    python -m beyond.page        what a step takes in the page, of a small random model
"""

import base64
import codecs
import json
import zlib
from pathlib import Path

import torch

from baselines import Oracle
from kernel import mark


class Beside:
    """Stands where a selector stands (None: dense), asks the oracle too, and remembers both.

    The model attends to what the selector says. One sequence, one token a step: after each, `add`
    keeps what was noted; a step without it is forgotten. The oracle chooses anew at every step,
    within the same budget, sinks and window.
    """

    read_ahead, capturable = None, False  # as a selector's; every step is looked at

    def __init__(self, selector, budget: float):
        self.selector, self.oracle = selector, Oracle(budget)
        self.tokens, self.steps, self.same, self.heads = [], [], [], 0

    def watch(self, layer, x, q, keys, positions) -> None:
        if self.selector:
            self.selector.watch(layer, x, q, keys, positions)

    def __call__(self, layer, x, q, keys, positions):
        index = None
        if self.selector:
            self.selector.read_ahead = self.read_ahead
            index = self.selector(layer, x, q, keys, positions)
        best = self.oracle(layer, x, q, keys, positions)
        if layer == 0:
            self.noted = []
            return index
        best = mark(best, keys.shape[2])[0, :, 0]  # [G, S]
        kept = torch.ones_like(best) if index is None else mark(index, keys.shape[2])[0, :, 0]
        self.noted.append((kept, best))
        return index

    def add(self, token: int) -> None:
        """The step just taken wrote this token."""
        kept, best = (torch.stack(side).cpu() for side in zip(*self.noted, strict=True))
        counts = torch.stack([kept, best]).sum(2, dtype=torch.uint8)  # [2, L-1, S]
        packed = zlib.compress(counts.numpy().tobytes())
        self.steps.append(base64.b64encode(packed).decode())
        chosen = slice(self.oracle.sinks, max(counts.shape[-1] - self.oracle.window, 0))
        found, wanted = (m[:, :, chosen].sum((1, 2)).tolist() for m in (kept & best, best))
        self.same.append([round(100 * f / w) if w else None
                          for f, w in zip(found, wanted, strict=True)])
        self.tokens.append(token)
        self.heads = kept.shape[1]

    def write(self, path, tok, ids, name: str, facts: dict) -> int:
        """The page of the prompt `ids` and the tokens added; `facts` stand at its end. -> bytes"""
        data = {"name": name, "about": self.about(name), "prompt": len(ids), "heads": self.heads,
                "texts": texts(tok, [*ids, *self.tokens]), "steps": self.steps, "same": self.same,
                "facts": json.dumps(facts, indent=1, ensure_ascii=False)}
        # Inside a script element nothing but a "<" can end it; other text is ASCII by json.
        page = PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"))
        return Path(path).write_text(page, encoding="ascii")

    def about(self, name: str) -> str:
        if not self.steps:
            return "Nothing was generated."
        run = "dense, where everything is kept" if name == "dense" else f"{name}, as the run had it"
        return (
            "The prompt of one run of TokenButler, then, underlined, what it wrote. Choose a "
            "written token by a click or with the arrow keys: the stronger the green, the more of "
            f"the {len(self.same[0])} layers and their {self.heads} KV heads kept a token at the "
            f"step that wrote the chosen one. Left: {run}. Right: the oracle, which knows that "
            f"step's true attention, at budget {self.oracle.budget:g}. The level in a layer's "
            "button is how much of the oracle's choice was kept on the left too, not counting the "
            f"first {self.oracle.sinks} and last {self.oracle.window} tokens, which always are. "
            "Layer 0 attends to everything and is not shown.")


def texts(tok, ids) -> list[str]:
    """The text of each token, "" of one that ends within a character; the next has it whole."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(ids) - 1
    return [utf8.decode(tok.decode_bytes([token]), i == last) for i, token in enumerate(ids)]


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>What was kept</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #888;
        --kept: 70 195 120; --mark: #a3006d; scroll-padding: 14rem 0 3rem }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #15171b; --line: #777; --kept: 10 115 60; --mark: #ff8fd0 } }
body { margin: 0 auto; max-width: 100rem; padding: 0 1rem 3rem; background: var(--paper);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: .8rem 0 0 } h2 { font-size: 1rem }
header { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line);
         padding: .5rem 0 }
header p { margin: .4rem 0 } button { font: inherit; padding: 0 .5rem }
#layers button { min-width: 2rem; font-size: .85rem; margin: 1px; padding: .1rem .2rem;
  border: 1px solid var(--line); border-radius: 3px; color: inherit;
  background: linear-gradient(0deg, rgb(var(--kept)) var(--same, 0%), transparent 0) }
[aria-pressed=true] { outline: 2px solid var(--mark); outline-offset: 1px }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px }
main { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4 }
.text span { background: rgb(var(--kept) / var(--k, 0)) }
.text [role=button] { border-bottom: 2px solid var(--line); cursor: pointer }
.text .later { opacity: .55 }
.line::before, .part::before { content: "\21b5"; opacity: .6 } .part::before { content: "\25cc" }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
</style>
<h1>Which cached tokens were kept?</h1>
<p id="about"></p>
<header>
<div id="layers" role="group" aria-label="Layers, and how much of the oracle's choice each kept">
</div>
<p><button id="back" aria-label="previous token">&lsaquo;</button>
<button id="next" aria-label="next token">&rsaquo;</button>
<span id="now" role="status"></span></p>
</header>
<main>
<section><h2 id="left"></h2><div class="text" role="group" aria-labelledby="left"></div></section>
<section><h2 id="right">oracle</h2><div class="text" role="group" aria-labelledby="right"></div>
</section>
</main>
<h2>The run</h2>
<pre id="facts"></pre>
<noscript>This page draws itself by its own script; it loads nothing.</noscript>
<script type="application/json" id="data">DATA</script>
<script>
const find = id => document.getElementById(id), data = JSON.parse(find('data').textContent)
const layers = data.same.length ? data.same[0].length : 0
const at = {step: 0, layer: 0}  // layer 0: all of them

const element = (parent, tag, text, set) =>
  parent.appendChild(Object.assign(document.createElement(tag), {textContent: text}, set))
const panes = [...document.querySelectorAll('.text')].map(pane =>
  data.texts.map((text, i) => {
    const sign = text === '' ? 'part' : text.includes('\n') ? 'line' : ''
    const span = element(pane, 'span', text, {className: sign}), step = i - data.prompt
    if (step >= 0) {
      span.setAttribute('role', 'button')
      span.setAttribute('aria-label', `token ${step + 1}: ${JSON.stringify(text)}`)
      span.onclick = () => go({step})
    }
    return span
  }))
const buttons = Array.from({length: layers + 1}, (_, layer) =>
  element(find('layers'), 'button', layer || 'all layers', {onclick: () => go({layer})}))

const mean = list => list.length ? list.reduce((a, b) => a + b) / list.length : null
const agreed = value => value === null ? 'too short a text to choose from'
                                       : Math.round(value) + " % of the oracle's choice kept"
const same = (step, layer) => layer ? data.same[step][layer - 1]
                                    : mean(data.same[step].filter(value => value !== null))

async function unpack(step) {  // -> bytes [2, layers, cached tokens]
  const packed = Uint8Array.from(atob(data.steps[step]), c => c.charCodeAt(0))
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}

async function go(change) {
  if (!data.steps.length) return
  Object.assign(at, change)
  at.step = Math.max(0, Math.min(at.step, data.steps.length - 1))
  at.layer = Math.max(0, Math.min(at.layer, layers))
  const {step, layer} = at, bytes = await unpack(step), cached = data.prompt + step
  if (step !== at.step || layer !== at.layer) return  // meanwhile another was asked for
  const [first, last] = layer ? [layer - 1, layer] : [0, layers], all = (last - first) * data.heads
  panes.forEach((spans, side) => spans.forEach((span, s) => {
    let count = 0, rows = side * layers
    for (let l = first; s < cached && l < last; l++) count += bytes[(rows + l) * cached + s]
    span.style.setProperty('--k', Math.sqrt(count / all).toFixed(3))
    span.title = s < cached ? `kept by ${count} of ${all}` : 'not yet there'
    span.classList.toggle('later', s > cached)
    if (s >= data.prompt) {
      span.setAttribute('aria-pressed', s === cached)
      span.tabIndex = s === cached ? 0 : -1
    }
  }))
  buttons.forEach((button, l) => {
    const value = same(step, l)
    button.style.setProperty('--same', (value ?? 0) + '%')
    button.setAttribute('aria-label', `${l ? 'layer ' + l : 'all layers'}: ${agreed(value)}`)
    button.title = agreed(value)
    button.setAttribute('aria-pressed', l === layer)
    button.tabIndex = l === layer ? 0 : -1
  })
  find('now').textContent = `Token ${step + 1} of ${data.steps.length}, `
    + `${JSON.stringify(data.texts[cached])}, written with ${cached} tokens cached. `
    + `${layer ? 'Layer ' + layer : 'All layers'}: ${agreed(same(step, layer))}.`
}

document.onkeydown = e => {
  const focus = document.activeElement, pane = panes.find(spans => spans.includes(focus))
  if (e.ctrlKey || e.altKey || e.metaKey) return
  if (pane && (e.key === 'Enter' || e.key === ' ')) focus.click()
  else if (e.key === 'ArrowLeft' || e.key === 'ArrowRight') {
    const move = e.key === 'ArrowLeft' ? -1 : 1
    if (buttons.includes(focus)) go({layer: at.layer + move}), buttons[at.layer].focus()
    else go({step: at.step + move})
    if (pane) pane[data.prompt + at.step].focus()
  } else return
  e.preventDefault()
}
find('back').onclick = () => go({step: at.step - 1})
find('next').onclick = () => go({step: at.step + 1})

find('left').textContent = data.name
find('about').textContent = data.about
find('facts').textContent = data.facts
go({})
</script>
</html>
"""


if __name__ == "__main__":
    from baselines import Recency
    from model import Config, Llama

    torch.manual_seed(0)
    llama = Llama(Config(vocab_size=256, width=64, layers=5, heads=4, kv_heads=2, head_dim=16,
                         mlp_width=128)).eval()
    beside, cache = Beside(Recency(budget=0.1), budget=0.1), llama.new_cache(1, 401)
    llama.prefill(torch.arange(400)[None] % 256, cache)
    llama.decode(torch.tensor([[0]]), cache, beside)
    beside.add(0)
    (step,), (same,) = beside.steps, beside.same
    print(f"a step: [2, 4, 401] bytes, one for a layer and token, {len(step):,} characters in the "
          "page")
    print(f"recency kept {same} % of what the oracle chose in layers 1 to 4, beside what both keep")
