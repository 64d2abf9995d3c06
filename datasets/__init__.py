"""Plain datasets: each hands out (picture uint8 [3, H, W], caption str)."""
