"""Image codecs behind one protocol."""
