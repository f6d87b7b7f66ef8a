"""Norms of rows, alone and with what stands around them."""
