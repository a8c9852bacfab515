"""What is trained on, what is held out, and windows that depend on their seed alone."""

import random

import pytest
import torch

from cli import UserError
from data import (
    HELD_OUT,
    Mixture,
    default_texts,
    evenly_spaced,
    hold_out,
    positions_with_gaps,
    read_texts,
    text_to_measure_on,
)
from synth_task import pools


@pytest.fixture(scope="module")
def sources():
    return default_texts()


@pytest.fixture(scope="module")
def mixture(tok, sources):
    training = [hold_out(source)[0] for source in sources]
    return lambda **options: Mixture(tok, training, pools("train"), **options)


# ---------------------------------------------------------------------------- texts


def test_code_is_found_wherever_python_lies(tmp_path, monkeypatch):
    """Below a folder that is named like one of those left out, too."""
    library = tmp_path / "test" / "lib"
    for name in ("a.py", "pkg/b.py", "test/c.py", "site-packages/d.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    assert default_texts()[1] == {"a.py": "a.py", "pkg/b.py": "pkg/b.py"}


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("one")
    (tmp_path / "deep" / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"two \xff")  # damaged UTF-8
    texts = read_texts([tmp_path / "deep", tmp_path / "c.txt"])
    assert texts == {str(tmp_path / "deep" / "a.txt"): "one",
                     str(tmp_path / "c.txt"): "two \ufffd"}
    with pytest.raises(UserError, match="--data: there is no .*nowhere"):
        read_texts([tmp_path / "nowhere"])


def test_python_text_is_held_out_by_name(sources):
    """The shipped butler has never seen these texts."""
    for texts in sources:
        training, held_out = hold_out(texts)
        assert (training, held_out) == hold_out(texts)
        assert not set(training) & set(held_out)
        assert set(held_out) == {texts[name] for name in HELD_OUT & texts.keys()}
        assert 0.02 < sum(map(len, held_out)) / sum(map(len, training + held_out)) < 0.3
    reference, library = sources
    assert reference["comparisons"] in hold_out(reference)[1]
    assert library["argparse.py"] in hold_out(library)[1]
    assert library["argparse.py"] in text_to_measure_on()
    assert library["ast.py"] not in text_to_measure_on()


@pytest.mark.parametrize("own", [True, False])
def test_adding_or_removing_a_file_moves_no_other(sources, own):
    cases = [{str(i): f"text {i}" for i in range(200)}] if own else sources
    for texts in cases:
        training, held_out = map(set, hold_out(texts))
        for changed in ({"new": "a text of another version"} | texts, dict([*texts.items()][1:])):
            training_now, held_out_now = map(set, hold_out(changed))
            assert not training_now & held_out and not held_out_now & training


def test_own_texts_are_held_out_in_parts():
    text = "".join(f"line {i}\n" for i in range(200_000))
    training, held_out = hold_out({"one": text})
    assert training and held_out and not set(training) & set(held_out)
    assert sum(map(len, training + held_out)) == len(text)
    assert 0.05 < len(held_out) / len(training + held_out) < 0.2
    with pytest.raises(UserError, match="too little text, at least 16,384"):
        hold_out({"one": "too short"})


# ---------------------------------------------------------------------------- windows


def test_a_window_depends_on_its_seed_alone(mixture):
    one, two = mixture(), mixture()
    two.window("another", 300)
    assert one.window("0 1 0", 300) == two.window("0 1 0", 300) != one.window("0 2 0", 300)
    assert len(one.window("0 1 0", 300)) == 300


def test_a_digest_tells_texts_apart():
    cases = ([["one", "two"], ["three"]], [["one", "twO"], ["three"]], [["onetwo"], ["three"]],
             [["one", "two", "three"]])
    digests = [Mixture(None, sources, None).digest() for sources in cases]
    assert len(set(digests)) == 4
    assert Mixture(None, cases[0], None, repeats=1).digest() == digests[0]


def test_repeated_strings_come_twice_behind_the_same_tokens(mixture):
    for seed in map(str, range(20)):
        plain, written = (mixture(repeats=n).window(seed, 600) for n in (0, 1))
        assert len(written) == 600
        changed = [i for i, (a, b) in enumerate(zip(plain, written, strict=True)) if a != b]
        start = changed[0] - 8
        first = written[start : start + 11]  # eight tokens, and how the string begins
        assert any(written[i : i + 11] == first for i in range(start + 1, 590)), seed
        assert len(mixture(repeats=9).window(seed, 64)) == 64  # there is no room for all of them


def test_positions_rise_and_stay_below_the_span():
    cases = [positions_with_gaps(random.Random(i), 512, 8192) for i in range(200)]
    for positions in cases:
        steps = positions.diff()
        assert positions[0] == 0 and positions[-1] < 8192
        assert steps.min() == 1 and (steps > 1).sum() <= 3
    last = [int(positions[-1]) for positions in cases]
    assert max(last) > 7500 and min(last) < 1000
    assert torch.equal(positions_with_gaps(random.Random(1), 40, 0), torch.arange(40))


def test_evenly_spaced_windows_do_not_overlap():
    class Numbers:
        bos = []

        def encode(self, text):
            return list(range(len(text)))

    windows = evenly_spaced(Numbers(), "x" * 100, 3, 30)
    assert windows[:, 0].tolist() == [0, 35, 70]
    assert torch.equal(windows - windows[:, :1], torch.arange(30).expand(3, 30))
    assert evenly_spaced(Numbers(), "x" * 30, 1, 30).tolist() == [list(range(30))]
    with pytest.raises(UserError, match="100 tokens, too few for 4 windows of 30"):
        evenly_spaced(Numbers(), "x" * 100, 4, 30)
