"""The base model: the embedded one made loadable, any one loaded and frozen."""
