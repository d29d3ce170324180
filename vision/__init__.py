"""Big-Little networks for images."""
