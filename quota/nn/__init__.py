"""Quantized modules and the 4-bit cache."""
