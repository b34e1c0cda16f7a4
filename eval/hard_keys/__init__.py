"""What presets lose on keys that are hard to quantise, and what `polarquant check` saves of it."""

from vllm_polarquant.eval.hard_keys.edits import write_edit

__all__ = ["write_edit"]
