"""How good a model is: parity with another implementation or with golden values, perplexity, and lm-eval's tasks."""
