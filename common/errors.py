"""common/errors.py - what a user can put right, told in one line.

    Refusal          the script ends with this line and exit code 2 (cli.py)
      ModelError     a model that cannot be found, read or run here
      UsageError     a flag, a combination of flags or a file that makes no sense

Others derive from Refusal where they belong: TokenizerError, SelectionError, ButlerError.

    python -m common.errors        how long a message may get
"""


class Refusal(ValueError):
    """Something that the user can put right; the message is one line, whatever a file had in it."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) < 500 else f"{line[:180]} ... {line[-310:]}")


class ModelError(Refusal):
    """A model that cannot be found, read or run here."""


class UsageError(Refusal):
    """A flag, a combination of flags or an input file that makes no sense."""


if __name__ == "__main__":
    message = str(Refusal("a file may say anything,\n" * 100))
    print(f"{len(message)} characters, {message.count(chr(10))} line breaks:\n{message}")
