"""Where the parts of a training lie, and which of its layers are computed again: chosen so that a card is filled."""
