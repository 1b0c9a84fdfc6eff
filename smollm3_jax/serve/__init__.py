"""An OpenAI-compatible server. What reads bodies and writes answers (job.py) knows nothing of HTTP, threads or JAX."""
