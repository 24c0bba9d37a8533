"""`make gpu-check`: builds, checks and times the CUDA side on whatever GPU is at hand. Nothing here runs on import."""
