"""Graphs, pages and folders that run without tinyprompt."""
