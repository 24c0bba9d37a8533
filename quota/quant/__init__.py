"""The number formats, in pure torch: exact on CPU, the semantics every kernel must reproduce."""
