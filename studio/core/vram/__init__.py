"""The memory model: what a fine-tune holds on a card, worked out from the model's shape and from how it is trained.

`polynomial` and `tape` are a symbolic autograd, `operators`, `modules`, `decoder_layer` and `head` the network in
it, `step` its high-water marks; `static` is what is there all the time, `stages` the sum by stage, `reserve` what the
allocator and the driver add, `estimate` the range and the verdict, `report` the document.
"""
