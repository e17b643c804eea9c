"""What layers share: swapping them into a model, and making a model dense again."""
