"""Every op of `quota.ops` beside named peers in one run, each row with its share of this machine's ceiling."""
