"""What commands do once their words are parsed, and a mistake in them is told: here PyTorch is imported."""
