"""Files of models and prompts, in and out. Knows how they are stored, and not what is computed with them."""
