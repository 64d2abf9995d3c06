"""Easy Diffusion: plain modules, each a chapter; read them in the order schedule, diffusion, samplers, blocks, unet, train."""
