"""The process inside a hospital."""
