"""What stands between two blocks of a layer: sums, residual and norms, alone or in the product that reads them."""
