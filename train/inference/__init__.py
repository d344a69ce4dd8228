"""Text from a trained model: decoding token by token, and the strings that end it."""
