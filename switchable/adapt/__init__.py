"""AN EXISTING CHECKPOINT BECOMES SWITCHABLE: grouped, its routers calibrated, measured."""
