"""The interaction matrix, and the estimators that make it."""
