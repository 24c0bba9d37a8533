"""The paper's tables and figures, run on any model: each study is a list of configurations on the same questions."""
