"""Answers over HTTP: one frozen model, and a folder of prompts."""
