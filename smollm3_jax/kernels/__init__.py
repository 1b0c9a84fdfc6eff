"""Pallas kernels outside attention, which has its own beside what chooses among them."""
