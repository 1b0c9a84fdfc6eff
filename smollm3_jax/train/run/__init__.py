"""A run of `smollm3 train`: its loop, its folder with checkpoints and metrics, and what a restart goes on from."""
