"""Encoders, heads and the student/teacher pair."""
