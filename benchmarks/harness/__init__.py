"""What the scripts of the published tables share: cells, images, networks, training, heads, judging."""
