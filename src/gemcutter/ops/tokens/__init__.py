"""From token ids to what enters the first layer, and from logits back to a token."""
