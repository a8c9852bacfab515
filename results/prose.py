"""results/prose.py - encyclopedia articles to measure on: whole, long, and never trained on.

The wheel of gensim carries 106 articles of the English Wikipedia as test data, and the function
that strips their mark-up. Those of more than 32,000 characters, some 8,000 tokens, are written one
behind the other.

    pip install gensim==4.4.0 && python results/prose.py        writes out/prose.txt
"""

import bz2
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UsageError

LEAST = 32_000  # characters of an article
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def articles() -> list[str]:
    """Raises UsageError without gensim."""
    try:
        import gensim
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    except ImportError:
        raise UsageError("results/prose.py needs gensim: pip install gensim==4.4.0") from None
    dump = Path(gensim.__file__).parent / "test" / "test_data" / DUMP
    with bz2.open(dump) as pages:
        texts = [filter_wiki(text).strip() for _, text, _ in extract_pages(pages, ("0",))]
    return [text for text in texts if len(text) >= LEAST]


if __name__ == "__main__":
    path, texts = ROOT / "out" / "prose.txt", articles()
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(texts))
    print(f"{len(texts)} articles, {sum(map(len, texts)):,} characters in {path}")
