"""common/files.py - files read and written: nothing half done, and a problem is one line.

    path --read_text()--> text      path --replacing()--> a path beside it, which takes its place

    python -m common.files        what is read of a file, and what is not
"""

import os
from contextlib import contextmanager
from pathlib import Path

from common.errors import UsageError


def read_text(path, most=2**30, errors="strict") -> str:
    """A text file in UTF-8, whole. Raises UsageError, one line: for one of more than `most` bytes
    too, and for a pipe or device, which may have no end, of more than 64 MB."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            most = most if size else min(most, 2**26)
            data = f.read(min(size or most, most) + 1)
        if len(data) > most:
            raise UsageError(f"cannot read {path}: it has more than {most:,} bytes")
        return data.decode("utf-8", errors).replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read {path} ({e})") from None


def writable(path) -> None:
    """Raises UsageError if no file can be written at `path`, which a script would notice at its
    end; makes the folder that it is in."""
    path = Path(path)
    with replacing(path) as part:
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise UsageError(f"cannot write {path}: it is no file, or one not to be changed")
        part.touch()  # or one that a killed run left behind
        part.unlink()


@contextmanager
def replacing(path):
    """Gives a path to write to; what was written then takes the place of `path`, whole. Where that
    fails (disk full, no permission) what stood there stays; raises UsageError, one line. The
    save_file of safetensors leaves files of random names when it is killed; `save` gives bytes."""
    path, part = Path(path), Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            if part.exists():
                with part.open("rb") as f:
                    os.fsync(f.fileno())  # on the disk before the name points to it
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise UsageError(f"cannot write {path} ({e.strerror})") from None


if __name__ == "__main__":
    print(f"{len(read_text(__file__)):,} characters of UTF-8")
    try:
        read_text(__file__, most=100)
    except UsageError as e:
        print(e)
