"""Chapter `models/`: generate images, from the autoencoder to the diffusion transformer."""
