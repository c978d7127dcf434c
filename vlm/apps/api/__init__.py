"""An export behind an OpenAI-compatible HTTP interface: `serve` in server.py."""
