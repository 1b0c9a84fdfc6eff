"""Training: the loss, the step, and what is built round them."""
