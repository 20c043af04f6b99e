"""The tested parts behind the programs in `scripts/`."""

import logging
import re


__version__ = "0.1.0"

# transformers says at import that it would rather have torchvision, which nothing here uses.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
# bitsandbytes says at import, on CPUs with AVX512, that it would rather have a kernel for inference in 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)


class UserError(ValueError):
    """What the user gave cannot be used. The message says what, with its value, and then the remedy."""


# What a request says of its sender, and the hub's tokens, which are longer than names of folders that begin alike.
TOKENS = re.compile(r"(?<=Bearer )[^'\"]*|(?<![A-Za-z0-9])hf_(?:[a-z]{2,8}_)?[A-Za-z0-9]{20,}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without tokens, or its class's name where it has none."""
    return TOKENS.sub("(a token)", (str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """Return the text with control characters, and what no encoding takes, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
