"""Butlers from hand to hand: the card that train.py writes, and a Hub that is a small server here.

The server speaks what huggingface_hub asks of the real one: a repository is made, the card's head
is checked, files come in a commit and go out by name. Not tested: logging in, and the transfer of
large files, which go another way (LFS or Xet) that the library chooses when it is told to.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT

from beyond import share
from butler import Butler, ButlerConfig, ButlerError, load_for
from common.errors import ModelError, UsageError
from loading import fetch
from measure import card, tables


class Handler(BaseHTTPRequestHandler):
    def answer(self, code=200, content=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        store, told = self.server.store, {}
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, b"{}", X_Error_Message="Invalid username or password.")
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            store.setdefault(name, {})
            told = {"url": f"{self.server.url}/{name}"}
        elif "/preupload/" in self.path:
            told["files"] = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                             for f in json.loads(body)["files"]]
        elif "/commit/" in self.path:
            name = re.fullmatch(r"/api/models/(.+)/commit/main", self.path)[1]
            for value in (json.loads(line)["value"] for line in body.splitlines()[1:]):
                store[name][value["path"]] = base64.b64decode(value["content"])
            told = {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1" * 40}
        self.answer(200, json.dumps(told).encode())

    def do_GET(self):
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        files = self.server.store.get(asked[1]) if asked else None
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if asked[2] not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        content = files[asked[2]]
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                    X_Repo_Commit="1" * 40)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of one's own, for the processes that a test starts."""
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.store = f"http://127.0.0.1:{server.server_port}", {}
    for name, value in {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"),
                        "HF_TOKEN": "hf_right", "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def python(*arguments, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | environment, timeout=120)


@pytest.fixture
def trained(tiny, tmp_path):
    """A butler with what train.py writes beside it: its card, and the report of another run."""
    out = tmp_path / "butler.safetensors"
    torch.manual_seed(0)
    butler = Butler(ButlerConfig.for_model(tiny, stride=2, size=16, hidden=32))
    butler.save(out)
    report = tables.result("train_default")
    report["config"]["out"] = str(out)
    card.write(report | {"fingerprint": butler.config.fingerprint}, out.with_suffix(".json"))
    return out


LOADED = """
import sys, torch
from butler import Butler
from common.errors import Refusal
for name in sys.argv[2:]:
    try:
        same = torch.load(sys.argv[1])
        weights = Butler.load(name).state_dict()
        print(all(torch.equal(weights[key], same[key]) for key in same))
    except Refusal as e:
        print(e)
"""


def test_a_butler_goes_to_the_hub_and_comes_back_by_its_id(trained, hub, tmp_path):
    sent = python("-m", "beyond.share", "--butler", trained, "--to", "org/name")
    assert sent.returncode == 0, sent.stderr
    result = json.loads(sent.stdout.splitlines()[-1])
    assert result["url"].startswith(f"{hub.url}/org/name/commit/")
    written = trained.with_suffix(".md").read_text()
    there = written.replace(f"--butler {trained}", "--butler org/name").encode()
    assert there != written.encode() and hub.store["org/name"] == {
        "butler.safetensors": trained.read_bytes(), "README.md": there,
        "butler.json": trained.with_suffix(".json").read_bytes()}
    hub.store["org/name"]["two/b.safetensors"] = trained.read_bytes()

    torch.save(Butler.load(trained).state_dict(), tmp_path / "weights")
    names = ("org/name", "org/name/two/b.safetensors", "org/name/c.safetensors", "org/none")
    loaded = python("-c", LOADED, tmp_path / "weights", *names)
    first, second, no_file, no_such = loaded.stdout.splitlines()
    assert (first, second) == ("True", "True"), loaded.stdout
    assert "cannot fetch org/name/c.safetensors from the Hub: 404" in no_file
    assert "cannot fetch org/none from the Hub: " in no_such and "Repository Not Found" in no_such
    hub.store.clear()
    loaded = python("-c", LOADED, tmp_path / "weights", *names[::3], HF_HUB_OFFLINE="1")
    first, no_such = loaded.stdout.splitlines()  # from the cache; and what is not in it
    assert first == "True" and "cannot fetch org/none from the Hub: " in no_such


def test_what_cannot_be_sent_is_said_in_one_line(trained, hub, monkeypatch):
    wrong = python("-m", "beyond.share", "--butler", trained, "--to", "org/name", HF_TOKEN="hf_no")
    assert wrong.returncode == 2 and len(wrong.stdout.splitlines()) == 3  # what it would send
    (line,) = wrong.stderr.splitlines()
    assert f"error: cannot send {trained} to org/name: " in line and not hub.store
    assert line.endswith("Invalid username or password.")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot send .* offline mode is enabled"):
        share.main(share.Config(butler=str(trained), to="org/name"))


def test_a_lost_network_is_a_line_too(hub):
    """What the library's own HTTP library raises is no OSError."""
    from huggingface_hub.errors import HTTPError

    with pytest.raises(ModelError, match="^cannot do this: gone$"), fetch.hub("do this"):
        raise HTTPError("gone")


def test_without_the_package_one_line_names_it(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ButlerError, match="org/name .* without the package huggingface_hub: pip"):
        load_for(tiny, "org/name")


def test_a_path_is_no_id(monkeypatch, tmp_path):
    """Nobody is asked for a file that is missing in a folder, or at a path that is none."""
    monkeypatch.setattr(fetch, "hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "deep").mkdir(parents=True)
    for name in ("out/b.safetensors", "none/b.safetensors", "out/b", "out/deep/b.safetensors", "b",
                 "/none/b", "./none/b", "../b", "a/b/c", "a/b/c.json", "a b/c", "", "a\0/b",
                 "a" * 300 + "/b", "~/b"):
        with pytest.raises(ButlerError):
            Butler.load(name)


def test_ids_name_a_repository_and_a_file():
    assert fetch.hub_butler("org/my-name.2") == ("org/my-name.2", "butler.safetensors")
    assert fetch.hub_butler("org/name/a/b.safetensors") == ("org/name", "a/b.safetensors")
    assert fetch.hub_butler("org/name.safetensors") is fetch.hub_butler("name") is None


# ---------------------------------------------------------------------------- cards


def head(text: str):
    return pytest.importorskip("huggingface_hub").ModelCard(text).data


def test_a_card_says_what_its_butler_is_for_and_how_it_was_made():
    report = tables.result("train_default") | {"fingerprint": "0123abcd"}
    text = card.card(report)
    assert head(text).base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "tokenbutler" in head(text).tags and head(text).license is None
    for part in (tables.training(report), "fingerprint `0123abcd`", "1,283,328 parameters",
                 "steps: 320, each on 2 texts of 512 tokens", report["command"],
                 report["hardware"], report["commit"], "--butler out/butler.safetensors"):
        assert part in text, part


@pytest.mark.parametrize("name", ["llama", "a: b\n- c", '"', "# x"])
def test_a_model_in_a_folder_has_no_id_to_name(name, tmp_path):
    (tmp_path / name).mkdir()
    report = tables.result("train_default")
    report["config"] |= {"model": str(tmp_path / name), "data": ["my books/"], "out": "my b"}
    text = card.card(report)
    assert head(text).base_model is None and "kv-cache" in head(text).tags
    assert "trained on: my books/, and documents" in text and "--butler 'my b'" in text
    report["config"]["model"] = "org/llama"
    assert head(card.card(report)).base_model == "org/llama"
    assert "sample.py --model org/llama --butler" in card.card(report)
    report["config"]["engine"] = "transformers"
    assert "sample.py --model org/llama --engine transformers --butler" in card.card(report)


def test_a_missing_card_is_made_from_the_report(trained):
    trained.with_suffix(".md").unlink()
    config = share.Config(butler=str(trained), to="org/name/x.safetensors")
    files = share.parts(config, "x.safetensors")
    assert list(files) == ["x.safetensors", "README.md", "x.json"]
    text = files["README.md"].decode()
    assert Butler.load(trained).config.fingerprint in text
    assert "sample.py --butler org/name/x.safetensors --prompt" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 3}', "\0"])
def test_a_report_that_is_none_is_told(trained, content):
    trained.with_suffix(".json").write_text(content)
    with pytest.raises(UsageError, match="no report of train.py"):
        share.main(share.Config(butler=str(trained)))
