"""The Tucodec image codecs of CLIC 2019, rebuilt and trainable."""
