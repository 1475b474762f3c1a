"""The phases of a run."""
