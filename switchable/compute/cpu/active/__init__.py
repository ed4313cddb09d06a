"""`active`: dense training steps that multiply active neurons only."""
