"""Ways to hand a quantized network to others: one module a format.

An exporter writes a folder that can be read without this package's settings or stores, writes every file through a temporary
name and a rename, refuses what it cannot express (naming it), and has a reader that refuses a network that does not fit.
"""
