"""Settings of a run: schema, loading, template."""
