"""Making recipes: what is measured on models and samples, and from that and a budget to a recipe."""
