"""One page of what every KV cache dtype loses, from a folder of results."""
