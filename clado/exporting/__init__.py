"""Formats of an exported network, one module for each.

An exporter writes a folder that can be read without this package's settings or stores. Each file
is written through a temporary name and a rename. An exporter refuses what it cannot express, with
a message that names it. Its reader refuses a network that does not fit.
"""
