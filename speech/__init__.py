"""Big-Little networks for speech."""
