"""MLflow: what is sent, and how it is delivered."""
