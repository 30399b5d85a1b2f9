"""Read and write models and prompts. This folder handles storage only, not computation."""
