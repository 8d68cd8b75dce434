"""Decoders: an encoder's feature maps in, maps up to the size of the image out."""
