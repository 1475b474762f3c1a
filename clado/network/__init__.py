"""A network as a graph whose layers can be replaced."""
