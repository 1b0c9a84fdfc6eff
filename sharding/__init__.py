"""Axes, meshes and chips; nothing here knows the model."""
