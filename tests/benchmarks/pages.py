"""The layout of the pages of figures. It needs no other package."""

import re
import textwrap

GAP = re.compile(r"(\n+(?=- )|\n{2,}|\n\Z)")
AS_IT_IS = re.compile(r"^(\||#|    |!\[|<!--)", re.M)


def filled(page: str) -> str:
    """Wraps paragraphs and list items of Markdown at 100 columns. Tables, headings and code stay."""
    return "".join(part if not part.strip() or AS_IT_IS.search(part) else _fill(part) for part in GAP.split(page))


def _fill(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(" ".join(text.split()), 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
