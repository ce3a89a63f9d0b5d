"""Names of classes, files and variants as text in which nothing is hidden and no markup."""

import re
import unicodedata

__all__ = ["escape", "literal", "markdown"]


def literal(name: object) -> str:
    r"""Returns a name on one line: letters that cannot be seen become escapes, such as \n."""
    text = unicodedata.normalize("NFC", str(name))
    return "".join(escape(letter) if _is_hidden(letter) else letter for letter in text)


def markdown(name: object) -> str:
    """Returns a name that Markdown shows as it is, in a table too."""
    text = re.sub(r"([\\`*\[\]<>|#~$])", r"\\\1", literal(name))
    text = re.sub(r"&(?=#?\w+;)|:(?=[\w+-]+:)", r"\\\g<0>", text)  # &amp; and :smile:
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text)  # a _ between letters is no markup


def escape(letter: str) -> str:
    r"""Returns a letter as Python writes it in ASCII, such as \u732b."""
    return letter.encode("unicode_escape").decode()


def _is_hidden(letter: str) -> bool:
    # Controls, surrogates of undecodable file names, and what reorders or hides text; but not
    # the joiners that Persian and Indian scripts are written with.
    kind = unicodedata.category(letter)
    hidden = kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return hidden and letter not in "\u200c\u200d"
