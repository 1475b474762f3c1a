"""The words of the project, on one screen: a report shows them, and docs/glossary.md is made from them.

`python -m clado.reporting.glossary` writes that page.
"""

from pathlib import Path

from clado.records.text import markdown_table

WORDS = {
    "layer": "a weight tensor that a convolution or a linear operator reads",
    "candidate bit-widths": "the bit-widths offered to a layer",
    "option": "a layer at one bit-width, and at one bit-width of its input if inputs are quantized",
    "assignment": "one bit-width for each layer",
    "average bits": "bits of all searched weights, divided by their number",
    "budget, constraint": "the limit of one row of the table; a limit that holds for every budget",
    "criterion": "the loss that must not grow: kl_to_float (distance from the float network) or cross_entropy",
    "calibration set": "images that fit ranges and corrections",
    "sensitivity set": "images of which one half measures the interaction matrix, and the other half decides",
    "decision set": "the held-out half of the sensitivity set: proposals are measured on it, and the best is chosen",
    "validation set": "images that no choice has seen; top-1 is reported on them",
    "interaction": "what quantizing two layers together costs, minus the cost of each alone",
    "interaction matrix Ĝ": "twice the loss increases of options, and the interactions of their pairs; ½ αᵀĜα predicts a loss",
    "estimator": "a way to fill Ĝ: layerwise (no interactions), pairwise (all measured), gauss_newton (from logits)",
    "clipping": "replacing Ĝ by the nearest matrix without negative eigenvalues, which are mostly noise",
    "proposal": "an assignment that a method suggests for a budget; its loss is then measured",
    "chosen": "the proposal that a run recommends",
    "correction": "a change that recovers accuracy without training, such as fitted rounding",
    "reconstruction": "fitting all layers of a block together, so that its output becomes that of the float block",
    "plain": "weights rounded to nearest, without corrections",
    "deployed": "the network that would be used: the chosen bits with their corrections",
    "tile": "unit of measuring, storing and repeating; its type is a tile kind",
    "sample block": "a range of sensitivity images that is measured at a time",
    "store": "the measurements of a run, in Zarr",
    "BOPs": "bit operations: multiplications, times bits of the weight, times bits of the input",
}


def page() -> str:
    """docs/glossary.md."""
    table = markdown_table(["word", "meaning"], [list(item) for item in WORDS.items()])
    return f"# Words\n\nOne word has one meaning in code, messages and documents.\n\n{table}\n"


if __name__ == "__main__":
    target = Path(__file__).parents[2] / "docs" / "glossary.md"
    target.write_text(page(), encoding="utf-8")
    print(f"Wrote {target}")
