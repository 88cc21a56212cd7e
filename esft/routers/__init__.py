"""What the literature adds for routers: losses of balance, and what they read."""
