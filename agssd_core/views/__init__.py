"""Crops, geometry, masks and augmentation of one volume."""
