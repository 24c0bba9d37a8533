"""The `quota` command."""
