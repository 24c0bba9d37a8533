"""From per-layer measurements and a budget to a recipe: pure functions, no models."""
