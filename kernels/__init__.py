"""Triton kernels over polar-coded KV pages; they know nothing of vLLM.

store.py writes keys and values into pages, decode.py attends to them in place, prefill.py unpacks a
prefix for FlashAttention and merges its result. page.py holds what they share: how a page is read; lanes.py
and lane_page.py are the same for kernels written lane by lane.
Everything runs under Triton's interpreter too (``TRITON_INTERPRET=1``), which is how CI tests it.
"""
