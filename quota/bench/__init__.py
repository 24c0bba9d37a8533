"""The benchmark: every op of `quota.ops` beside named peers in one run, each row with the share of this machine's
ceiling it reaches."""
