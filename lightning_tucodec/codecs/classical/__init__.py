"""Codecs of other libraries and of ffmpeg."""
