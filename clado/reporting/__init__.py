"""What people read: text tables, the HTML page, plots."""
