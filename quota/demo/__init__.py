"""`quota demo`: the whole path on the embedded model, in stages that are kept."""
