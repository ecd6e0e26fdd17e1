"""Reading and writing files: bounded, whole, or not at all."""
