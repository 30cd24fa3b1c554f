"""The memory of other people's loops: the stock Trainer with peft and bitsandbytes, fused kernels, the allocator.

Builds on the memory model of our own loop (studio/core/vram), which knows nothing of it. `setup` says what these loops
may be asked for and which versions differ, `modules` how their layers and losses compute, `loop` what that means for a
step, `estimate` the bytes; `replay` and `allocator` play a training event by event.
"""
