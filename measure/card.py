"""measure/card.py - the model card of a butler, from the report of its training.

    report, as train.py ends with it --card--> Markdown with a head in YAML, as model hubs read it
                                     --write--> the report's file; OUT.md, beside the butler

The license is left to the user, and so is the base model's id where a folder was trained for.

    python -m measure.card        the card of the default run
"""

import json
import shlex
from pathlib import Path

from common.errors import UsageError
from common.files import read_text, replacing
from loading.fetch import DEFAULT
from measure import tables

USE = """In a clone of the repository TokenButler, its requirements installed:

```sh
python sample.py{model} --butler {out} --prompt-file README.md --budget 0.1
python synth_task.py{model} --butler {out} --selectors dense,oracle,butler --n 20
```"""
TEXTS = "Python's own language reference and standard library (Python {python})"


def place(out) -> Path:
    """Where the card of the butler at `out` lies."""
    return Path(out).with_suffix(".md")


def free(out) -> Path:
    """The same, where a card may be written: raises UsageError if that is somebody's own text."""
    path = place(out)
    if path.is_file() and not read_text(path, errors="replace").startswith("---\n"):
        raise UsageError(f"{path} is no model card, and that of {out} would take its place")
    return path


def card(report: dict) -> str:
    """Markdown that says what the butler is for, how it came about and what it is worth."""
    c = report["config"]
    local = c["model"] is not None and Path(c["model"]).exists()
    base = Path(c["model"]).resolve().name if local else c["model"] or DEFAULT["name"]
    named = (f"# base_model: org/name of {json.dumps(base)}, a file or folder here" if local else
             f"base_model: {json.dumps(base)}")
    texts = ", ".join(c["data"]) or TEXTS.format(**report)
    model = f" --model {shlex.quote(c['model'])}" if c["model"] else ""
    model += " --engine transformers" * (c.get("engine") == "transformers")
    longer = f", every {c['long_every']}th of up to {c['long']:,}, no more than the model holds"
    if span := c.get("span"):
        longer += f", spread over {span:,} positions"
    return "\n".join([
        "---", named, "base_model_relation: adapter",
        "tags:", "- tokenbutler", "- sparse-attention", "- kv-cache",
        "# license: yours to choose; the base model keeps its own", "---", "",
        f"# A butler for {base.split('/')[-1]}", "",
        "It predicts which few cached tokens each layer of its base model needs next (TokenButler, "
        "arXiv 2503.07518). It holds none of the model's weights, and fits no other model.", "",
        f"- base model: {base}, fingerprint `{report.get('fingerprint', 'not recorded')}`",
        f"- size: {report['parameters']:,} parameters, {report['share']:.2%} of the base model's",
        f"- trained on: {texts}, and documents of the generator that makes the co-reference task",
        f"- steps: {c['steps']:,}, each on {c['batch']} texts of {c['length']:,} tokens"
        + longer * bool(c["long_every"]),
        "", "## Quality", "",
        "On texts that it was not trained on; *kept* is the share of the attention that falls on "
        "the tokens attended, at the end of a text of that length.", "",
        f"```\n{tables.training(report)}\n```", "", "## Use", "",
        USE.format(model=model, out=shlex.quote(c["out"]))])


def write(report: dict, path) -> list[str]:
    """Writes report and card -> where they are."""
    written = {str(path): json.dumps(report, indent=1),
               str(place(report["config"]["out"])): card(report)}
    for file, text in written.items():
        with replacing(file) as part:
            part.write_text(text + "\n")
    return list(written)


if __name__ == "__main__":
    print(card(tables.result("train_default")))
