"""A run that has been opened: its network, data, space, identity and prepared layers."""
