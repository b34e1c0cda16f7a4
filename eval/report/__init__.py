"""What the benchmarks and the accuracy page share: where numbers were taken, how they are shown, files."""
