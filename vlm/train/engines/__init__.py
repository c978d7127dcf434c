"""Engines: a model, its optimizer, and the processes they are spread over."""
