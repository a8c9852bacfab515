"""common/errors.py - what a user can put right, told in one line.

    Refusal          the script ends with this line and exit code 2 (cli.py)
      ModelError     a model that cannot be found, read or run here
      UsageError     a flag, a combination of flags or a file that makes no sense

Others derive from Refusal where they belong: TokenizerError, SelectionError, ButlerError.
`in_one_line` makes one of these of whatever a damaged file raises.

    python -m common.errors        how long a message may get
"""

from contextlib import contextmanager

from safetensors import SafetensorError

DAMAGE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError,
          RecursionError, NotImplementedError, SafetensorError)


class Refusal(ValueError):
    """Something that the user can put right; the message is one line, whatever a file had in it."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) < 500 else f"{line[:180]} ... {line[-310:]}")


class ModelError(Refusal):
    """A model that cannot be found, read or run here."""


class UsageError(Refusal):
    """A flag, a combination of flags or an input file that makes no sense."""


@contextmanager
def in_one_line(kind, place, problem: str, *more):
    """Whatever a damaged file raises inside, and `more`, becomes a `kind` of Refusal that names the
    place."""
    try:
        yield
    except Refusal as e:
        raise kind(f"{place}: {e}") from None
    except (*DAMAGE, *more) as e:
        raise kind(f"{place}: {problem} ({type(e).__name__}: {e})") from None


if __name__ == "__main__":
    message = str(Refusal("a file may say anything,\n" * 100))
    print(f"{len(message)} characters, {message.count(chr(10))} line breaks:\n{message}")
