"""results/prose.py - encyclopedia articles to measure on: whole, long, and never trained on.

The wheel of gensim carries 106 articles of the English Wikipedia as test data, and a function that
strips their mark-up. Those of more than 32,000 characters (about 8,000 tokens) go to one file.

    pip install gensim==4.4.0 && python results/prose.py        writes out/prose.txt
"""

import bz2
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
from cli import UserError

LEAST = 32_000  # characters of an article
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


@dataclass
class Config:
    """Writes the articles to out/prose.txt; it has no flags."""


def articles() -> list[str]:
    """Raises UserError without gensim."""
    try:
        import gensim
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    except ImportError:
        raise UserError("results/prose.py needs gensim: pip install gensim==4.4.0") from None
    dump = Path(gensim.__file__).parent / "test" / "test_data" / DUMP
    with bz2.open(dump) as pages:
        texts = [filter_wiki(text).strip() for _, text, _ in extract_pages(pages, ("0",))]
    return [text for text in texts if len(text) >= LEAST]


def main(config: Config) -> dict:
    texts = articles()
    with cli.replacing(ROOT / "out" / "prose.txt") as part:
        part.write_text("\n\n".join(texts), encoding="utf-8")
    return {"articles": len(texts), "characters": sum(map(len, texts))}


if __name__ == "__main__":
    cli.run(main, Config)
