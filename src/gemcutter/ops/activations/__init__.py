"""Gate and up become one: GeGLU and SwiGLU, and their results in FP8."""
