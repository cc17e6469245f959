"""Text in characters that a stream can encode: on an ASCII terminal `–` becomes `-`, `α` `alpha` and `×` `x`."""

from __future__ import annotations

import re
import unicodedata

SIGNS = {
    "–": "-", "—": "-", "−": "-", "‐": "-", "‑": "-", "·": "*", "•": "*", "×": "x", "…": "...", "→": "->", "←": "<-", "≤": "<=",
    "≥": ">=", "≈": "~", "∝": "~", "±": "+-", "∞": "inf", "√": "sqrt", "²": "^2", "³": "^3", "½": "1/2", "∂": "d", "∫": "int",
    "µ": "u", "°": "deg", "‖": "||", "∈": "in", "≠": "!=", "⊙": "o", "⊗": "x", "⟨": "<", "⟩": ">", "⌊": "[", "⌋": "]", "⌈": "[",
    "⌉": "]", "ᵀ": "^T", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "§": "section ",
    "€": "EUR", "©": "(c)", "®": "(R)", "™": "(TM)", "ß": "ss", "æ": "ae", "Æ": "AE", "ø": "o", "Ø": "O",
    "≡": "==", "∩": "and", "∪": "or", "þ": "th", "⁄": "/", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
DRAWN = {  # lines, bars and blocks
    **dict.fromkeys("─━═╌╍╴╶╸╺╾╼", "-"),
    **dict.fromkeys("│┃║╎╏╵╷╹╻", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯┏┓┗┛┣┫┳┻╋╔╗╚╝╠╣╦╩╬╞╡╪┡┩╇", "+"),
    **dict(zip("▁▂▃▄▅▆▇█", "_.,-~+*#", strict=True)),
    "╲": "\\", "╱": "/", "✓": "v", "✗": "x",
}  # fmt: skip
PLAIN = SIGNS | DRAWN


def legible(text: str, encoding: str) -> str:
    """The text with every character that `encoding` lacks replaced: by `PLAIN`, by its name, by its plain form, or by `?`.

    >>> legible("α = 0.5 ± 0.1 … 2 × 10³", "ascii")
    'alpha = 0.5 +- 0.1 ... 2 x 10^3'
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_plain(letter, encoding) for letter in text)
    except LookupError:
        return legible(text, "ascii")
    return text


def _plain(letter: str, encoding: str) -> str:
    for candidate in (letter, PLAIN.get(letter, ""), *_simpler(letter)):
        try:
            if candidate:
                candidate.encode(encoding)
                return candidate
        except UnicodeEncodeError:
            pass
    return "" if unicodedata.combining(letter) else "?"


def _simpler(letter: str) -> tuple[str, ...]:
    """The letter without its accents and in Latin: `é` → `e`, `₂` → `2`, `ẑ` → `z`, `α` → `alpha`, `Δ` → `Delta`."""
    greek = _GREEK.match(unicodedata.name(letter, ""))
    if greek:
        name = greek["name"].replace("LAMDA", "LAMBDA")
        return (name.title() if greek["case"] == "CAPITAL" else name.lower(),)
    parts = unicodedata.normalize("NFKD", letter)
    return ("".join(PLAIN.get(part, part) for part in parts if not unicodedata.combining(part)),) if parts != letter else ()


_GREEK = re.compile(r"GREEK (?P<case>SMALL|CAPITAL) LETTER (?:FINAL )?(?P<name>[A-Z]+)")
