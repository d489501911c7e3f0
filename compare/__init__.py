"""Records of our runs and published numbers → one honest table, as text, as a page, in a README."""
