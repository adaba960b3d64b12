"""One run: build it, train it, test it, load it again."""
