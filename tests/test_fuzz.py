"""Damaged files by the thousand (fuzz.py): each one loads and works, or ends in a UserError."""

import json
import os
import subprocess
import sys

import fuzz
import pytest
from conftest import ROOT
from gguf import GGMLQuantizationType, TokenType
from test_model import LLAMA3, small, write_gguf
from test_tokenizer import SPLITS, save_folder, write_vocabulary
from tokenizers import Tokenizer, decoders, models, normalizers

import tokenizer
from butler import Butler, ButlerConfig
from cli import UserError
from model import Llama


def write_models(folder):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1}
    for kind in ("config", "safetensors"):
        small(**sizes, rope_parameters=LLAMA3).save_pretrained(folder / kind)
    small(**sizes).save_pretrained(folder / "shards", max_shard_size="4KB")
    write_gguf(folder / "gguf" / "model.gguf", small(**sizes))
    wide = small(**sizes | {"hidden_size": 64, "intermediate_size": 64})
    write_gguf(folder / "quantised" / "model.gguf", wide, GGMLQuantizationType.Q4_1)
    shape = ButlerConfig(layers=3, width=8, kv_heads=1, head_dim=4, rope=(1.0, 0.1),
                         layers_per_producer=1, size=4, hidden=4, fingerprint="0" * 16)
    Butler(shape).save(folder / "butler" / "butler.safetensors")


def write_tokenizers(folder):
    tokens = [*tokenizer.BYTE_OF, "ab", "aba"]
    merges = [("a", "b"), ("ab", "a")]
    built = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    built.pre_tokenizer, built.decoder = SPLITS["llama-bpe"], decoders.ByteLevel()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    built.add_tokens(["<tool>"])
    template = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    path = save_folder(folder / "tokenizer", built, bos_token="<|im_start|>", add_bos_token=True,
                       eos_token={"content": "<|im_end|>"},
                       chat_template=[{"name": "default", "template": template}])
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    pieces = {"<unk>": 0} | {f"<0x{b:02X}>": 1 + b for b in range(256)} | {"▁": 257, "a": 258}
    built = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    built.add_special_tokens(["<unk>"])
    built.save(str(folder / "pieces" / "tokenizer.json"))
    for name, kind in ("vocabulary", "llama-bpe"), ("smollm", "smollm"):
        write_vocabulary(folder / name / "vocabulary.gguf", kind=kind, merges=["a b", "ab a"],
                         tokens=[*tokens, "<|im_end|>"], chat_template=template, bos_token_id=258,
                         token_type=[TokenType.NORMAL] * 258 + [TokenType.CONTROL])


@pytest.mark.parametrize("cases, seed", [(50, 0), pytest.param(1000, 1, marks=pytest.mark.slow)])
def test_damaged_files_work_or_end_in_one_line(tmp_path, cases, seed):
    """500 cases, or 10,000. What a process that died was reading stays in the folder."""
    for kind in fuzz.KINDS:
        (tmp_path / kind).mkdir()
    write_models(tmp_path)
    write_tokenizers(tmp_path)
    command = [sys.executable, fuzz.__file__, str(tmp_path), str(cases), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "RUST_BACKTRACE": "0"})
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    print(json.dumps(reports, indent=1))
    problems = {kind: report["problems"] for kind, report in reports.items() if report["problems"]}
    shown = json.dumps(problems, indent=1)
    assert not problems, f"{shown}\nfiles: {tmp_path}\n{done.stderr[-3000:]}"
    assert reports.keys() == fuzz.KINDS.keys()
    for outcome in ("worked", "refused"):  # the damage is neither harmless nor always fatal
        assert sum(report.get(outcome, 0) for report in reports.values()) > cases


def test_a_gguf_header_of_too_many_entries_is_refused(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "x.gguf", small(), entries={"list": list(range(2000))})
    Llama.from_pretrained(path)
    monkeypatch.setattr(tokenizer.Gguf, "most_entries", 2000)
    path = path.rename(tmp_path / "y.gguf")  # the latest file is kept
    with pytest.raises(UserError, match="header is too long"):
        Llama.from_pretrained(path)


@pytest.mark.parametrize("value", [
    (9).to_bytes(4, "little") + (1).to_bytes(8, "little"),  # a list of one list of one list ...
    bytes(4) + (2**60).to_bytes(8, "little")], ids=["deep", "long"])
def test_lists_without_end_in_a_gguf_are_refused(tmp_path, value):
    key = b"llama.x"
    (tmp_path / "x.gguf").write_bytes(
        b"GGUF\3\0\0\0" + bytes(8) + (1).to_bytes(8, "little") + len(key).to_bytes(8, "little")
        + key + (9).to_bytes(4, "little") + value * 5000)
    with pytest.raises(UserError, match="x.gguf"):
        Llama.from_pretrained(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="x.gguf"):
        tokenizer.load(tmp_path / "x.gguf")
