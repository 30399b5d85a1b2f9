"""Built-in tasks: their files, their texts, their metrics. Knows no model."""
