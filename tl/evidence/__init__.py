"""Evidence: how much data there is, and how much of the pretraining serves it."""
