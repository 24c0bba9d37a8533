"""Dropping visual tokens inside a model: hooks, scores, policies, budgets."""
