"""How the voxels of the image move through the operations of a network."""
