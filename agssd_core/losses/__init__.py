"""Objectives as plain functions over tensors."""
