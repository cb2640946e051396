"""The transformations: `record`, `scan` and `with_resets`."""
