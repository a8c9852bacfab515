"""Damaged files by the thousand (fuzz.py): each loads and works, or ends in one clear line."""

import base64
import json
import subprocess
import sys

import fuzz
import pytest
from gguf import GGMLQuantizationType
from test_model import LLAMA3, small, write_gguf
from test_tokenizer import GGUF_ALPHABET, llama_split
from test_tokenizer import write_gguf as write_vocabulary
from tokenizers import Tokenizer, decoders, models, normalizers

from beyond import survive
from butler import Butler, ButlerConfig
from common.errors import ModelError
from loading.tokenizer import TokenizerError, load
from loading.vocabulary import LLAMA3 as LLAMA3_PATTERN
from loading.weights import Reader, read


def write_models(folder):
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1)
    for kind, largest in (("config", "1MB"), ("safetensors", "1MB"), ("shards", "4KB")):
        model = small(**sizes, rope_parameters=LLAMA3)
        model.save_pretrained(folder / kind, max_shard_size=largest)
    write_gguf(folder / "gguf" / "model.gguf", small(**sizes))
    wide = small(**sizes | dict(hidden_size=64, intermediate_size=64))
    write_gguf(folder / "quantised" / "model.gguf", wide, GGMLQuantizationType.Q4_1)


def write_tokenizers(folder):
    tokens = [*GGUF_ALPHABET, "ab", "aba"]
    merges = [("a", "b"), ("ab", "a")]
    built = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    built.pre_tokenizer, built.decoder = llama_split(), decoders.ByteLevel()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    built.add_tokens(["<tool>"])
    built.save(str(folder / "tokenizer" / "tokenizer.json"))
    template = "<|im_start|>system\nBe brief.<|im_end|>"
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True,
        "chat_template": [{"name": "default", "template": template}]}))
    (folder / "tokenizer" / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": [0, 1]}')
    pieces = {"<unk>": 0} | {f"<0x{b:02X}>": 1 + b for b in range(256)} | {"▁": 257, "a": 258}
    built = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    built.add_special_tokens(["<unk>"])
    built.save(str(folder / "library" / "tokenizer.json"))
    parts = [*(bytes([b]) for b in range(256)), b"ab", b"aba"]
    (folder / "meta" / "tokenizer.model").write_bytes(
        b"\n".join(base64.b64encode(part) + b" %d" % i for i, part in enumerate(parts)))
    holed = [token if token != "\u0104" else "ab" for token in GGUF_ALPHABET]  # byte 4 has no token
    write_vocabulary(folder / "vocabulary" / "vocabulary.gguf", merges=["a b", "ab a"],
                     tokens=[*holed, "aba", "<|im_end|>"])


def write_others(folder):
    shape = ButlerConfig(layers=3, width=8, kv_heads=1, head_dim=4, rope=(1.0, 0.1), stride=1,
                         size=4, hidden=4, fingerprint="0" * 16)
    Butler(shape).save(folder / "butler" / "butler.safetensors")
    run = fuzz.a_run(folder / "state" / "run")
    fuzz.step(*run[:2])
    survive.Guard(*run, [0.5], "text").save()
    lines = [{"context": "a lake " * 5, "question": "what? ", "answer": answer}
             for answer in ("lake", ["lake", "sea"])]
    (folder / "lines" / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"input": "what? ", "context": "a lake " * 5, "answers": ["Paragraph 1"], "length": 5,
              "dataset": name, "all_classes": ["Paragraph 1"]}
             for name in ("trec", "samsum", "lcc", "passage_retrieval_en")]
    lines += [{"input": "a lake\nspecial magic", "outputs": ["lake"], "answer_prefix": " is"}]
    (folder / "longbench" / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores = ["a run", ["copy 0 butler 0.1 0", 0.5], ["copy 1 butler 0.1 0", 1.0]]
    (folder / "scores" / "scores.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in scores))
    (folder / "text" / "text.txt").write_text("The harbour was quiet that morning. é\n" * 500)


@pytest.mark.parametrize("cases, seed", [(60, 0), pytest.param(800, 1, marks=pytest.mark.slow)])
def test_damaged_files_work_or_end_in_one_line(tmp_path, cases, seed):
    """900 cases and more, or 12,000; what a process that died was reading stays there."""
    for kind in fuzz.KINDS:
        (tmp_path / kind).mkdir()
    write_models(tmp_path)
    write_tokenizers(tmp_path)
    write_others(tmp_path)
    command = [sys.executable, fuzz.__file__, str(tmp_path), str(cases), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    print(json.dumps(reports, indent=1))
    problems = {kind: r["problems"] for kind, r in reports.items() if r["problems"]}
    assert not problems, f"{json.dumps(problems, indent=1)}\nfiles: {tmp_path}\n{done.stderr}"
    assert reports.keys() == fuzz.KINDS.keys()
    assert all(report["cases"] >= cases for report in reports.values())
    for outcome in ("worked", "refused"):  # damage is neither harmless nor always the same
        assert sum(report.get(outcome, 0) for report in reports.values()) > 2 * cases


def test_a_pickle_is_refused_unread(tmp_path):
    small(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle.*safetensors"):
        read(tmp_path)
    with pytest.raises(ModelError, match="not a readable GGUF"):
        read(tmp_path / "pytorch_model.bin")


def test_a_gguf_header_of_too_many_entries_is_refused(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf", small(), metadata={"list": list(range(2000))})
    monkeypatch.setattr(Reader, "most", 2500)
    read(path)
    monkeypatch.setattr(Reader, "most", 2000)
    (tmp_path / "x.gguf").rename(tmp_path / "y.gguf")  # the last file read is kept
    with pytest.raises(ModelError, match="more than 2,000 entries"):
        read(tmp_path / "y.gguf")


def test_nested_lists_in_a_gguf_are_refused(tmp_path):
    key, deep = b"llama.x", (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(
        b"GGUF\3\0\0\0" + bytes(8) + (1).to_bytes(8, "little") + len(key).to_bytes(8, "little")
        + key + (9).to_bytes(4, "little") + deep * 5000)
    with pytest.raises(ModelError, match="not a readable GGUF"):
        read(tmp_path / "x.gguf")


def test_a_pattern_that_takes_for_ever_ends_in_one_line(tmp_path):
    for kind in ("tokenizer", "library", "meta", "vocabulary"):
        (tmp_path / kind).mkdir()
    write_tokenizers(tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer.json"
    text = path.read_text().replace(json.dumps(LLAMA3_PATTERN)[1:-1], "(?:a|a)+(?=c)")
    path.write_text(text)
    tok = load(path)
    assert tok.encode("ab c")
    with pytest.raises(TokenizerError, match="takes too long"):
        tok.encode("a" * 40 + "!")


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    """The tiny model has 256 rows; control tokens may lie beyond."""
    path = write_vocabulary(tmp_path / "x.gguf", tokens=[*GGUF_ALPHABET, "ab", "<|im_end|>"])
    with pytest.raises(TokenizerError, match=r"id 256, b'ab', is beyond its 256 rows"):
        load(path).check(tiny)
    path = write_vocabulary(tmp_path / "y.gguf", tokens=[*GGUF_ALPHABET, "<|im_end|>"], merges=[],
                            token_type=[1] * 256 + [3], bos=None)
    assert load(path).check(tiny).vocab_size == 257
