"""Pure tensor functions: grids, bit packing, orthogonal matrices, second moments. Knows no model and no file."""
