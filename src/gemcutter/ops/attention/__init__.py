"""From the projection of q, k and v to the heads' outputs: head norms, rope, cache, attention over its pages."""
