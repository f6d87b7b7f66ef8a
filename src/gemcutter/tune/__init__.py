"""What is fastest on this card: kernels and tiles, measured one against the other, and kept in a file."""
