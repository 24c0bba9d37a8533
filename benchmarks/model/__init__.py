"""Whole models of full size with random weights, beside transformers."""
