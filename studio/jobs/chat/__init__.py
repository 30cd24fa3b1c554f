"""The chat job: one base model, with and without its adapter, answering questions as they come."""
