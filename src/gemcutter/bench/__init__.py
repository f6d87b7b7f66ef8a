"""How fast things are, held against the bytes that must move and against what others do."""
