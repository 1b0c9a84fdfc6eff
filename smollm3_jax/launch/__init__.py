"""What starts a run or a server on rented machines: manifests and scripts, made of few values."""
