"""One file a noun; handlers contain no try."""
