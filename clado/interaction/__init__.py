"""The interaction matrix, and the estimators that compute it."""
