"""The screens: what a person sees and turns. Reads runs through studio.runs; never imports what jobs need."""
