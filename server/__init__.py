"""The coordinator; cannot open an image."""
