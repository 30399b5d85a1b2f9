"""An HTTP server for one frozen model and a folder of prompts."""
