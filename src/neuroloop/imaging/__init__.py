"""From bytes to pixels: decoding, the canonical form, augmentation, simulated scans. No I/O."""
