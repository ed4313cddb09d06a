"""The same function, fast: expert compute by backend."""
