"""What full-size models take, and how large the package is."""
