"""Pages to look at: one self-contained HTML file each, without scripts and without anything from a network."""
