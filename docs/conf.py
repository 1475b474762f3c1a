"""The site of `make docs`: README, guides, lessons and the API reference. Sphinx reads it; the pages' root is the project's."""

import re

import clado

project, version = "clado", clado.__version__
html_theme, html_title = "furo", f"clado {version}"
extensions = ["myst_nb", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "*.md", "docs/**", "notebooks/*.ipynb", "infra/README.md", "clado/data/zoo/README.md", "tests/benchmarks/*.md",
]  # fmt: skip

nb_execution_mode = "off"  # the lessons are kept with their outputs
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

apidoc_modules = [
    {
        "path": "../clado",
        "destination": "docs/reference",
        "exclude_patterns": ["../clado/data/zoo/train.py"],
        "automodule_options": {"members", "show-inheritance"},
        "separate_modules": True,
        "module_first": True,
    }
]
autodoc_default_options = {"exclude-members": "set"}  # matplotlib gives each figure a `set` with a docstring for its own site
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_numpy_docstring = False
default_role = "code"  # `x` is code, as in Markdown


def docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Lets reStructuredText read our docstrings."""
    text = "\n".join(lines)
    if what in ("attribute", "data", "property"):
        text = "..\n\n" + text  # an empty comment; else napoleon takes what is before a colon for a type
    text = re.sub(r"^(?! )(.+)\n\n(?=    )", r"\1\n\n::\n\n", text, flags=re.M)  # an indented block is code
    text = re.sub(r"\b(docs/[\w-]+|tests/benchmarks/[A-Z_]+)\.md", r":doc:`/\1`", text)  # guides are pages of the site
    lines[:] = text.split("\n")


def source(app: object, name: str, content: list[str]) -> None:
    """Lets links of a page to a file of the library lead to its page in the reference."""
    content[0] = re.sub(
        r"\]\((?:\.\./)*clado/([\w/]+?)(?:/__init__)?\.py\)",
        lambda link: f"](/docs/reference/clado.{link[1].replace('/', '.')}.rst)",
        content[0],
    )


def setup(app: object) -> None:
    """Registers both."""
    app.connect("autodoc-process-docstring", docstring, priority=100)  # type: ignore[attr-defined]
    app.connect("source-read", source)  # type: ignore[attr-defined]
