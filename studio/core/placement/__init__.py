"""Where weights and activations are while a training runs: on the card, in main memory, or computed again."""
