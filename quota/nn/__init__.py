"""Quantized modules and their caches."""
