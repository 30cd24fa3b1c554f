"""A streamed base: frozen weights of decoder layers wait in main memory and are copied to the card ahead of their use.

In reading order: `ring` is the order of copies and computation, `layers` packs a model's weights and lends them to its
layers, `four_bit` is the 4-bit product whose backward asks for the weights that are lent then.
"""
