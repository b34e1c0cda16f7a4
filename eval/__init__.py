"""Evaluations that run a real vLLM engine: the demo, and the accuracy and speed measurements."""
