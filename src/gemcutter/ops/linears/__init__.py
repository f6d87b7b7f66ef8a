"""Matrix products whose rows do not know each other, in the halves and in FP8."""
