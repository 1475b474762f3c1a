"""Files on disk: measurements, prepared layers, evaluations."""
