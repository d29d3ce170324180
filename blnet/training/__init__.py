"""Training: one loop for images and speech. See `blnet.training.loop` and `blnet.training.task`."""
