"""The commands on a finished run, and a few others."""
