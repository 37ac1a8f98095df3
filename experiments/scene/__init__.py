"""Scene understanding: segmentation, depth, normals, instances on NYUv2, Cityscapes and rendered rooms (paper, 6.2)."""
