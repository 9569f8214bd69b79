"""Differential privacy: sampling of patients, their gradients, noise and its accounting."""
