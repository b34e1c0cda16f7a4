"""The operations on a CPU: numba loops over pages whose codes lie token after token.

Functions take torch tensors. Rotations and dense attention are torch's; numba does what torch has no fast
operator for: Viterbi searches, bit streams, and attention straight off packed pages. write.py and read.py
hold its loops. A loop calls loops of its own file only: numba keeps compiled code between processes, and
would not notice that a function in another file has changed.
"""
