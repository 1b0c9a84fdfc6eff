"""The parts of scripts/dual_mode.py."""
