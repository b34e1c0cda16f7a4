"""What caches take and how fast they are: `kernels` of one layer, the whole `engine`, decoding on a `cpu`."""
