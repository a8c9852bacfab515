"""What is trained on, what is held out, and windows that depend on their seed alone."""

import os
import random
import socket

import pytest
import torch

from cli import UserError
from data import (
    HELD_OUT,
    Mixture,
    default_texts,
    evenly_spaced,
    hold_out,
    num_tokens,
    positions_with_gaps,
    read_texts,
    some_of,
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


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
NO_TEXT = {
    "a.png": PNG,
    "b.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "c.txt": "caf\xe9".encode("latin-1"),
    "d.txt": "text".encode("utf-16"),
    "e.txt": "text".encode("utf-16-le"),
    "f.txt": "text".encode("utf-32"),
    "g.txt": "\N{EURO SIGN}".encode()[:2],
    "h.bin": b"a" * 2**21 + bytes(1),
}


def test_files_and_folders_are_read(tmp_path):
    """Hidden files are left out, except in a hidden folder that was named itself."""
    files = {".notes/a.txt": "one", ".notes/deep/B.TXT": "\ufefftwo\r\n", ".notes/c.txt": " \n",
             ".notes/empty.txt": "", ".notes/.git/config": "hidden",
             ".notes/deep/.DS_Store": "hidden", "d.txt": "three"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    read = {str(tmp_path / ".notes" / "a.txt"): "one",
            str(tmp_path / ".notes" / "deep" / "B.TXT"): "two\n"}
    assert read_texts([tmp_path / ".notes"]) == (read, [])
    read[str(tmp_path / "d.txt")] = "three"
    assert read_texts([f"{tmp_path}/.notes/", tmp_path / "d.txt"]) == (read, [])
    assert read_texts([tmp_path / "d.txt", tmp_path / ".." / tmp_path.name / "d.txt"])[0] == {
        str(tmp_path / "d.txt"): "three"}


def test_what_is_no_text_is_skipped_in_a_folder(tmp_path):
    for name, content in NO_TEXT.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "book.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    links = {"gone": "/nowhere", "itself": "itself", "loop": tmp_path}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "link").symlink_to("book.txt")
    texts, skipped = read_texts([tmp_path])
    assert texts == {str(tmp_path / name): "text" for name in ("book.txt", "link")}
    assert skipped == [str(tmp_path / name) for name in sorted([*NO_TEXT, "pipe", *links])]
    assert some_of(skipped[:2]) == f"'{tmp_path}/a.png', '{tmp_path}/b.pdf'"
    assert some_of(["a", "b", "c", "d\n", "e"]) == "'a', 'b', 'c' and 2 more"
    assert some_of(["d\n", os.fsdecode(b"caf\xe9")]) == r"'d\n', 'caf\udce9'"


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(NO_TEXT[name])
    with pytest.raises(UserError, match=f"^--data: cannot read .*{name}: it is not UTF-8 text$"):
        read_texts([tmp_path / name])
    with pytest.raises(UserError, match=f"there is no text in '.*'; not UTF-8 text: '.*{name}'$"):
        read_texts([tmp_path])


def test_where_no_text_is_left_one_line_says_so(tmp_path, monkeypatch):
    for name in ("folder/.hidden/a.txt", "blank.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(" \n" * (name == "blank.txt") or "hidden")
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "s"))
    for names, message in ((["nowhere"], "there is no nowhere"), ([""], "there is no ''$"),
                           (["x" * 300], "there is no x*"), (["blank.txt"], "no text in 'blank"),
                           (["folder", "blank.txt"], "no text in 'folder', 'blank.txt'$"),
                           (["s"], "cannot read s: "), (["blank.txt/a"], "there is no blank")):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=f"^--data: .*{message}"):
            read_texts(names)


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


def held_share(texts):
    """-> the parts, the share of characters held out"""
    training, held_out = hold_out(texts)
    assert not set(training) & set(held_out)
    return training, held_out, sum(map(len, held_out)) / sum(map(len, training + held_out))


def test_own_texts_are_held_out_in_parts():
    text = "".join(f"line {i}\n" for i in range(200_000))
    training, held_out, share = held_share({"one": text})
    assert sum(map(len, training + held_out)) == len(text)
    assert 0.05 < share < 0.2
    with pytest.raises(UserError, match="too little text: 9 characters"):
        hold_out({"one": "too short"})


@pytest.mark.parametrize("size", [30_000, 200_000])
def test_a_book_among_notes_is_neither_held_out_whole_nor_kept_whole(size):
    for seed in range(20):
        rng = random.Random(seed)
        book = "".join(rng.choices("abcdefgh ", k=size))
        notes = {str(i): "".join(rng.choices("0123456789", k=80)) for i in range(11)}
        training, held_out, share = held_share(notes | {"book": book})
        assert 0.05 < share < 0.26, seed
        for texts in training, held_out:
            assert any(part in book for part in texts), seed


def test_chance_holds_out_neither_almost_nothing_nor_much():
    for seed in range(400):
        text = "".join(random.Random(seed).choices("abcdefgh ", k=2000))
        assert 0.05 <= held_share({"one": text})[2] < 0.26, seed


def test_a_text_that_repeats_itself_is_divided():
    for unit in ("One cup of tea. ", "two ", "x" * 31 + "\n", "lines\n"):
        for size in (10_000, 300_000):
            training, held_out, _ = held_share({"one": unit * (size // len(unit))})
            assert training and held_out, unit


def test_files_with_names_of_pythons_own_are_a_users_text(tmp_path, monkeypatch):
    """The split depends on the texts, not on how their paths are spelled."""
    monkeypatch.chdir(tmp_path)
    names = ["argparse.py", "comparisons", "other.txt"]
    for name in names:
        (tmp_path / name).write_text("".join(f"{name} {i}\n" for i in range(2000)))
    split = hold_out(read_texts(names)[0])
    assert 0.05 < held_share(read_texts(names)[0])[2] < 0.2
    for spelled in (["."], [tmp_path], names[::-1], [f"./{name}" for name in names]):
        assert hold_out(read_texts(spelled)[0]) == split


def test_tokens_are_counted_or_estimated(tok):
    texts = [f"text number {i}" * (i % 5) for i in range(1200)]
    exact = [len(tok.encode(text)) for text in texts]
    assert num_tokens(tok, texts[:500]) == sum(exact[:500])
    assert num_tokens(tok, texts) == pytest.approx(sum(exact), rel=0.05)
    assert num_tokens(tok, []) == num_tokens(tok, [""]) == 0


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
