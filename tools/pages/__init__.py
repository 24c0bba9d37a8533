"""The generated blocks of README, docs and SECURITY.md: `python -m tools.pages`."""
