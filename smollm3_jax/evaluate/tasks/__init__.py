"""Tasks that need no hub: YAML files for lm-eval, and what they are made of."""
