"""Photos and class names in, labels out."""
