"""What several tests share: tiny tasks, networks and data that tell what is expected of them."""
