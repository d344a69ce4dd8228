"""`farspan sweep`: many runs from one command."""
