"""Text generation: requests in, tokens and text out."""
