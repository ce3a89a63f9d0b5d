"""Names of classes, files and variants as text in which nothing is hidden and no markup."""

import re
import unicodedata


def literal(name: object) -> str:
    r"""Returns a name on one line: letters that cannot be seen become escapes, such as \n."""
    text = unicodedata.normalize("NFC", str(name))
    return "".join(
        letter.encode("unicode_escape").decode() if _is_hidden(letter) else letter
        for letter in text
    )


def shorten(name: object, length: int) -> str:
    """Returns a `literal` name of at most `length` letters; a longer one ends in "…"."""
    text = literal(name)
    return text if len(text) <= length else text[: length - 1] + "…"


def markdown(name: object) -> str:
    """Returns a name that Markdown shows as it is, in a table too."""
    text = re.sub(r"([\\`*\[\]<>|#~$])", r"\\\1", literal(name))
    text = re.sub(r"&(?=#?\w+;)|:(?=[\w+-]+:)", r"\\\g<0>", text)  # &amp; and :smile:
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text)  # a _ between letters is no markup


def _is_hidden(letter: str) -> bool:
    # Controls, surrogates of undecodable file names, and what reorders or hides text; but not
    # the joiners that Persian and Indian scripts are written with.
    kind = unicodedata.category(letter)
    hidden = kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return hidden and letter not in "\u200c\u200d"
