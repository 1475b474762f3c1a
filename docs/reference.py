"""Builds the API reference from the docstrings: `make docs`, or this file with a folder to write to (default: build/docs)."""

import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

from pdoc import doc, render

import clado

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("clado.data.zoo.train",)


def modules() -> list[str]:
    """Every public module of clado: the façade first, then the others by name."""
    names = [module.name for module in walk_packages(clado.__path__, "clado.")]
    return ["clado", *sorted(name for name in names if "._" not in name and name not in SCRIPTS)]


def build(folder: Path) -> None:
    """Writes one page for each public module, an index and a search index into a folder."""
    for name in clado.__all__:  # they are loaded when first used; pdoc lists what is there
        vars(clado)[name] = getattr(clado, name)
    render.configure(footer_text=f"clado {clado.__version__}")
    # not pdoc.pdoc(): it takes `__all__` of a package for a list of its modules too
    pages = {name: doc.Module(import_module(name)) for name in modules()}
    texts = {f"{name.replace('.', '/')}.html": render.html_module(page, pages) for name, page in pages.items()}
    texts |= {"index.html": render.html_index(pages), "search.js": render.search_index(pages)}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    build(target)
    print(f"Wrote {target / 'index.html'}")
