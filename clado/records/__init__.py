"""The results of a run as plain data, and how they are written and read. Nothing here measures."""
