"""Encoders: an image in, feature maps out."""
