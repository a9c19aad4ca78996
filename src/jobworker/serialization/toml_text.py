"""Parse TOML text, with one error for every text that cannot be parsed."""

import tomllib


class MalformedTOML(ValueError):
    """The text is not TOML that can be read; the message says why."""


def loads(text: str) -> dict[str, object]:
    """Parse TOML. Raises MalformedTOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MalformedTOML(f"it is not TOML: {error}") from None
    except RecursionError:  # the parser of the standard library has no bound of its own
        raise MalformedTOML("its values are nested too deeply") from None
