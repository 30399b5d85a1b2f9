"""The built-in tasks: readers, text formats and metrics. This folder does not use a model."""
