"""Serving: one model with several routers behind a URL, each request with its own or none."""
