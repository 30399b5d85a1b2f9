"""Answers over HTTP; knows models and prompts through `predict` alone, and no file format but the folder of prompts."""
