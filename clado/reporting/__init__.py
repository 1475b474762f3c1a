"""Reports: text tables, the HTML page, plots."""
