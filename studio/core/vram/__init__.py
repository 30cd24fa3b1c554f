"""The memory model of our own loop: what a fine-tune holds on a card, from the model's shape and how it is trained.

In reading order: `setup` is what is chosen; `estimate` the range and the verdict, `stages` the sum by stage, `reserve`
what allocator and driver add, `static` what is there all the time, `micro_batch` what comes and goes. That follows from
`loop`, how our loop computes, and from the network in symbolic tensors: `decoder_layer` and `head`, of `modules`, of
`operators`, recorded on a `tape`, in sizes that are a `polynomial` of batch, length and rank. `report` is the document.
"""
