"""Kernels over polar-coded KV pages; they know nothing of vLLM. ops.py says what serving asks of them."""
