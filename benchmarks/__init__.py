"""Measuring QUOTA from a checkout: ops and models beside named peers, the CUDA side, the server under load. Not
shipped."""
