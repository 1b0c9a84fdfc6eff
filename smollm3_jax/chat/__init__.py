"""Conversations as text: the chat template, and what the model answers in it."""
