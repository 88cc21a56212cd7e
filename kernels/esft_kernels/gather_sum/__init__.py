"""The sum of each token's rows."""
