"""The parts of scripts/on_device.py: what each measures, how they are run, and how results are told."""
