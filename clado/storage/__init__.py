"""What is kept on disk: measurements, prepared layers, evaluations."""
