"""StructuredFFN: block layers, the dense guide that trains along with them, and the product taken before use."""
