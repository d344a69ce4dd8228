"""`farspan evaluate`: what a trained model knows, and how far back it can reach."""
