"""What is trained on: seeds, strings that come twice, and what is held out."""

import pytest

from tasks.coreference import pools
from tasks.corpus import Mixture, default_texts, hold_out


@pytest.fixture(scope="module")
def mixture(tok):
    kept = [kept for kept, _ in map(hold_out, default_texts())]
    return lambda **dials: Mixture(tok, kept, pools("train"), **dials)


def test_code_is_found_wherever_python_lies(tmp_path, monkeypatch):
    """Below a folder that is named as one of those left out, too."""
    library = tmp_path / "test" / "lib"
    for name in "a.py", "pkg/b.py", "test/c.py", "site-packages/d.py":
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    assert list(default_texts()[1].values()) == ["a.py", "pkg/b.py"]


def test_a_window_depends_on_its_seed_alone(mixture):
    one, two = mixture(), mixture()
    two.window("something else", 300)
    assert one.window("0 1 0", 300) == two.window("0 1 0", 300) != one.window("0 2 0", 300)
    assert len(one.window("0 1 0", 300)) == 300


def test_a_digest_tells_texts_from_others(mixture):
    sources = [["one", "two"], ["three"]]
    assert mixture().digest() == mixture(repeats=1).digest()
    digests = {Mixture(None, s, None).digest() for s in (
        sources, [["one", "twO"], ["three"]], [["onetwo"], ["three"]], [["one", "two", "three"]])}
    assert len(digests) == 4 and Mixture(None, sources, None).digest() in digests


def test_repeated_strings_come_twice_behind_the_same_tokens(mixture):
    for seed in map(str, range(20)):
        plain, written = (mixture(repeats=r).window(seed, 600) for r in (0, 1))
        assert len(written) == 600
        changed = [i for i, (a, b) in enumerate(zip(plain, written, strict=True)) if a != b]
        first = written[changed[0] - 8 : changed[0] + 3]  # eight tokens, and how the string begins
        places = [i for i in range(590) if written[i : i + 11] == first]
        assert len(places) >= 2, (seed, places)


def test_held_out_text_is_never_trained_on():
    for source in [*default_texts(), {"one": "".join(f"line {i}\n" for i in range(5000))}]:
        kept, held = hold_out(source)
        assert kept and held and not set(kept) & set(held)
        assert 0.02 < sum(map(len, held)) / sum(map(len, kept + held)) < 0.3


def test_a_text_more_or_less_moves_no_other():
    """Between versions of Python topics come and go: none that was trained on may become one to
    measure on, or the shipped butler would know it."""
    own = {str(i): f"text {i}" for i in range(200)}
    for source in [*default_texts(), own]:
        kept, held = map(set, hold_out(source))
        more = {"a topic": "of another version"} | source
        less = dict(list(source.items())[1:])
        for texts in more, less:
            new_kept, new_held = map(set, hold_out(texts))
            assert not new_kept & held and not new_held & kept
            assert abs(len(new_held) - len(held)) <= 1


def test_python_text_that_the_shipped_butler_has_not_seen_is_held_out():
    reference, library = default_texts()
    assert {reference["comparisons"], reference["assert"]} <= set(hold_out(reference)[1])
    assert library["argparse.py"] in hold_out(library)[1]
    assert library["ast.py"] in hold_out(library)[0]


def test_a_string_that_does_not_fit_twice_is_left_out(mixture):
    for seed in map(str, range(20)):
        assert len(mixture(repeats=3).window(seed, 64)) == 64
