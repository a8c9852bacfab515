"""beyond/share.py - a butler to the Hugging Face Hub, with its card and its report.

    out/butler.safetensors -> butler.safetensors    what `--butler org/name` then fetches
    out/butler.md          -> README.md             the card that train.py wrote; look at it first
    out/butler.json        -> butler.json           the report of the training, settings included

`--to org/name/FILE.safetensors` gives the file another name, for `--butler` too. In the card
`--butler` gets the id. Whoever sends has logged in with `hf auth login`, or has set HF_TOKEN.

    python -m beyond.share                         what would be sent of the shipped butler
    python -m beyond.share --butler out/butler.safetensors --to org/name
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from butler import SHIPPED, Butler
from common.cli import flag, run
from common.errors import UsageError, in_one_line
from common.files import read_text
from loading.fetch import hub, hub_butler
from measure import card, tables


@dataclass
class Config:
    """Sends a butler, its model card and its report to the Hugging Face Hub."""

    butler: str = flag(None, "file of the butler (default: the shipped one)")
    report: str = flag(None, "its report (default: beside the butler)")
    to: str = flag(None, "Hub id, org/name[/FILE.safetensors]; without it nothing is sent")
    private: bool = flag(False, "a repository that is made for it is private")


def parts(config: Config, name: str) -> dict[str, bytes]:
    """{file in the repository: what is in it}, the butler being `name` there. A card that is
    missing is made from the report."""
    path = Path(config.butler or SHIPPED)
    shipped = tables.RESULTS / "train.json"
    told = Path(config.report or (path.with_suffix(".json") if config.butler else shipped))
    butler, text = Butler.load(path), read_text(told)
    with in_one_line(UsageError, told, "no report of train.py"):
        report = json.loads(text)
        made = card.card({"fingerprint": butler.config.fingerprint} | report)
    if card.place(path).exists():
        made = read_text(card.place(path))
    if config.to:
        made = made.replace(f"--butler {shlex.quote(report['config']['out'])}",
                            f"--butler {config.to}")
    return {name: path.read_bytes(), "README.md": made.encode(),
            str(Path(name).with_suffix(".json")): text.encode()}


def main(config: Config) -> dict:
    there = hub_butler(config.to or "org/name")
    if there is None:
        raise UsageError(f"--to {config.to}: org/name or org/name/FILE.safetensors")
    repo, name = there
    files = parts(config, name)
    for file, content in files.items():
        print(f"{file:24s} {len(content):12,} bytes")
    report = {"files": {file: len(content) for file, content in files.items()}}
    if not config.to:
        print("nothing was sent: --to org/name says where to")
        return report
    with hub(f"send {config.butler or SHIPPED} to {repo}") as package:
        api = package.HfApi()
        api.create_repo(repo, private=config.private or None, exist_ok=True)
        operations = [package.CommitOperationAdd(file, content) for file, content in files.items()]
        done = api.create_commit(repo, operations, commit_message="A butler, its card and report")
    print(f"sent to {done.commit_url}")
    return report | {"url": done.commit_url}


if __name__ == "__main__":
    run(main, Config)
