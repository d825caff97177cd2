"""What a round costs beside its training: this product, bare publishes of the same bytes, Flower and NVFlare in one call."""
