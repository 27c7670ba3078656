"""What people open: the catalogue with its claims as a web page, as a static site and as a digest of what changed."""
