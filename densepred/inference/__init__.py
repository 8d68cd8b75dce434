"""Prediction of whole volumes: windows, their blending in a ring of planes, and the streams around them."""
