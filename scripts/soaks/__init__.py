"""What scripts/soak.py does to training and to the server."""
